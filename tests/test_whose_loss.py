"""Invariant 10: whoever computes the loss, and however it is accumulated, the auxiliary loss weighs the same, gates learn and the
budget is met."""

import pytest
import torch
from families import build, make_inputs
from torch.nn import functional
from training_helpers import (
    PullMethod,
    Rows,
    Texts,
    assert_close_state,
    logged,
    no_dropout,
    some_labels,
    spent_share,
    stack,
    top,
    trained,
    trainer_for,
)
from transformers import Trainer, TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.methods import saliency

HEAD = "ForSequenceClassification"
TOTAL = 12  # steps of a run


class GradientOf(TrainerCallback):
    """Gradients just before each optimizer step, of the method's own parameters and of all."""

    def __init__(self):
        self.own, self.norms = [], []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        own = [parameter.grad for parameter in model.token_pruner.objective.parameters()]
        self.own.append(own[0].clone())
        every = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self.norms.append([torch.stack([gradient.norm() for gradient in some]).norm().item() for some in (own, every)])


class LossFromLogits(Trainer):
    """Labels are given to the model, but its loss is not used."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class LossOfTheModel(LossFromLogits):
    """The model's loss is used, and is a mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def mean_of_all(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


WAYS = {
    "the model's loss": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": mean_of_all},
    "compute_loss from logits": {"trainer": LossFromLogits},
    "compute_loss from the model's loss": {"trainer": LossOfTheModel},
}


def mean_per_token(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def bce(outputs, labels, num_items_in_batch=None):
    return functional.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="sum") / num_items_in_batch


def spans_of(_):
    return dict.fromkeys(("start_positions", "end_positions"), torch.arange(6) % 5)


def several_labels(_):
    return {"labels": torch.eye(3)[torch.arange(6) % 3]}


def several_numbers(inputs):
    return {"labels": several_labels(inputs)["labels"] - 0.5}


def mse(outputs, labels, num_items_in_batch=None):
    return functional.mse_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch


OTHER_LABELS = {  # head, labels, own loss
    "no labels by that name": ("ForQuestionAnswering", spans_of, None),
    "labels per token": ("ForTokenClassification", some_labels, None),
    "several labels": (HEAD, several_labels, None),
    "several labels, compute_loss_func": (HEAD, several_labels, bce),
    "several numbers, compute_loss_func": (HEAD, several_numbers, mse),
    "labels per token, compute_loss_func": ("ForTokenClassification", some_labels, mean_per_token),
}


def other_labels(case):
    head, make_labels, loss = OTHER_LABELS[case]
    return {
        "model": build("bert", head),
        "data": Rows("bert", head, make_labels),
        "data_collator": stack,
        "compute_loss_func": loss,
    }


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", [*WAYS, *OTHER_LABELS])
def test_the_auxiliary_gradient_has_the_same_size_whoever_computes_the_loss(tmp_path, way, accumulation):
    look = GradientOf()
    arguments = WAYS[way] if way in WAYS else other_labels(way)
    trainer_for(
        tmp_path, PullMethod(), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=3, max_grad_norm=0, callbacks=[look], **arguments,
    ).train()  # fmt: skip
    assert [gradient.item() for gradient in look.own] == pytest.approx([3, 3, 3])


# A Trainer that passes labels but computes another loss from the logits tells nobody how many micro-batches a step has.
@pytest.mark.parametrize("way", [way for way in WAYS if way != "compute_loss from logits"])
def test_the_last_accumulation_of_an_epoch_may_be_short(tmp_path, way):
    """20 texts in micro-batches of 4 are 5, of which 3 are accumulated: steps of 3 and 2 micro-batches."""
    look = GradientOf()
    trainer_for(
        tmp_path, PullMethod(), per_device_train_batch_size=4, gradient_accumulation_steps=3, max_steps=4, data=Texts(20),
        max_grad_norm=0, callbacks=[look], **WAYS[way],
    ).train()  # fmt: skip
    assert [gradient.item() for gradient in look.own] == pytest.approx([3, 3, 3, 3])


IMAGES = {  # transformers' BERT ignores num_items_in_batch, so that even a dense BERT learns twice as fast here; its ViT does not
    "model": lambda: build("vit", "ForImageClassification"),
    "data": Rows("vit", "ForImageClassification", lambda _: {"labels": torch.arange(6) % 3}),
    "data_collator": stack,
}


