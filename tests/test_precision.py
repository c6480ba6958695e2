"""Selectors are float32, whatever the model around them is in: they were trained so, and rounding moves who stays."""

import pytest
import torch
import transformers as hf
from families import build, make_inputs, outputs_of

import hf_tokenprune as tp

HEAD = "ForTokenClassification"
INPUTS = make_inputs("bert", HEAD)
HALVES = [torch.bfloat16, torch.float16]


def scored(bins=7):
    """A `RankBins` that has learned something."""
    selector = tp.RankBins(bins, hidden=32, width=32, near=2)
    selector.set_kept([1, 1, 0, 1, 0, 0, 1])
    for parameter in (selector.scorer.entered, selector.scorer.context):
        torch.nn.init.normal_(parameter, std=0.1)
    return selector


def sampler():
    skim = tp.Skim(hidden=32)
    for part in (skim.net[1], skim.net[4]):
        torch.nn.init.normal_(part.weight, std=0.3)
    skim.offset.fill_(-0.4)
    return skim


def pruned(dtype):
    return tp.attach(build("bert", HEAD).to(dtype), {1: scored(), 2: sampler(), 3: sampler()})


def types(model):
    return {tensor.dtype for tensor in model.token_pruner.state_dict().values()}


@pytest.mark.parametrize("way", ["ours", "code in the folder"])
@pytest.mark.parametrize("dtype", HALVES)
def test_what_was_saved_in_half_precision_opens_as_it_was(tmp_path, dtype, way):
    model = pruned(dtype)
    assert types(model) == {torch.float32, torch.int8}
    expected, trace = outputs_of(model, INPUTS)["logits"], model.token_pruner.trace
    assert trace[-1].survived != trace[0].entered
    model.save_pretrained(tmp_path)
    if way == "ours":
        opened = tp.from_pretrained(tmp_path)
    else:
        opened = hf.AutoModelForTokenClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert opened.dtype == dtype
    assert types(opened) == {torch.float32, torch.int8}
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_model_trained_in_float32_opens_in_half_precision_with_selectors_as_they_were(tmp_path, dtype):
    model = pruned(torch.float32)
    model.save_pretrained(tmp_path)
    opened = tp.from_pretrained(tmp_path, dtype=dtype)
    assert opened.dtype == dtype
    for name, tensor in model.token_pruner.state_dict().items():
        assert torch.equal(opened.token_pruner.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", HALVES)
def test_who_casts_the_whole_model_casts_selectors_too(tmp_path, dtype):
    model = pruned(torch.float32).to(dtype)
    assert types(model) == {dtype, torch.int8}
    assert outputs_of(model, INPUTS)["logits"].isfinite().all()
    model.save_pretrained(tmp_path)
    assert outputs_of(tp.from_pretrained(tmp_path), INPUTS)["logits"].dtype == dtype


def test_a_sampler_says_the_same_under_autocast():
    skim, states = sampler(), torch.randn(9, 32)
    expected = skim.logits(states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(skim.logits(states), expected)
