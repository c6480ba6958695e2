"""The optimizer survives surgery, and a run that was killed before or after it resumes exactly."""

import pytest
import torch
from families import outputs_of
from training_helpers import assert_same_state, at_home, logged, put_checkpoint, trained
from weights_helpers import (
    BOTH,
    DENSE_SIZES,
    INPUTS,
    METHODS,
    NARROW,
    TOTAL,
    OptimizerOf,
    both,
    dropout_run,
    uninterrupted_runs,
    weights,
)

import hf_tokenprune as tp
from hf_tokenprune.methods import structured as module
from hf_tokenprune.modeling.sizes import sizes_of

RESUMED = {
    "narrow": METHODS["narrow"],
    "both": lambda: both(parts=NARROW),
    "learned": lambda: both(parts=NARROW, tokens=tp.ToP(rank_bins=8)),
    "weights, lagrangian": METHODS["lagrangian"],
    "no teacher": lambda: weights(teacher=None),
}
KILLS = [("narrow", step) for step in (2, 4, 5, 8, 11, 12, 14)] + [
    (name, step) for name in BOTH for step in (2, 4, 5, 8, 12, 14)
]
KILLS += [("weights, lagrangian", 8), ("weights, lagrangian", 12), ("no teacher", 12), ("no teacher", 14)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return uninterrupted_runs(tmp_path_factory, RESUMED, TOTAL)


@pytest.mark.parametrize(("name", "step"), KILLS, ids=[f"{name} {step}" for name, step in KILLS])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, name, step):
    folder, model, _ = uninterrupted(name)
    resumed = dropout_run(tmp_path, RESUMED[name](), put_checkpoint(folder, tmp_path, step))
    assert len(logged(resumed, "loss")) == 4
    assert_same_state(resumed.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["narrow", *BOTH])
def test_the_resumed_runs_lose_hidden_units(uninterrupted, name):
    assert sizes_of(uninterrupted(name)[1])[0] < 32


@pytest.mark.parametrize("name", ["narrow", *BOTH])
@pytest.mark.parametrize("step", [8, 11, 12, 14, TOTAL])
def test_a_checkpoint_opens_as_the_model_that_was_training(uninterrupted, name, step):
    """Before surgery with all of its weights and no gates, after it cut."""
    folder, model, words = uninterrupted(name)
    opened = at_home(tp.from_pretrained(folder / f"checkpoint-{step}"))
    gated, plain = words[step - 1]
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], plain)
    if step < 12:
        assert sizes_of(opened) == DENSE_SIZES
        assert "shapes" not in opened.config.token_pruning
        assert not torch.equal(gated, plain)
    else:
        assert sizes_of(opened) == sizes_of(model) != DENSE_SIZES
    assert opened.config.token_pruning["method"]["name"] == ("structured" if name == "narrow" else "compose")


def test_the_same_trainer_goes_back_to_a_checkpoint_as_small_as_its_model_and_to_no_larger_one(tmp_path):
    trainer = dropout_run(tmp_path, METHODS["narrow"]())
    expected = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert_same_state(trainer.model.state_dict(), expected)
    with pytest.raises(tp.errors.ConfigError, match=r"larger model.*make the model and the Trainer anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("name", ["narrow", "weights", "both, narrow"])
def test_a_model_opened_from_a_checkpoint_that_was_cut_does_not_resume_it(tmp_path, name):
    """Whether hidden units have gone, or whole layers; with its sites, the method refuses it at once."""
    make, message = METHODS.get(name), "run began with .* gates, .*make the model and the Trainer anew"
    if make is None:
        make, message = (lambda: both(parts=NARROW)), "To resume a run, make the model as it was"
    dropout_run(tmp_path, make(), save_steps=14)
    checkpoint = tmp_path / "checkpoint-14"
    with pytest.raises(tp.errors.ConfigError, match=message):
        trained(tmp_path, make(), str(checkpoint), model=tp.from_pretrained(checkpoint), max_steps=TOTAL)


@pytest.mark.parametrize("best", [8, 14])
def test_the_best_model_at_the_end_is_one_that_is_cut(tmp_path, best):
    marks = iter([int(step == best) for step in range(2, TOTAL + 1, 2)])
    trainer = dropout_run(
        tmp_path, weights(), eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="mark", compute_metrics=lambda _: {"mark": next(marks)},
    )  # fmt: skip
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert step == (14 if best == 14 else 12), "the first one that meets the budget, or a better one after it"
    opened = at_home(tp.from_pretrained(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(outputs_of(at_home(trainer.model.eval()), INPUTS)["logits"], outputs_of(opened, INPUTS)["logits"])


# The optimizer


OPTIMIZERS = [("adamw_torch", name) for name in ("weights", "narrow", "both")] + [("sgd", "weights"), ("adafactor", "narrow")]


@pytest.mark.parametrize(("optimizer", "name"), OPTIMIZERS, ids=map(" ".join, OPTIMIZERS))
def test_the_optimizer_survives_surgery(tmp_path, optimizer, name):
    look = OptimizerOf()
    trained(tmp_path, METHODS[name](), callbacks=[look], max_steps=TOTAL, optim=optimizer)
    held, kept, numbers = zip(*look.counts, strict=True)
    assert held[11] <= held[10]
    assert numbers[11] < 0.9 * numbers[10]
    assert held[11:] == (held[11],) * 5
    assert kept[-1] in (0 if optimizer == "sgd" else held[-1], held[-1])


def test_moments_are_cut_like_their_weights(tmp_path, monkeypatch):
    """Moments that are made equal to the weights just before surgery are equal to them just after it."""
    seen = []

    def operation(objective, optimizer, **left):
        for parameter, state in optimizer.state.items():
            state["exp_avg"] = parameter.detach().clone()
        cut_weights(objective, optimizer, **left)
        seen.extend((parameter, state["exp_avg"]) for parameter, state in optimizer.state.items())
        assert all(torch.equal(parameter, moment) for parameter, moment in seen)
        assert all(parameter.grad is None for parameter in objective.model.parameters())

    cut_weights = module.cut_weights
    monkeypatch.setattr(module, "cut_weights", operation)
    trained(tmp_path, METHODS["narrow"](), max_steps=TOTAL)
    assert len({parameter for parameter, _ in seen}) > 50