@pytest.mark.parametrize("way", WAYS)
def test_accumulating_two_micro_batches_is_one_batch(tmp_path, way):
    """Texts of one length, so that the budget of a part is that of the whole; plain gradient descent, which shows sizes."""
    case = dict(IMAGES if way == "the model's loss" else {"model": lambda: None, "data": Texts(96, lengths=(17, 17))})
    make_model = case.pop("model")
    plain = {"max_steps": 6, "max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.01}
    states = []
    for accumulation in (1, 2):
        trainer = trained(
            tmp_path, model=make_model(), per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, **plain, **case, **WAYS[way],
        )  # fmt: skip
        states.append(trainer.model.state_dict())
        states[-1].pop("token_pruner.training_state.teacher")  # a fingerprint of the very bits
    starts = [state.pop("token_pruner.training_state.start") for state in states]  # logarithms of what was measured
    torch.testing.assert_close(*starts, atol=1e-4, rtol=0)
    assert_close_state(*states, atol=1e-5)


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("way", ["label smoothing", "compute_loss_func", "compute_loss from logits"])
def test_gates_learn_and_the_budget_is_met_whoever_computes_the_loss(tmp_path, way, constraint):
    trainer = trained(tmp_path, top(constraint=constraint), **WAYS[way])
    assert bool(logged(trainer, "lagrangian")) == (constraint == "lagrangian")
    objective = trainer.model.token_pruner.objective
    assert any(parameter.abs().max() > 0 for parameter in objective.parameters()), "gates have moved"
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_clipping_is_not_dominated_by_the_gates(tmp_path):
    look = GradientOf()
    trained(tmp_path, callbacks=[look])
    assert all(own < 0.5 * every for own, every in look.norms)


def test_a_regression_is_distilled_whoever_computes_the_loss(tmp_path):
    """Where the Trainer hands over no labels, the model's config does not say that its one output is a regression."""
    trainer = trained(
        tmp_path, model=build("bert", HEAD, num_labels=1), data=Rows("bert", HEAD, lambda _: {"labels": torch.arange(6) / 6}),
        data_collator=stack, compute_loss_func=lambda outputs, labels, **_: functional.mse_loss(outputs.logits[:, 0], labels),
    )  # fmt: skip
    assert logged(trainer, "distillation")[-1] > 0


@pytest.mark.parametrize("said", [None, "multi_label_classification"])
@pytest.mark.parametrize("case", ["several labels", "several labels, compute_loss_func"])
def test_where_nobody_says_what_logits_mean_that_is_told(tmp_path, caplog, case, said):
    """`problem_type` is what tells several labels from one class of many; transformers sets it if the model sees the labels."""
    arguments = other_labels(case)
    arguments["model"].config.problem_type = said
    trained(tmp_path, **arguments)
    assert caplog.text.count("problem_type") == (said is None and "compute_loss_func" in case)


def test_saliency_knows_by_then_what_logits_mean(tmp_path, monkeypatch):
    """Only once the model has computed a loss its config says that these are several labels."""
    seen, said = [], saliency._said
    monkeypatch.setattr(saliency, "_said", lambda *args: seen.append(args[2]) or said(*args))
    trained(tmp_path, top(importance="learned", rank_weight=0.0), **other_labels("several labels"))
    assert seen
    assert all(seen)


class OwnLoss(LossFromLogits):
    """It does not say what a loss is divided by."""

    loss_is_scaled_for_ga = None


class Whatever(OwnLoss):
    """It leaves the loss to the Trainer."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trainer", [OwnLoss, LossFromLogits, Whatever, Trainer])
def test_a_loss_that_nobody_divides_is_told(tmp_path, caplog, trainer, accumulation):
    trainer_for(tmp_path, PullMethod(), trainer=trainer, gradient_accumulation_steps=accumulation, max_steps=2).train()
    assert caplog.text.count("loss_is_scaled_for_ga") == (trainer is OwnLoss and accumulation > 1)


def test_an_output_that_is_no_loss_is_not_taken_for_one():
    """BERT's pre-training head wants two kinds of labels; given one, its first output is not a loss."""
    inputs = make_inputs("bert", HEAD)
    found = []
    for labels in ({}, {"labels": inputs["input_ids"]}):
        callback = tp.TokenPruneCallback(top(teacher=None, constraint="lagrangian"))
        model = callback.attach(build("bert", "ForPreTraining", **no_dropout())).train()
        callback.objective.moment = top().schedule.at(5, TOTAL)
        with torch.no_grad():  # an auxiliary loss that is not 0
            for parameter in callback.objective.parameters():
                parameter.fill_(1.0)
        torch.manual_seed(0)
        found.append(model(**inputs, **labels)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_micro_batch_or_a_step_without_labels_is_none(tmp_path, accumulation):
    """Its mean loss would be NaN, and all weights with it."""
    labels = lambda inputs: {"labels": torch.where(torch.arange(6)[:, None] < 3, inputs["input_ids"], -100)}  # noqa: E731
    data = Rows("modernbert", "ForMaskedLM", labels)
    trainer = trainer_for(
        tmp_path, top(rank_weight=0.0), model=build("modernbert", "ForMaskedLM"), data=data, data_collator=stack, max_steps=9,
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulation, logging_steps=1,
    )  # fmt: skip
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class OfAPart(LossFromLogits):
    """The encoder is called by itself, as where a Trainer pools in its own way."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model.classifier(model.bert(**inputs).pooler_output)
        loss = functional.cross_entropy(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class InEvaluationMode(LossFromLogits):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        return super().compute_loss(model.eval(), inputs, return_outputs)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("kind", [OfAPart, InEvaluationMode])
def test_a_loss_that_passes_by_the_gates_is_refused_in_the_first_step(tmp_path, kind, dense, accumulation):
    method = tp.StructuredPruning(target_macs=0.5, schedule=tp.Schedule(dense=dense, anneal=1, settle=1))
    trainer = trainer_for(tmp_path, method, trainer=kind, gradient_accumulation_steps=accumulation)
    with pytest.raises(tp.errors.TrainingError, match=r"calls a part of the model.* Call model\(\.\.\.\)"):
        trainer.train()
    assert trainer.state.global_step == 1


class NowAndThen(Trainer):
    """It looks at each batch by the encoder, and passes over some."""

    def training_step(self, model, inputs, *args):
        with torch.no_grad():
            model.bert(input_ids=inputs["input_ids"])
        if self.state.global_step % 3 == 1:
            return torch.zeros(())
        return super().training_step(model, inputs, *args)


def test_a_batch_that_is_passed_over_is_no_such_loss(tmp_path):
    assert 0.45 < spent_share(trained(tmp_path, trainer=NowAndThen).model, Texts()) < 0.51
