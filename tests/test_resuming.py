"""Invariant 9: a run that was killed resumes exactly, with its own teacher and the method it began with."""

import copy
import shutil

import pytest
import torch
from families import build, make_inputs, outputs_of
from training_helpers import (
    Recorder,
    Texts,
    assert_same_state,
    at_home,
    kept_bins,
    put_checkpoint,
    spent_share,
    top,
    trained,
    trainer_for,
)

import hf_tokenprune as tp

HEAD = "ForSequenceClassification"
DENSE, ANNEAL, TOTAL = 4, 8, 12  # where the phases of `top()` end in a run of 12 steps


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
    resumed = dropout_run(tmp_path, name, put_checkpoint(folder, tmp_path, step, dense=DENSE))
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
    first = tmp_path / "checkpoint-9"  # that meets the budget
    assert trainer.state.best_model_checkpoint == str(first)
    inputs = make_inputs("bert", HEAD)
    checkpoint = at_home(tp.from_pretrained(first))
    assert torch.equal(outputs_of(at_home(trainer.model.eval()), inputs)["logits"], outputs_of(checkpoint, inputs)["logits"])
    assert kept_bins(trainer.model) == kept_bins(checkpoint)


OTHERS = {
    "another method": (lambda: tp.StructuredPruning(target_macs=0.5), "name was 'top' and is 'structured'"),
    "another importance": (lambda: top(importance="learned", rank_weight=0.0), "importance was 'attention' and is 'learned'"),
    "other bins": (lambda: top(rank_bins=9), "rank_bins was 8 and is 9"),
    "a schedule by which it has settled": (
        lambda: top(schedule=tp.Schedule(dense=1, anneal=0.5, settle=1.5)),
        "schedule was .* and is",
    ),
    "another pace of the gates, which was set at the start": (lambda: top(gate_lr=0.05), "gate_lr was None and is 0.05"),
    "no layer-wise distillation": (lambda: top(layer_weight=0.0), "layer_weight was 1.0 and is 0.0"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("asked", [True, "path"])
def test_a_run_is_resumed_with_the_method_it_began_with(tmp_path, what, asked):
    trainer_for(tmp_path, top(), max_steps=6, save_strategy="steps", save_steps=3).train()
    shutil.rmtree(tmp_path / "checkpoint-6")  # as if it had been killed while annealing
    make, why = OTHERS[what]
    trainer = trainer_for(tmp_path, make(), max_steps=6)
    with pytest.raises(tp.errors.TrainingError, match=why):
        trainer.train(resume_from_checkpoint=asked if asked is True else str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["whole", "save_only_model"])
def test_a_checkpoint_of_a_run_without_the_callback_is_none_of_ours(tmp_path, alone, packed):
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_only_model": alone}
    model = tp.pack(build("bert", HEAD)) if packed else build("bert", HEAD)
    trainer_for(tmp_path, model=model, **arguments).train()
    trainer = trainer_for(tmp_path, top(), **arguments)
    with pytest.raises(tp.errors.TrainingError, match=r"checkpoint-6 is of a run without .*Schedule\(dense=0\)"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert spent_share(trainer.model, Texts()) < 0.51


def test_a_budget_that_changes_on_resuming_is_told(tmp_path, caplog):
    trainer_for(tmp_path, top(), max_steps=6, save_strategy="steps", save_steps=3).train()
    trainer = trainer_for(tmp_path, top(target_macs=0.6), max_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "target_macs (was 0.5, is 0.6)" in caplog.text
    assert trainer.state.global_step == 6


def phases_after(step, trainer):
    return [entry["pruning_phase"] for entry in trainer.state.log_history if entry["step"] > step and "pruning_phase" in entry]


def test_a_finished_run_that_is_made_longer_settles_on(tmp_path, caplog):
    trainer_for(tmp_path, top(), save_strategy="steps", save_steps=4, logging_steps=1).train()
    longer = trainer_for(tmp_path, top(), max_steps=16)
    before = kept_bins(longer.model)
    longer.train(resume_from_checkpoint=True)
    assert "was begun for 12 steps and now has 16" in caplog.text
    assert phases_after(12, longer) == [3] * 4
    assert kept_bins(longer.model) != before
    assert spent_share(longer.model, Texts()) < 0.51


def test_a_run_that_is_made_longer_keeps_its_phases(tmp_path):
    trainer_for(tmp_path, top(), save_strategy="steps", save_steps=1, logging_steps=1).train()
    longer = trainer_for(tmp_path, top(), max_steps=24)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert phases_after(6, longer) == [2] * 2 + [3] * 16


def test_a_run_that_would_end_before_its_budget_is_met_is_refused(tmp_path):
    trainer_for(tmp_path, top(), max_steps=24, save_strategy="steps", save_steps=6).train()
    shorter = trainer_for(tmp_path, top(), max_steps=12)
    with pytest.raises(tp.errors.TrainingError, match="begun for 24 steps, of which the last phase begins with step 16"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_budget_cannot_change_once_the_choice_is_made(tmp_path):
    trainer_for(tmp_path, top(), save_strategy="steps", save_steps=10).train()
    trainer = trainer_for(tmp_path, top(target_macs=0.6))
    with pytest.raises(tp.errors.TrainingError, match="chosen by target_macs already"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
