"""Invariants 9 and 10, and the callback: one `trainer.train()` goes dense -> anneal -> settle; it resumes exactly; accumulation
and checkpointing change speed, not results; and whoever computes the loss, gates learn and the budget is met."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, build, class_head, make_inputs, outputs_of
from torch import nn
from torch.nn import functional
from training_helpers import Recorder, Rows, Texts, at_home, kept_bins, no_dropout, spent_share, stack, top, trainer_for
from transformers import Trainer, TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.methods.base import Objective
from hf_tokenprune.schedule import Schedule

HEAD = "ForSequenceClassification"
DENSE, ANNEAL, TOTAL = 4, 8, 12  # where the phases of `top()` end in a run of 12 steps


def trained(folder, method=None, resume=None, **arguments):
    """A Trainer that has trained."""
    trainer = trainer_for(folder, top() if method is None else method, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{key}: {(found[key].double() - value.double()).abs().max()}"


def assert_close_state(found, expected, atol):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# One run, and what is heard of it

STEPS = 60


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that is long enough to learn something, and a recorder that stood before the callback in the list."""
    torch.manual_seed(0)
    recorder = Recorder(look=kept_bins)
    long = {"max_steps": STEPS, "per_device_train_batch_size": 16, "logging_steps": 2}
    trainer = trained(tmp_path_factory.mktemp("learned"), callbacks=[recorder], **long)
    return trainer, recorder


