"""What a config asks for (hidden states, attention matrices) reaches the base model through heads that say None of it."""

import pytest
import torch
from families import FAMILIES, TEXTS, build, make_inputs
from reference import Reference, Rule, samples_of, share

import hf_tokenprune as tp

HEAD = "ForSequenceClassification"
SITES = (0, 1)
LENGTHS = (17, 5, 24, 1)


@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification"])
@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v2"])
def test_hidden_states_by_config_equal_the_masked_ones(name, head):
    inputs = make_inputs(name, head, LENGTHS)
    reference = Reference(build(name, head), dict.fromkeys(SITES, Rule(share(0.5))))
    reference.model.config._attn_implementation = "eager"
    model = tp.attach(build(name, head), {layer: tp.TopK(0.5) for layer in SITES})
    model.config.output_hidden_states = True
    with torch.no_grad():
        found = model(**inputs).hidden_states
    for row, sample in enumerate(samples_of(inputs)):
        right = reference({**sample, "output_hidden_states": True}).hidden_states
        assert len(found) == len(right)
        for mine, other in zip(found, right, strict=True):
            assert mine.shape[:2] == inputs["input_ids"].shape
            torch.testing.assert_close(mine[row : row + 1, : other.shape[1]], other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_none_means_what_it_means_to_the_dense_model(name):
    """Some families take it for the config's value, others for no; PEFT's wrappers and some heads say it."""
    head = HEAD if HEAD in FAMILIES[name].heads else FAMILIES[name].heads[0]
    inputs = make_inputs(name, head, LENGTHS)
    model = build(name, head)
    model.config.output_hidden_states = True
    none = {"output_hidden_states": None, "output_attentions": None}
    with torch.no_grad():
        dense = model(**inputs, **none).get("hidden_states")
        packed = tp.pack(model)(**inputs, **none).get("hidden_states")
    assert (packed is None) == (dense is None)
    real = inputs["attention_mask"].bool()
    for mine, other in zip(packed or (), dense or (), strict=True):
        torch.testing.assert_close(mine[real], other[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mpnet", "deberta-v2"])
def test_attention_matrices_by_config_are_refused_through_a_head(name):
    model, inputs = tp.pack(build(name, HEAD)), make_inputs(name, HEAD)
    model.config.output_attentions = True
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"output_attentions=True.*detach"):
        model(**inputs)
