"""The callback: one `trainer.train()` goes dense -> anneal -> settle, whatever the head; what it logs and evaluates; checkpointing of
activations changes nothing, bf16 works."""

import copy

import pytest
import torch
from families import FAMILIES, build, class_head, make_inputs, outputs_of
from training_helpers import (
    GatesOf,
    Recorder,
    Rows,
    Texts,
    assert_same_state,
    at_home,
    kept_bins,
    logged,
    no_dropout,
    some_labels,
    some_words,
    spent_share,
    stack,
    top,
    trained,
    trainer_for,
)
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.schedule import Schedule

HEAD = "ForSequenceClassification"
TOTAL = 12  # steps of a run


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
    spent = spent_share(trainer.model, Texts(32, seed=1))
    spent_share(trainer.model, Texts(96, lengths=(4, 5)))  # whoever uses the model in between is no part of it
    assert trainer.evaluate()["eval_macs_realised"] == first["eval_macs_realised"] == pytest.approx(spent)


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


# Activation checkpointing, precision


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


def test_checkpointing_that_does_not_say_which_is_reentrant(tmp_path):
    asked = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": False}}
    with pytest.raises(tp.errors.TrainingError, match="use_reentrant"):
        trained(tmp_path, model=build("bert", HEAD), **asked)


def test_bf16_trains_and_drops_tokens(tmp_path):
    trainer = trained(tmp_path, bf16=True)
    assert logged(trainer, "tokens_after_2")[-1] < 0.6
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# Gates


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


@pytest.mark.parametrize("forgets", [True, False])
def test_nothing_is_measured_where_the_optimizer_forgets_nothing(forgets):
    objective = top().attach(build("bert", HEAD))
    objective.forgets, objective.moment = forgets, top().schedule.at(4, TOTAL)
    objective.start_run(1e-3, {"anneal": 4})
    objective.open_gates()
    assert objective.gates.measuring == forgets
    assert (objective.gates.now is None) == forgets, "gates are sampled from the first step on"


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


# Heads


CLASSES, NUMBERS, PAIRS = torch.arange(6) % 3, torch.arange(6) / 6, torch.arange(12).view(6, 2) / 6


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


def test_logits_of_masked_words_alone_are_distilled_as_those_of_all(tmp_path):
    """ModernBERT's `sparse_prediction`: no logits where there is no label. Nothing else counts in distillation anyway."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = build("modernbert", "ForMaskedLM", sparse_prediction=sparse, **no_dropout("modernbert"))
        data = Rows("modernbert", "ForMaskedLM", some_words)
        found.append(trained(tmp_path, model=model, data=data, data_collator=stack, logging_steps=1))
    dense, sparse = (logged(trainer, "distillation") for trainer in found)
    assert sparse == pytest.approx(dense, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("phase", [1, 5, 10])
def test_a_forward_in_training_mode_without_gradients_works(phase):
    callback = tp.TokenPruneCallback(top(teacher=None))
    model = callback.attach(build("bert", HEAD)).train()
    callback.objective.moment = top().schedule.at(phase, TOTAL)
    with torch.no_grad():
        assert model(**make_inputs("bert", HEAD)).logits.isfinite().all()


def test_tokens_that_the_user_protects_count_towards_the_budget(tmp_path):
    """A third of all tokens is protected, in each text another number."""
    model = tp.attach(build("bert", HEAD), protected_token_ids=list(range(20, 53)))
    trainer = trained(tmp_path, top(target_macs=0.7), model=model, max_steps=18)
    assert 0.6 < spent_share(trainer.model, Texts()) < 0.71


@pytest.mark.parametrize("logs", [{"logging_steps": 2}, {"logging_strategy": "no"}])
def test_a_budget_that_bins_cannot_meet_is_told(tmp_path, caplog, logs):
    """Of 50 bins, texts of 4 droppable tokens meet 4."""
    data = {"data": Texts(96, lengths=(5, 5)), "max_steps": 24, **logs}
    method = {"target_macs": 0.4, "importance": "learned", "rank_weight": 0.0}
    trainer = trained(tmp_path, top(rank_bins=50, **method), **data)
    assert spent_share(trainer.model, data["data"]) > 0.42
    assert "more than the 0.4 asked for" in caplog.text
    caplog.clear()
    trainer = trained(tmp_path, top(rank_bins=4, **method), **data)
    assert spent_share(trainer.model, data["data"]) < 0.42
    assert "asked for" not in caplog.text


@pytest.mark.parametrize("every", [1, 4, 5, 1000])
def test_the_last_log_says_what_was_asked_for_and_what_was_reached(tmp_path, every):
    """What was spent before the choice was made is no part of it, wherever the logs begin and end."""
    recorder = Recorder()
    trainer = trained(tmp_path, top(), logging_steps=every, callbacks=[recorder])
    last = trainer.state.log_history[-1]
    of_others = trainer.evaluate(Texts(8, seed=1), metric_key_prefix="train")["train_macs_realised"]
    assert of_others == pytest.approx(spent_share(trainer.model, Texts(8, seed=1)))
    assert last["train_macs_target"] == 0.5
    assert last["train_macs_realised"] == pytest.approx(spent_share(trainer.model, Texts()), abs=0.005)
    assert {**recorder.logs[-2], "step": last["step"]} == last


def test_a_run_that_ends_before_the_budget_is_met_has_reached_nothing(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
            control.should_training_stop = state.global_step == 5

    trainer = trained(tmp_path, top(), callbacks=[Stop()])
    assert trainer.state.global_step == 5
    assert not any("train_macs" in name for name in trainer.state.log_history[-1])