def test_one_run_goes_through_all_phases(learned):
    trainer, recorder = learned
    phases = logged(trainer, "pruning_phase")
    assert phases == sorted(phases)
    assert set(phases) == {0, 2, 3}, "dense, anneal, settle"
    ones, kept = [[1] * 8] * 2, recorder.looks
    assert all(pattern == ones for pattern in kept[: STEPS // 3 - 1])
    assert kept[STEPS // 2] != ones, "checkpoints of the anneal phase prune"
    settled = kept[2 * STEPS // 3 - 1 :]
    assert settled[0] != ones
    assert all(pattern == settled[0] for pattern in settled), "the selection is fixed while settling"
    assert kept_bins(trainer.model) == settled[0]


def test_the_log_holds_the_budget_the_tokens_and_every_loss(learned):
    trainer, _ = learned
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS // 2
    always = {"macs_target", "macs_realised", "pruning_phase", *(f"tokens_after_{layer}" for layer in range(4))}
    annealing = {"macs_expected", "distillation", "ranking", "soft_hard_gap"}
    for number, entry in enumerate(entries, start=1):
        expected = {"dense": set(), "anneal": annealing, "settle": {"distillation"}}
        phase, progress = top().schedule.at(2 * number - 1, STEPS)
        if phase == "anneal" and progress < 0.15:  # information is measured
            expected["anneal"] = annealing - {"macs_expected"}
        assert always <= entry.keys()
        assert annealing & entry.keys() == expected[phase]
        assert all(isinstance(entry[name], (int, float)) for name in (*always, *expected[phase]))
        assert 0 < entry["macs_realised"] <= 1
        tokens = [entry[f"tokens_after_{layer}"] for layer in range(4)]
        assert tokens == sorted(tokens, reverse=True)
        assert tokens[0] == 1, "the first layer drops nothing by default"


def test_the_numbers_reach_callbacks_that_were_given_before_ours(learned):
    trainer, recorder = learned
    heard = [entry for entry in recorder.logs if "loss" in entry]
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(heard) == len(kept) > 0
    for one, other in zip(heard, kept, strict=True):
        assert {**one, "step": other["step"]} == other


def test_the_target_only_ever_tightens(learned):
    targets = logged(learned[0], "macs_target")
    assert targets[0] == 1
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == 0.5


def test_the_budget_is_met_on_the_training_texts(learned):
    trainer, _ = learned
    share = spent_share(trainer.model, Texts())
    assert 0.45 < share < 0.51
    assert logged(trainer, "macs_realised")[-1] == pytest.approx(share, abs=0.01)


def test_the_main_loss_falls(learned):
    trainer, _ = learned
    losses = logged(trainer, "loss")
    dense = losses[0]
    settled = sum(losses[-3:]) / 3
    assert settled < 0.75 * dense
    assert trainer.evaluate()["eval_loss"] < 1.0  # guessing gives ln 3 = 1.099


def test_the_soft_and_the_hard_model_stay_close(learned):
    """Mean total variation distance of class probabilities; 0.14 was measured at the end of this run's annealing."""
    assert max(logged(learned[0], "soft_hard_gap")) < 0.25


def test_evaluation_is_hard_packed_and_deterministic(learned):
    trainer, _ = learned
    timing = ("runtime", "per_second", "preparation")
    first, second = (
        {key: value for key, value in trainer.evaluate().items() if not any(word in key for word in timing)} for _ in range(2)
    )
    assert first == second
    assert first["eval_macs_realised"] == pytest.approx(spent_share(trainer.model, Texts(32, seed=1)))


def test_evaluation_before_and_during_training_counts_its_own_texts_only(tmp_path):
    recorder, data = Recorder(look=lambda model: copy.deepcopy(model.state_dict())), Texts(32, seed=1)
    trainer = trainer_for(tmp_path, top(), eval_strategy="steps", eval_steps=6, logging_steps=3, callbacks=[recorder])
    whole = spent_share(trainer.model, data)
    assert trainer.evaluate()["eval_macs_realised"] == pytest.approx(whole)
    trainer.predict(Texts(8))
    trainer.train()
    heard = [entry["eval_macs_realised"] for entry in recorder.logs if "eval_loss" in entry]
    expected = [whole]
    for step in (6, 12):
        trainer.model.load_state_dict(recorder.looks[step - 1])
        expected.append(spent_share(trainer.model, data))
    assert heard == pytest.approx(expected)
    assert trainer.predict(data).metrics["test_loss"] == trainer.evaluate()["eval_loss"]


# Resume

RUNS = {
    "own teacher": lambda: {"method": top()},
    "no teacher": lambda: {"method": top(teacher=None)},
    "teacher model": lambda: {"method": top(teacher=build("bert", HEAD, seed=5))},
    "lagrangian": lambda: {"method": top(constraint="lagrangian")},
    "no ranking, accumulation": lambda: {
        "method": top(rank_weight=0.0), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    },
}  # fmt: skip
KILLS = [("own teacher", step) for step in (2, DENSE, 5, 6, ANNEAL, 10)]
KILLS += [(name, step) for name in list(RUNS)[1:] for step in ((6,) if name == "lagrangian" else (6, 10))]


def dropout_run(folder, name, resume=None):
    """48 texts are 6 steps an epoch, so that step 6 ends an epoch; the model has dropout."""
    torch.manual_seed(0)
    arguments = {"save_strategy": "steps", "save_steps": 1, "data": Texts(48), "model": build("bert", HEAD)}
    return trained(folder, resume=resume, **arguments, **RUNS[name]())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("run")
            runs[name] = folder, copy.deepcopy(dropout_run(folder, name).model.state_dict())
        return runs[name]

    return run


@pytest.mark.parametrize(("name", "step"), KILLS, ids=[f"{name} {step}" for name, step in KILLS])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, name, step):
    folder, expected = uninterrupted(name)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    if step > DENSE and (folder / "_teacher").exists():
        shutil.copytree(folder / "_teacher", tmp_path / "_teacher")
    resumed = dropout_run(tmp_path, name, resume=str(tmp_path / f"checkpoint-{step}"))
    assert len(resumed.state.log_history) > 0
    assert_same_state(resumed.model.state_dict(), expected)


def test_a_run_killed_just_after_its_teacher_was_written_resumes(uninterrupted, tmp_path):
    folder, expected = uninterrupted("own teacher")
    for name in (f"checkpoint-{DENSE}", "_teacher"):
        shutil.copytree(folder / name, tmp_path / name)
    before = written(tmp_path / "_teacher")
    resumed = dropout_run(tmp_path, "own teacher", resume=True)
    assert_same_state(resumed.model.state_dict(), expected)
    assert written(tmp_path / "_teacher") == before


def written(folder):
    """Which files there are, and when each was written."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_the_teacher_lies_beside_the_checkpoints_and_is_written_once(tmp_path):
    recorder = Recorder(look=lambda _: written(tmp_path / "_teacher") if (tmp_path / "_teacher").exists() else None)
    trainer = trained(tmp_path, save_strategy="steps", save_steps=1, callbacks=[recorder])
    assert recorder.looks[:DENSE] == [None] * DENSE
    assert recorder.looks[DENSE] is not None
    assert all(look == recorder.looks[DENSE] for look in recorder.looks[DENSE:])
    assert {file.name for file in tmp_path.iterdir()} == {"_teacher", *(f"checkpoint-{step}" for step in range(1, TOTAL + 1))}
    for step in range(1, TOTAL + 1):
        assert not (tmp_path / f"checkpoint-{step}" / "_teacher").exists()
    layers = [name for name in trainer.model.state_dict() if "layer.0.attention.self.query.weight" in name]
    assert len(layers) == 1, "the teacher's weights are no part of the model"
    dense = tp.pack(tp.detach(tp.from_pretrained(tmp_path / f"checkpoint-{DENSE}")))
    teacher = tp.from_pretrained(tmp_path / "_teacher")
    inputs = make_inputs("bert", HEAD)
    assert torch.equal(outputs_of(at_home(teacher), inputs)["logits"], outputs_of(at_home(dense), inputs)["logits"])


@pytest.mark.parametrize("what", ["gone", "another run's"])
def test_resuming_without_the_runs_own_teacher_is_refused(uninterrupted, tmp_path, what):
    folder, _ = uninterrupted("own teacher")
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    if what == "another run's":
        tp.pack(build("bert", HEAD, seed=9)).save_pretrained(tmp_path / "_teacher")
    with pytest.raises(tp.errors.TrainingError, match="teacher.*" + ("there is none" if what == "gone" else "another run")):
        dropout_run(tmp_path, "own teacher", resume=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("best", [6, 9])
def test_the_best_model_is_loaded_at_the_end(tmp_path, best):
    marks = iter([int(step == best) for step in (3, 6, 9, 12)])
    trainer = trained(
        tmp_path, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="mark", compute_metrics=lambda _: {"mark": next(marks)},
    )  # fmt: skip
    if trainer.state.best_model_checkpoint != str(tmp_path / f"checkpoint-{best}"):
        pytest.skip("this checkpoint is not eligible")
    inputs = make_inputs("bert", HEAD)
    checkpoint = at_home(tp.from_pretrained(tmp_path / f"checkpoint-{best}"))
    assert torch.equal(outputs_of(at_home(trainer.model.eval()), inputs)["logits"], outputs_of(checkpoint, inputs)["logits"])
    assert kept_bins(trainer.model) == kept_bins(checkpoint)


# Whoever computes the loss, and however it is accumulated


class Pull(Objective):
    """The smallest method there is: an auxiliary loss of 3 w, whatever the batch."""

    def losses(self, *_):
        return {"pull": 3 * self.pruner.training_state.w.sum()}

    def start_run(self, *_):
        pass


class PullMethod:
    teacher, schedule = None, Schedule(dense=0, anneal=1, settle=1)

    def attach(self, model):
        tp.attach(model, {1: tp.RankBins(4)})
        state = model.token_pruner.training_state = nn.Module()
        state.w = nn.Parameter(torch.zeros(()))
        model.token_pruner.objective = Pull(model, 0.0)
        return model.token_pruner.objective


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


def bce(outputs, labels, num_items_in_batch=None):
    return functional.binary_cross_entropy_with_logits(outputs.logits, labels, reduction="sum") / num_items_in_batch


def spans_of(_):
    return dict.fromkeys(("start_positions", "end_positions"), torch.arange(6) % 5)


def several_labels(_):
    return {"labels": torch.eye(3)[torch.arange(6) % 3]}


def some_labels(inputs):
    """As many labels as a text is long."""
    return {"labels": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)}


OTHER_LABELS = {  # head, labels, own loss
    "no labels by that name": ("ForQuestionAnswering", spans_of, None),
    "labels per token": ("ForTokenClassification", some_labels, None),
    "several labels": (HEAD, several_labels, None),
    "several labels, compute_loss_func": (HEAD, several_labels, bce),
}


def other_labels(case):
    head, make_labels, loss = OTHER_LABELS[case]
    overrides = {"problem_type": "multi_label_classification"} if make_labels is several_labels else {}
    return {
        "model": build("bert", head, **overrides),
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


class Checkpointing(TrainerCallback):
    """Activation checkpointing in the steps of one phase, and what survived the first three layers in each step."""

    def __init__(self, plan, phase, reentrant):
        self.plan, self.phase, self.reentrant, self.survived = plan, phase, reentrant, []

    def on_step_begin(self, _, state, __, model=None, **___):
        if self.plan.at(state.global_step, state.max_steps).phase == self.phase:
            model.activation_checkpointing_enable({"use_reentrant": self.reentrant})
        elif model.is_activation_checkpointing:
            model.activation_checkpointing_disable()

    def on_step_end(self, *_, model=None, **__):
        self.survived.append(sum(model.token_pruner.trace[2].survived) / sum(model.token_pruner.trace[0].entered))


def checkpointed_run(folder, phase, reentrant=False):
    """Gates of high rate, so that some of the anneal phase drop tokens."""
    plan = Schedule(dense=1, anneal=2, settle=1)
    look = Checkpointing(plan, phase, reentrant)
    model = build("bert", HEAD)
    trainer = trained(folder, top(schedule=plan, gate_lr=2.0), max_steps=8, learning_rate=1e-4, model=model, callbacks=[look])
    return trainer.model.state_dict(), look.survived


@pytest.fixture(scope="module")
def without_checkpointing(tmp_path_factory):
    torch.manual_seed(0)
    state, survived = checkpointed_run(tmp_path_factory.mktemp("plain"), "none")
    assert survived[:2] == [1, 1]
    assert min(survived[2:6]) < 1, "annealing drops tokens"
    assert max(survived[6:]) < 1, "settling drops tokens"
    return state


@pytest.mark.parametrize("phase", ["dense", "anneal", "settle"])
def test_activation_checkpointing_changes_nothing(tmp_path, without_checkpointing, phase):
    state, _ = checkpointed_run(tmp_path, phase)
    assert_same_state(state, without_checkpointing)


def test_reentrant_checkpointing_changes_nothing_or_is_refused(tmp_path):
    """It runs the first forward without gradients, so that nothing reaches the gates but through the layer's own output."""
    asked = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    try:
        state = trained(tmp_path, model=build("bert", HEAD), **asked).model.state_dict()
    except tp.errors.TrainingError:
        return
    assert_same_state(state, trained(tmp_path, model=build("bert", HEAD)).model.state_dict())


def test_bf16_trains_and_drops_tokens(tmp_path):
    trainer = trained(tmp_path, bf16=True)
    assert logged(trainer, "tokens_after_2")[-1] < 0.6
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("way", ["label smoothing", "compute_loss_func", "compute_loss from logits"])
def test_gates_learn_and_the_budget_is_met_whoever_computes_the_loss(tmp_path, way, constraint):
    trainer = trained(tmp_path, top(constraint=constraint), **WAYS[way])
    assert bool(logged(trainer, "lagrangian")) == (constraint == "lagrangian")
    objective = trainer.model.token_pruner.objective
    assert any(parameter.abs().max() > 0 for parameter in objective.parameters()), "gates have moved"
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


class GatesOf(TrainerCallback):
    """How far the log-odds of all gates are from where they start, before the first step and after each."""

    def __init__(self):
        self.values = []

    def on_train_begin(self, *_, model=None, **__):
        self.values = [self.read(model)]

    def on_step_end(self, *_, model=None, **__):
        self.values.append(self.read(model))

    @staticmethod
    def read(model):
        gates = model.token_pruner.objective.gates
        return (gates.learned() - gates.state.start).detach().flatten()


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("learning_rate", [1e-3, 1e-5])
def test_gates_move_at_their_own_rate(tmp_path, learning_rate, constraint):
    """Adam's step is its learning rate where the first gradient came in the first step, about 0.6 of it where it came later."""
    look = GatesOf()
    plan = Schedule(dense=0, anneal=1, settle=0)
    trained(
        tmp_path, top(schedule=plan, gate_lr=0.05, constraint=constraint), max_steps=6, lr_scheduler_type="constant",
        learning_rate=learning_rate, callbacks=[look],
    )  # fmt: skip
    first = []
    for before, after in zip(look.values, look.values[1:], strict=False):
        moved = (after - before).abs()[before == look.values[0]]
        first.append(moved[moved > 0])
    first = torch.cat(first)
    assert (first > 0.4 * 0.05).sum() > 4
    assert first.max() < 1.02 * 0.05


def test_clipping_is_not_dominated_by_the_gates(tmp_path):
    look = GradientOf()
    trained(tmp_path, callbacks=[look])
    assert all(own < 0.5 * every for own, every in look.norms)


# What a user may do, and may not


def test_a_callback_added_late_is_refused(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.add_callback(tp.TokenPruneCallback(top()))
    with pytest.raises(tp.errors.TrainingError, match="add_callback"):
        trainer.train()


def test_an_optimizer_made_before_the_gates_is_refused(tmp_path):
    model = build("bert", HEAD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = trainer_for(tmp_path, top(), model=model, optimizers=(optimizer, None))
    with pytest.raises(tp.errors.TrainingError, match="optimizer was made before the gates"):
        trainer.train()


def test_an_optimizer_made_after_attach_works(tmp_path):
    model, callback = build("bert", HEAD), tp.TokenPruneCallback(top())
    assert callback.attach(model) is model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=(optimizer, None))
    trainer.train()
    assert any(parameter.abs().max() > 0 for parameter in callback.objective.parameters()), "gates have moved"
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_model_init_without_attach_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, top(), model_init=lambda: build("bert", HEAD))
    with pytest.raises(tp.errors.TrainingError, match="model_init"):
        trainer.train()


def test_model_init_with_attach_works_again_and_again(tmp_path):
    callback = tp.TokenPruneCallback(top())
    trainer = trainer_for(tmp_path, callbacks=[callback], model_init=lambda: callback.attach(build("bert", HEAD)))
    trainer.train()
    first = trainer.model
    assert 0.45 < spent_share(first, Texts()) < 0.51
    trainer.train()
    assert trainer.model is not first
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_training_once_more_starts_over(tmp_path):
    recorder = Recorder(look=kept_bins)
    trainer = trained(tmp_path, callbacks=[recorder])
    trainer.train()
    assert recorder.looks[TOTAL] == [[1] * 8] * 2, "the second run is dense at first"
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_columns_that_the_model_does_not_know_are_dropped_as_ever(tmp_path):
    rows = [Texts(16)[row] for row in range(16)]
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist(), "labels": row["labels"], "text": "no"} for row in rows])
    trained(tmp_path, data=data.with_format("torch"), max_steps=3)


