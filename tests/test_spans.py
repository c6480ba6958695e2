"""Question answering: no answer begins or ends in padding, however much of it there is, and the loss does not hear of it."""

import copy

import pytest
import torch
from families import FAMILIES, build
from families import make_inputs as ragged
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from training_helpers import top

import hf_tokenprune as tp
from hf_tokenprune.modeling.spans import NOWHERE

HEAD = "ForQuestionAnswering"
NAMES = [name for name in FAMILIES if HEAD in FAMILIES[name].heads]


def make_inputs(name):
    return ragged(name, HEAD, lengths=(17, 5, 30))


def said(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def answered(inputs):
    """Inputs, and an answer in each text."""
    real = inputs["attention_mask"].bool()
    first = real.int().argmax(1)
    return {**inputs, "start_positions": first + 1, "end_positions": first + 2}


@pytest.mark.parametrize("name", NAMES)
def test_what_padding_says_is_nowhere(name):
    model, inputs = build(name, HEAD), make_inputs(name)
    real = inputs["attention_mask"].bool()
    assert not real.all()
    dense = said(model, inputs)
    found = said(tp.pack(model), inputs)
    for key in ("start_logits", "end_logits"):
        torch.testing.assert_close(found[key][real], dense[key][real], rtol=0, atol=1e-5)
        assert found[key][~real].eq(NOWHERE).all()
    assert torch.equal(said(tp.detach(model), inputs)["start_logits"], dense["start_logits"])


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_over_texts_without_padding(name):
    model, inputs = tp.pack(build(name, HEAD)), answered(make_inputs(name))
    for part in ("qa_outputs", "classifier"):
        if hasattr(model, part):
            torch.nn.init.constant_(getattr(model, part).bias, 3.0)  # which padding would say
    alone = []
    for row in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][row].bool()
        begin = int(real.int().argmax())
        one = {
            key: value[row : row + 1] - begin if "positions" in key else value[row : row + 1][..., real]
            for key, value in inputs.items()
        }
        alone.append(said(model, one)["loss"])
    expected = torch.stack(alone).mean()
    torch.testing.assert_close(said(model, inputs)["loss"], expected)
    wide = {key: value if "positions" in key else functional.pad(value, (0, 40)) for key, value in inputs.items()}
    torch.testing.assert_close(said(model, wide)["loss"], expected)


def test_what_a_teacher_says_of_an_answer_does_not_drown_in_padding():
    """Both may be padded as far as they like: what is distilled stays the same."""
    callback = tp.TokenPruneCallback(top(layer_weight=0.0))
    model = callback.attach(build("bert", HEAD, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    objective = callback.objective
    objective.moment = top().schedule.at(5, 12)
    objective.teacher = tp.pack(build("bert", HEAD, seed=5)).eval()
    inputs = answered(make_inputs("bert"))
    found = []
    for width in (0, 40):
        wide = {key: value if "positions" in key else functional.pad(value, (0, width)) for key, value in inputs.items()}
        torch.manual_seed(0)
        model(**wide)
        found.append(objective.pop_log()["distillation"])
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_half_precision_and_copies():
    inputs = answered(make_inputs("bert"))
    real = inputs["attention_mask"].bool()
    model = tp.attach(build("bert", HEAD), {1: tp.TopK(0.5)}).to(torch.bfloat16)
    for one in (model, copy.deepcopy(model)):
        found = said(one, inputs)
        assert found["loss"].isfinite()
        assert found["start_logits"][~real].max() < -9000
        assert found["start_logits"][real].min() > -100, "dropped tokens still answer"


@pytest.mark.parametrize("way", ["merged", "replaced before a forward", "replaced after one"])
def test_another_head_in_its_place_says_nowhere_of_padding_too(way):
    """PEFT puts the copy that it has trained there when it merges; quantisation, Linears of its own."""
    model, inputs = build("bert", HEAD), make_inputs("bert")
    padding = ~inputs["attention_mask"].bool()
    if way == "merged":
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="QUESTION_ANS"))
        tp.TokenPruneCallback(top()).attach(adapted)
        assert said(adapted.eval(), inputs)["start_logits"][padding].eq(NOWHERE).all()
        model = adapted.merge_and_unload()
    else:
        tp.pack(model)
        if way == "replaced after one":
            said(model, inputs)
        model.qa_outputs = nn.Linear(32, 2)
    for _ in range(2):
        assert said(model, inputs)["start_logits"][padding].eq(NOWHERE).all()
    assert not said(tp.detach(model), inputs)["start_logits"].eq(NOWHERE).any()
    assert not model.qa_outputs._forward_hooks
