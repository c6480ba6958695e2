"""Invariant 1: a packed model gives the outputs of the unmodified model, whatever the family, head and batch."""


import pytest
import torch
from families import CASES, build, make_inputs, outputs_of

import hf_tokenprune as tp


@pytest.mark.parametrize(("name", "head"), CASES)
def test_packed_equals_dense(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    packed = outputs_of(tp.pack(model), inputs)
    assert dense.keys() == packed.keys()
    for key in dense:
        torch.testing.assert_close(packed[key], dense[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_hidden_states_come_back_padded(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    inputs["output_hidden_states"] = True
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        dense = model(**inputs).hidden_states
        packed = tp.pack(model)(**inputs).hidden_states
    assert len(dense) == len(packed)
    for a, b in zip(dense, packed, strict=True):
        real = ... if mask is None else mask.reshape(-1, mask.shape[-1]).bool()
        torch.testing.assert_close(b[real], a[real], rtol=0, atol=1e-5)