@pytest.mark.parametrize("method", [None, "top", 0.4, tp.ToP])
def test_something_that_is_no_method_is_refused(method):
    with pytest.raises(tp.errors.TrainingError, match="give it a method"):
        tp.TokenPruneCallback(method)


WRONG = [
    ("target_macs", value) for value in (0, 1, -0.1, 1.5, float("nan"), float("inf"), True, "0.4")
] + [
    *(("sites", value) for value in ((), (-1,), ("1",), (1.0,), (True,), "12", 1)),
    *((name, value) for name in ("rank_bins", "rank_topk") for value in (1, 0, -5, 2.0, True, "8", None)),
    *((name, value) for name in ("rank_weight", "distill_weight") for value in (-1, float("nan"), float("inf"), "1", None)),
    *(("constraint", value) for value in (None, "none", 1)),
    *(("gate_lr", value) for value in (0, -1, float("nan"), float("inf"), "1")),
    *(("teacher", value) for value in ("", 3)),
    *(("schedule", value) for value in (None, (1, 2, 1), {"dense": 1})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}" for name, value in WRONG])
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(tp.errors.ConfigError, match=name):
        tp.ToP(**{"target_macs": 0.4, name: value})


def test_a_method_without_a_budget_is_refused(tmp_path):
    with pytest.raises(tp.errors.ConfigError, match="needs a budget"):
        trainer_for(tmp_path, top(target_macs=None))


def test_a_budget_out_of_reach_names_one_that_is_not(tmp_path):
    with pytest.raises(tp.errors.ConfigError, match=r"target_macs=0\.1") as caught:
        trainer_for(tmp_path, top(target_macs=0.1))
    shares = [word for word in str(caught.value).split() if word.replace(".", "").isdigit()]
    assert len(shares) == 1
    trainer_for(tmp_path, top(target_macs=float(shares[0])))
    with pytest.raises(tp.errors.ConfigError, match="out of reach"):
        trainer_for(tmp_path, top(target_macs=float(shares[0]) - 0.01))


@pytest.mark.parametrize("site_gates", [False, True])
def test_information_never_rises_with_the_rank_within_a_site(site_gates):
    model = build("bert", HEAD)
    tp.TokenPruneCallback(top(sites=(1, 2), rank_bins=5, site_gates=site_gates)).attach(model)
    (bins,) = model.token_pruner.objective.gates.parts
    found = bins.even_out(torch.tensor([[1.0, 0, 4, 2, 3, *[9] * site_gates], [5, 0, 0, 3, 0, *[0] * site_gates]]).flatten())
    expected = [[2.0] * 5, [5.0, 1, 1, 1, 0]]
    for row, wanted in zip(found.view(2, -1), expected, strict=True):
        torch.testing.assert_close(row[:5], torch.tensor(wanted))
    assert found.view(2, -1)[:, 5:].flatten().tolist() == [9.0, 0.0] * site_gates


MET = {
    "tokens": (top(target_macs=0.95), "ToP: target_macs=0.95 is met already"),
    "after a dense phase": (top(target_macs=0.95, schedule=tp.Schedule()), "ToP: target_macs=0.95 is met already"),
    "lagrangian": (top(target_macs=0.95, constraint="lagrangian"), "ToP: target_macs=0.95 is met already"),
    "both": (
        tp.Compose(tp.StructuredPruning(), tp.ToP(), target_macs=0.95, teacher=None), "Compose: target_macs=0.95 is met already"
    ),
    "static phase": (tp.InforCoef(static_macs=0.95, target_macs=0.6, teacher=None), "InforCoef: static_macs=0.95 is met already"),
    "not met": (top(target_macs=0.5), None),
}  # fmt: skip


@pytest.mark.parametrize("what", MET)
def test_a_budget_that_is_met_already_is_told_once(tmp_path, caplog, what):
    method, said = MET[what]
    trainer_for(tmp_path, method).train()
    found = [record.message for record in caplog.records if "met already" in record.message]
    assert len(found) == (said is not None)
    assert all(message.startswith(said) for message in found)


def test_parameters_that_have_gone_already_are_told(tmp_path, caplog):
    def run(share, model=None):
        method = tp.StructuredPruning(target_params=share, teacher=None, schedule=tp.Schedule(dense=0))
        trainer = trainer_for(tmp_path, method, **({} if model is None else {"model": model}))
        trainer.train()
        return trainer

    run(0.5).save_model(tmp_path / "cut")
    assert "met already" not in caplog.text
    run(0.9, tp.from_pretrained(tmp_path / "cut"))
    assert "StructuredPruning: target_params=0.9 is met already" in caplog.text
    assert "of the dense model's parameters" in caplog.text


REFUSED = {
    "out of reach": (top(target_macs=0.1), {}),
    "no such layer": (top(sites=(9,)), {}),
    "too few layers": (top(), {"num_hidden_layers": 2}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_method_leaves_the_model_as_it_was(tmp_path, what):
    method, overrides = REFUSED[what]
    model = build("bert", HEAD, **overrides)
    before = (type(model), list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation)
    with pytest.raises(tp.errors.ConfigError):
        trainer_for(tmp_path, method, model=model)
    assert (type(model), list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation) == before


# Teachers


def trace_of(model):
    """Whatever a teacher could have been changed in."""
    hooks = [(name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    config = (model.config.to_dict(), model.config._attn_implementation)
    return type(model), hooks, flags, modes, config, {key: value.clone() for key, value in model.state_dict().items()}


TEACHERS = ("folder", "pruned folder", "Path", "model", "bigger model", "pruned model", "None")


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_may_be_given(tmp_path, kind):
    teacher = build("bert", HEAD, seed=3, num_hidden_layers=5 if kind == "bigger model" else 4).train()
    if "pruned" in kind:
        tp.attach(teacher, {1: tp.TopK(0.2)})
    given = teacher
    if "folder" in kind or kind == "Path":
        teacher.save_pretrained(tmp_path / "given")
        given = tmp_path / "given" if kind == "Path" else str(tmp_path / "given")
    elif kind == "None":
        given = None
    before = trace_of(teacher)
    trainer = trained(tmp_path / "run", top(teacher=given), max_steps=6)
    assert bool(logged(trainer, "distillation")) == (given is not None)
    assert bool(logged(trainer, "ranking")) == (given is not None)
    assert not (tmp_path / "run" / "_teacher").exists(), "only the run's own teacher has to be kept"
    after = trace_of(teacher)
    assert after[:-1] == before[:-1]
    assert_same_state(after[-1], before[-1])
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_a_teacher_judges_with_every_token(tmp_path):
    """The same weights teach the same, whether they come dense or with sites."""
    losses = []
    for sites in ({}, {1: tp.TopK(0.2)}):
        teacher = tp.attach(build("bert", HEAD, seed=3), sites)
        losses.append(logged(trained(tmp_path, top(teacher=teacher)), "distillation"))
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_after_training_the_teacher_is_let_go(tmp_path):
    trainer = trained(tmp_path)
    assert trainer.model.token_pruner.objective.teacher is None


# Heads


CLASSES, NUMBERS, PAIRS = torch.arange(6) % 3, torch.arange(6) / 6, torch.arange(12).view(6, 2) / 6


def real_tokens(inputs, chosen):
    """A label for each real token that is chosen, -100 for the others."""
    ids = inputs["input_ids"]
    return {"labels": torch.where(inputs["attention_mask"].bool() & chosen(ids), ids, -100)}


def some_words(inputs):
    return real_tokens(inputs, lambda ids: ids % 4 == 1)


def spans(inputs):
    length = inputs["attention_mask"].sum(1)
    return {"start_positions": length // 3, "end_positions": length // 2}


HEADS = {
    "classification": ("bert", HEAD, {}, lambda _: {"labels": CLASSES}),
    "multi-label": ("bert", HEAD, {"problem_type": "multi_label_classification"}, lambda _: {"labels": torch.eye(3)[CLASSES]}),
    "regression": ("bert", HEAD, {"num_labels": 1, "problem_type": "regression"}, lambda _: {"labels": NUMBERS}),
    "regression by num_labels": ("bert", HEAD, {"num_labels": 1}, lambda _: {"labels": NUMBERS}),
    "two regressions": ("bert", HEAD, {"num_labels": 2, "problem_type": "regression"}, lambda _: {"labels": PAIRS}),
    "tokens": ("bert", "ForTokenClassification", {}, some_labels),
    "question": ("bert", "ForQuestionAnswering", {}, spans),
    "choice": ("bert", "ForMultipleChoice", {}, lambda _: {"labels": CLASSES % 2}),
    "masked words": ("modernbert", "ForMaskedLM", {}, some_words),
    "tied masked words": ("bert", "ForMaskedLM", {}, some_words),
    **{name: (name, class_head(name), {}, lambda _: {"labels": CLASSES}) for name in FAMILIES if name != "bert"},
    "last tokens": ("qwen3", "ForTokenClassification", {}, some_labels),
}


@pytest.mark.filterwarnings("ignore:.*num_labels=1.*")
@pytest.mark.parametrize("what", HEADS)
def test_every_head_trains_prunes_and_opens_again(tmp_path, what):
    name, head, overrides, make_labels = HEADS[what]
    data = Rows(name, head, make_labels)
    recorder = Recorder(look=lambda model: [sum(layer.survived) for layer in model.token_pruner.trace])
    arguments = {"data": data, "data_collator": stack, "max_steps": 6, "logging_steps": 1, "callbacks": [recorder]}
    trainer = trained(tmp_path / "run", top(target_macs=0.7), model=build(name, head, **overrides), **arguments)
    numbers = [value for entry in trainer.state.log_history for value in entry.values()]
    assert torch.tensor(numbers).isfinite().all()
    assert min(logged(trainer, "distillation")[1:]) > 0
    assert len(logged(trainer, "soft_hard_gap")) == 2
    assert max(logged(trainer, "soft_hard_gap")) > 0
    dense, *_, settled = recorder.looks
    assert dense[2] == dense[0]
    assert settled[2] < settled[0]
    trainer.save_model(str(tmp_path / "saved"))
    inputs = make_inputs(name, head)
    found = outputs_of(at_home(tp.from_pretrained(tmp_path / "saved")), inputs)
    for key, value in outputs_of(at_home(trainer.model.eval()), inputs).items():
        assert torch.equal(found[key], value), key


def test_a_regression_is_distilled_whoever_computes_the_loss(tmp_path):
    """Where the Trainer hands over no labels, the model's config does not say that its one output is a regression."""
    trainer = trained(
        tmp_path, model=build("bert", HEAD, num_labels=1), data=Rows("bert", HEAD, lambda _: {"labels": torch.arange(6) / 6}),
        data_collator=stack, compute_loss_func=lambda outputs, labels, **_: functional.mse_loss(outputs.logits[:, 0], labels),
    )  # fmt: skip
    assert logged(trainer, "distillation")[-1] > 0


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


@pytest.mark.parametrize("phase", [1, 5, 10])
def test_a_forward_in_training_mode_without_gradients_works(phase):
    callback = tp.TokenPruneCallback(top(teacher=None))
    model = callback.attach(build("bert", HEAD)).train()
    callback.objective.moment = top().schedule.at(phase, TOTAL)
    with torch.no_grad():
        assert model(**make_inputs("bert", HEAD)).logits.isfinite().all()


OTHERS = {
    "another method": (lambda: tp.StructuredPruning(target_macs=0.5), "name was 'top' and is 'structured'"),
    "another importance": (lambda: top(importance="learned", rank_weight=0.0), "importance was 'attention' and is 'learned'"),
    "other bins": (lambda: top(rank_bins=9), "rank_bins was 8 and is 9"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("asked", [True, "path"])
def test_a_run_is_resumed_with_the_method_it_began_with(tmp_path, what, asked):
    trainer_for(tmp_path, top(), max_steps=4, save_strategy="steps", save_steps=2).train()
    make, why = OTHERS[what]
    trainer = trainer_for(tmp_path, make(), max_steps=6)
    with pytest.raises(tp.errors.TrainingError, match=why):
        trainer.train(resume_from_checkpoint=asked if asked is True else str(tmp_path / "checkpoint-4"))


def test_a_budget_that_changes_on_resuming_is_told(tmp_path, caplog):
    trainer_for(tmp_path, top(), max_steps=4, save_strategy="steps", save_steps=2).train()
    trainer = trainer_for(tmp_path, top(target_macs=0.6), max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert "target_macs (was 0.5, is 0.6)" in caplog.text
    assert trainer.state.global_step == 6
