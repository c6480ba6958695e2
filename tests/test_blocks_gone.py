"""A model of which all FFNs, or all attention, were cut out, the rest left whole: its config tells a size that no weight has, so
that no plain class opens it, and that nothing else may go by."""

import pytest
import torch
import transformers as hf
from families import FAMILIES, build, class_head, make_inputs, outputs_of

import hf_tokenprune as tp
from hf_tokenprune.modeling.modeling_token_pruned import resize
from hf_tokenprune.modeling.sizes import sizes_of


@pytest.mark.parametrize("gone", ["units", "heads"])
@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if row.weights])
def test_what_is_left_opens_again(tmp_path, name, gone):
    head = class_head(name)
    model, inputs = tp.pack(build(name, head)), make_inputs(name, head)
    _, heads, units = sizes_of(model)
    left = {"heads": [range(count) for count in heads], "units": [range(count) for count in units]}
    resize(model, **{**left, gone: [[] for _ in heads]})
    assert model.config.token_pruning["shapes"]["restore"]
    expected = outputs_of(model, inputs)["logits"]
    model.save_pretrained(tmp_path)
    plain = getattr(hf, FAMILIES[name].stem + head)
    with pytest.raises(RuntimeError, match="size"):
        plain.from_pretrained(tmp_path)
    opened = tp.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs_of(opened, inputs)["logits"], expected, atol=1e-6, rtol=0)
