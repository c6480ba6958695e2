"""Packed models that share a config, are copied, pickled or run at once do not disturb each other."""

import copy
import io
import threading

import pytest
import torch
from families import FAMILIES, build, make_inputs, outputs_of
from families import class_head as one_class
from test_packing import assert_same
from transformers import AttentionInterface

import hf_tokenprune as tp
from hf_tokenprune.errors import UnsupportedModelError
from hf_tokenprune.modeling.spans import NOWHERE


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_model_that_shares_the_config_stays_dense(name):
    head = one_class(name)
    packed, inputs = build(name, head), make_inputs(name, head)
    other = type(packed)(packed.config).eval()
    dense, expected = outputs_of(other, inputs), outputs_of(packed, inputs)
    tp.pack(packed)
    assert_same(outputs_of(other, inputs), dense)
    assert_same(outputs_of(packed, inputs), expected)
    tp.pack(other)
    assert_same(outputs_of(other, inputs), dense)
    assert_same(outputs_of(packed, inputs), expected)


@pytest.mark.parametrize("first", ["first packed", "last packed"])
def test_two_packed_models_that_share_a_config_detach_in_any_order(first):
    models = [build("bert", "Model")]
    models.append(type(models[0])(models[0].config).eval())
    inputs = make_inputs("bert", "Model")
    dense = [outputs_of(model, inputs) for model in models]
    for model in models:
        tp.pack(model)
    for number in (0, 1) if first == "first packed" else (1, 0):
        tp.detach(models[number])
        for model, expected in zip(models, dense, strict=True):
            assert_same(outputs_of(model, inputs), expected)
    assert models[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "llama", "vit"])
def test_an_encoder_may_have_another_config_than_its_attention(name):
    model, inputs = build(name, "Model"), make_inputs(name, "Model")
    inner, model.config = model.config, copy.deepcopy(model.config)
    model.config._attn_implementation_internal = "eager"
    expected = outputs_of(model, inputs)
    tp.pack(model)
    twin = copy.deepcopy(model)
    for packed in (model, twin, tp.pack(model)):
        assert_same(outputs_of(packed, inputs), expected)
    tp.detach(model)
    assert (model.config._attn_implementation, inner._attn_implementation) == ("eager", "sdpa")
    assert_same(outputs_of(model, inputs), expected)
    assert_same(outputs_of(twin, inputs), expected)
    assert_same(outputs_of(tp.detach(twin), inputs), expected)


@pytest.mark.parametrize("how", ["a head", "the encoder itself", "a copy of the encoder"])
def test_an_encoder_is_packed_through_one_model(how):
    one, other = build("bert", "ForSequenceClassification"), build("bert", "ForTokenClassification")
    other.bert = one.bert
    inputs = make_inputs("bert", "Model")
    expected = [outputs_of(model, inputs) for model in (one, other)]
    first = one.bert if how == "the encoder itself" else one
    tp.attach(first, {1: tp.TopK(0.5)})
    pruner, pruned = first.token_pruner, outputs_of(first, inputs)
    if how == "a copy of the encoder":
        other.bert = copy.deepcopy(one.bert)
    with pytest.raises(UnsupportedModelError, match="is packed already, through another model"):
        tp.pack(other)
    assert not hasattr(other, "token_pruner")
    assert first.token_pruner is pruner
    assert_same(outputs_of(first, inputs), pruned)
    assert_same(outputs_of(tp.attach(first, {1: tp.TopK(0.5)}), inputs), pruned)
    tp.detach(first)
    other.bert = one.bert
    tp.pack(other)
    for model, dense in zip((one, other), expected, strict=True):
        assert_same(outputs_of(model, inputs), dense)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_works_and_is_independent(name):
    head = one_class(name)
    model, inputs = build(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    tp.attach(model, {1: tp.TopK(0.5)})
    pruned = outputs_of(model, inputs)
    trace, model.token_pruner.trace = model.token_pruner.trace, []
    twin = copy.deepcopy(model)
    assert_same(outputs_of(twin, inputs), pruned)
    assert (twin.token_pruner.trace, model.token_pruner.trace) == (trace, [])
    assert_same(outputs_of(tp.detach(twin), inputs), dense)
    assert_same(outputs_of(model, inputs), pruned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(outputs_of(model, inputs), pruned)


@pytest.mark.parametrize("name", ["bert", "modernbert", "siglip"])
def test_pickling_round_trips_into_a_fresh_process(name, monkeypatch):
    head = one_class(name)
    model, inputs = tp.attach(build(name, head), {1: tp.TopK(0.5)}), make_inputs(name, head)
    expected = outputs_of(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.delitem(AttentionInterface._global_mapping, "token_pruning")  # as in a process that has packed nothing yet
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    assert_same(outputs_of(loaded, inputs), expected)


@pytest.mark.parametrize(
    ("name", "head"), [*((name, one_class(name)) for name in ("bert", "modernbert", "vit")), ("bert", "ForQuestionAnswering")]
)
def test_threads_may_share_a_model(name, head):
    model = tp.attach(build(name, head), {1: tp.TopK(0.5)})
    batches = [make_inputs(name, head, lengths=lengths, seed=seed) for seed, lengths in enumerate([(17, 5, 30), (4, 9)])]
    expected = [outputs_of(model, inputs) for inputs in batches]
    wrong = []

    def work(inputs, right):
        for _ in range(20):
            try:
                assert_same(outputs_of(model, inputs), right)
                if head == "ForQuestionAnswering":
                    with torch.no_grad():
                        said = model(**inputs).start_logits
                    assert torch.equal(said == NOWHERE, inputs["attention_mask"] == 0)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
