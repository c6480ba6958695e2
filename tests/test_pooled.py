"""Causal models and pooled heads: the token that a head reads is found, and the last layer computes no more than that."""

import pytest
import torch
import transformers as hf
from families import CASES, FAMILIES, build, make_inputs, outputs_of, padded_left
from test_packing import CAUSAL, CLASSIFIERS, assert_same, embedded

import hf_tokenprune as tp

POOLED = [(name, head) for name, head in CLASSIFIERS if name not in ("dinov2", "dinov2_with_registers", "siglip", "ijepa")]


# Causal models, whose heads read the last token


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[0] in CAUSAL])
def test_causal_models_take_padding_on_the_left(name, head):
    model, inputs = build(name, head), padded_left(make_inputs(name, head))
    dense = outputs_of(model, inputs)
    packed = tp.pack(model)
    assert_same(outputs_of(packed, inputs), dense)
    shifted = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    assert_same(outputs_of(packed, {**inputs, **shifted}), dense)  # only distances count


@pytest.mark.parametrize("name", CAUSAL)
def test_the_pooled_token_of_a_causal_model_is_the_one_that_transformers_reads(name):
    """The last whose id is not that of padding, even if real tokens have that id, too."""
    model, inputs = build(name, "ForSequenceClassification"), make_inputs(name, "", lengths=(12, 20, 7, 20))
    inputs["input_ids"][0, 10:12] = inputs["input_ids"][1, 15] = inputs["input_ids"][3, 19] = FAMILIES[name].config.pad_token_id
    for given in (inputs, padded_left(inputs), {"input_ids": inputs["input_ids"]}):
        dense = outputs_of(tp.detach(model), given)
        for sites in ((), (0, 2)):
            tp.attach(model, {layer: tp.TopK(1.0) for layer in sites})
            assert_same(outputs_of(model, given), dense)
            with torch.no_grad():
                states = model(**given, output_hidden_states=True)
            torch.testing.assert_close(states.logits, dense["logits"], rtol=0, atol=1e-5)
            tp.attach(model, {0: tp.TopK(1)})
            assert outputs_of(model, given)["logits"].isfinite().all()


def test_a_causal_head_that_would_read_padding_is_told_so():
    model, inputs = tp.pack(build("llama", "ForSequenceClassification")), make_inputs("llama", "")
    with pytest.raises(tp.errors.UnsupportedInputError, match="padding_side = 'left'"):
        model(**embedded(model, inputs))
    inputs["input_ids"][inputs["attention_mask"] == 0] = 9
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"pad_token_id = 0.*Set config.pad_token_id"):
        model(**inputs)
    model.config.pad_token_id = 9
    inputs["input_ids"][inputs["attention_mask"] == 1] = 7
    packed = outputs_of(model, inputs)
    assert_same(packed, outputs_of(tp.detach(model), inputs))


@pytest.mark.parametrize("name", CAUSAL)
def test_no_cache_is_filled_and_one_that_is_asked_for_is_refused(name):
    model, inputs = tp.pack(build(name, "Model")), make_inputs(name, "")
    assert model.config.use_cache
    with torch.no_grad():
        assert model(**inputs).past_key_values is None
    with pytest.raises(tp.errors.UnsupportedInputError, match="use_cache"):
        model(**inputs, use_cache=True)


def test_a_causal_config_may_ask_for_attention_in_both_directions():
    inputs = make_inputs("llama", "")
    model = build("llama", "Model", is_causal=False)
    dense = outputs_of(model, inputs)
    assert not torch.allclose(
        dense["last_hidden_state"], outputs_of(build("llama", "Model"), inputs)["last_hidden_state"], atol=0.1
    )
    assert_same(outputs_of(tp.pack(model), inputs), dense)
    for name, changes in (("gemma3", {"use_bidirectional_attention": True}), ("mistral", {"is_causal": False})):  # have windows
        model = build(name, "Model", **changes)
        dense = outputs_of(model, inputs)
        assert_same(outputs_of(tp.pack(model), inputs), dense)


# The last layer of a pooled head


@pytest.mark.parametrize(("name", "head"), POOLED)
def test_the_last_layer_computes_what_a_pooled_head_reads(name, head):
    model, inputs = tp.pack(build(name, head)), make_inputs(name, head)
    full = sorted(inputs["attention_mask"].sum(1).tolist()) if "attention_mask" in inputs else [37 + (name == "deit")] * 5
    outputs_of(model, inputs)
    *others, last = model.token_pruner.trace
    assert [(layer.entered, layer.queries, layer.survived) for layer in others] == [(full, full, full)] * 3
    asking = full if model.token_pruner.family.probabilities else [1] * 5
    assert (last.entered, last.queries, last.survived) == (full, asking, [1] * 5)
    outputs_of(model, {**inputs, "output_hidden_states": True})
    last = model.token_pruner.trace[-1]
    assert (last.entered, last.queries, last.survived) == (full, full, full)


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[1] in ("Model", "VisionModel", "ForMaskedLM")])
def test_the_last_layer_computes_all_where_all_is_read(name, head):
    model, inputs = tp.pack(build(name, head)), make_inputs(name, head)
    outputs_of(model, inputs)
    last = model.token_pruner.trace[-1]
    assert last.entered == last.queries == last.survived


@pytest.mark.parametrize(("name", "head"), POOLED)
def test_the_encoder_under_a_pooled_head_gives_every_token_when_called_by_itself(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    dense, right = outputs_of(model.base_model, inputs), outputs_of(model, inputs)
    tp.pack(model)
    assert_same(outputs_of(model.base_model, inputs), dense)
    assert_same(outputs_of(model, inputs), right)


class MeanForSequenceClassification(hf.BertForSequenceClassification):
    """A head of a user's own, which is called like a pooled one and reads every token."""

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return {"logits": self.classifier((states * attention_mask[..., None]).sum(1))}


class MeanPooler(torch.nn.Module):
    """What a user might put in the place of BERT's pooler."""

    def forward(self, states):
        return states.mean(1)


def test_a_part_of_a_users_own_may_read_every_token():
    model, inputs = build("bert", "ForSequenceClassification"), make_inputs("bert", "", lengths=(9, 9))
    assert tp.pack(build("bert", "ForSequenceClassification")).token_pruner.pooled_head
    model.bert.pooler = MeanPooler()
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)
    assert_same(outputs_of(tp.pack(model), inputs), dense, "packed again")


def test_a_head_of_a_users_own_may_read_every_token():
    model, inputs = build("bert", "ForSequenceClassification"), make_inputs("bert", "")
    model.__class__ = MeanForSequenceClassification
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)
