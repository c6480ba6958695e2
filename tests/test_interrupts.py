"""Invariant 9, where it hurts: whenever a run ends by force or by a full disk, a complete checkpoint is there and resumes exactly."""

import contextlib
import copy
import inspect
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import build, make_inputs, outputs_of
from safetensors import SafetensorError
from training_helpers import Texts, top, trainer_for
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

import hf_tokenprune as tp
from hf_tokenprune.checkpoints import STATE, is_complete, set_aside_incomplete
from hf_tokenprune.modeling.architectures import find_encoder
from hf_tokenprune.modeling.calls import active

HEAD = "ForSequenceClassification"
STEPS, DENSE = 12, 4
STAGES = tp.Schedule(dense=1, static=1, anneal=1, settle=1)
METHODS = {
    "tokens": top,
    "weights": lambda: tp.StructuredPruning(
        target_macs=0.3, parts=("hidden", "heads", "units"), schedule=tp.Schedule(dense=1, anneal=1, settle=1)
    ),
    "stages": lambda: tp.InforCoef(static_macs=0.5, target_macs=0.3, schedule=STAGES),
}


def trainer_of(folder, name, callbacks=()):
    """A run with dropout that saves after each step and keeps three checkpoints."""
    torch.manual_seed(0)
    return trainer_for(
        folder, METHODS[name](), model=build("bert", HEAD), data=Texts(48), callbacks=callbacks, max_steps=STEPS,
        save_strategy="steps", save_steps=1, save_total_limit=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs come to that nobody disturbs: the end of each, and its folder."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("whole")
            trainer = trainer_of(folder, name)
            trainer.train()
            done[name] = folder, copy.deepcopy(trainer.model.state_dict())
        return done[name]

    return run


def checkpoints(folder):
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def resume(folder, name):
    """As a script does that is simply started again."""
    resumes = get_last_checkpoint(folder) is not None
    trainer = trainer_of(folder, name)
    begun = []
    trainer.add_callback(Begin(begun))
    trainer.train(resume_from_checkpoint=resumes)
    return trainer, begun[0]


class Begin(TrainerCallback):
    """Notes at which step training begins."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, _args, state, _control, **_):
        self.steps.append(state.global_step)


def assert_resumes_exactly(folder, name, whole, caplog):
    """The newest complete checkpoint is where it goes on, and the end is that of the undisturbed run. Returns whether there was
    half a checkpoint."""
    before = {path.name: is_complete(path) for path in checkpoints(folder)}
    newest = max((int(name.split("-")[1]) for name, complete in before.items() if complete), default=0)
    half = [name for name, complete in before.items() if not complete and int(name.split("-")[1]) > newest]
    assert len(half) <= 1
    assert not half or int(half[0].split("-")[1]) == newest + 1, "all earlier ones are complete"
    undisturbed, expected = whole(name)
    if (folder / "_teacher").exists():
        for file in (undisturbed / "_teacher").iterdir():
            assert (folder / "_teacher" / file.name).read_bytes() == file.read_bytes(), "complete or absent"
    trainer, begun = resume(folder, name)
    assert begun == newest
    state = trainer.model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key
    said = [record.getMessage() for record in caplog.records if "was interrupted while it saved" in record.getMessage()]
    assert len(said) == len(half)
    assert {path.name for path in folder.glob("_*")} == {"_teacher", *(f"_incomplete-{name}" for name in half)}
    assert [is_complete(path) for path in checkpoints(folder)] == [True] * 3
    return bool(half)


# By force

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off
from test_interrupts import trainer_of
trainer_of(*sys.argv[1:]).train()
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def kill(folder, name, seed):
    """Run a script in another process and end it at a random moment: some milliseconds, or none, after it has begun to write the
    checkpoint of a random step, or the teacher."""
    chance = random.Random(seed)
    step = chance.randint(1, STEPS)
    teacher = chance.random() < 0.1
    delay = chance.choice((0, chance.uniform(0, 0.02), chance.uniform(0, 0.15)))
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(Path(tp.__file__).parent.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), name]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while process.poll() is None:
            if list(folder.glob("_teacher*")) if teacher else (folder / f"checkpoint-{step}").exists():
                break
            time.sleep(0.0005)
        time.sleep(delay)
        process.send_signal(SIGNALS[seed % 3])
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, -SIGNALS[seed % 3], 1), said
    assert checkpoints(folder), said
    return process.returncode


# Three of them for every day: each method and each signal.
KILLS = [seed if seed in (0, 5, 10) else pytest.param(seed, marks=pytest.mark.slow) for seed in range(20)]


@pytest.mark.parametrize("seed", KILLS)
def test_a_run_killed_at_a_random_moment_resumes_exactly(whole, tmp_path, caplog, seed):
    name = list(METHODS)[seed % 4 % 3]
    code = kill(tmp_path, name, seed)
    half = assert_resumes_exactly(tmp_path, name, whole, caplog)
    print(f"seed {seed}: {name}, exit {code}, half a checkpoint: {half}")  # noqa: T201


# By a full disk


class Full(TrainerCallback):
    """From the save after a step on, no file can grow beyond some bytes: the system refuses to write on, as when the disk is full."""

    def __init__(self, step, most):
        self.step, self.most = step, most

    def on_save(self, _, state, *__, **___):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def room_again():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


FULL = {  # where -> step, bytes that fit, what is left of the next checkpoint
    "in the weights": (6, 100_000, {"config.json"}),
    "in the optimizer": (6, 250_000, {"README.md", "config.json", "model.safetensors", "training_args.bin", "optimizer.pt"}),
    "in the teacher": (DENSE, 100_000, None),
    "at once": (2, 500, {"config.json"}),
}


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk_is_an_error_and_the_last_checkpoint_resumes(whole, tmp_path, caplog, where):
    step, most, left = FULL[where]
    trainer = trainer_of(tmp_path, "tokens", callbacks=[Full(step, most)])
    with room_again(), pytest.raises((SafetensorError, RuntimeError, OSError)) as error:
        trainer.train()
    assert where == "in the optimizer" or "too large" in str(error.value).lower(), "the system's own word for it"
    assert trainer.state.global_step == (step if left is None else step + 1)
    assert is_complete(tmp_path / f"checkpoint-{step}")
    assert not list(tmp_path.glob("_teacher*")) or where not in ("in the teacher", "at once")
    if left is not None:
        files = {path.name for path in (tmp_path / f"checkpoint-{step + 1}").iterdir() if path.suffix != ".py"}
        assert files <= left
        assert not is_complete(tmp_path / f"checkpoint-{step + 1}")
    assert assert_resumes_exactly(tmp_path, "tokens", whole, caplog) == (left is not None)


# What counts as complete


@pytest.fixture
def run_folder(whole):
    """A run's folder with the checkpoints 10, 11 and 12, to be copied."""
    return whole("tokens")[0]


DAMAGES = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "half the state": lambda folder: cut_short(folder / "trainer_state.json"),
    "half the weights": lambda folder: cut_short(folder / "model.safetensors"),
    "half the optimizer": lambda folder: cut_short(folder / "optimizer.pt"),
    "half the random numbers": lambda folder: cut_short(folder / "rng_state.pth"),
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_half_a_checkpoint_is_set_aside(run_folder, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    (folder / "_incomplete-checkpoint-12").mkdir()  # of an earlier time
    (folder / "_incomplete-checkpoint-12" / "old").touch()
    DAMAGES[damage](folder / "checkpoint-12")
    DAMAGES[damage](folder / "checkpoint-10")  # older than a complete one: nobody would take it
    kept = {path.name: path.read_bytes() for path in (folder / "checkpoint-12").iterdir()}
    assert set_aside_incomplete(folder) == [folder / "_incomplete-checkpoint-12"]
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-11")
    assert {path.name: path.read_bytes() for path in (folder / "_incomplete-checkpoint-12").iterdir()} == kept
    assert (folder / "checkpoint-10").exists()
    assert set_aside_incomplete(folder) == []


def test_only_a_run_that_resumes_touches_checkpoints(run_folder, tmp_path):
    """Another one may be writing them."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    DAMAGES["no state"](folder / "checkpoint-12")
    before = sorted(path.name for path in folder.iterdir())
    trainer = trainer_of(folder, "tokens")
    trainer.evaluate()
    with pytest.raises(tp.errors.TrainingError, match=r"half a checkpoint.*The last complete one is: checkpoint-11"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_run_without_a_complete_checkpoint_begins_anew(tmp_path, caplog):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    trainer, begun = resume(tmp_path, "tokens")
    assert begun == 0
    assert trainer.state.global_step == STEPS
    [said] = [record.getMessage() for record in caplog.records if "was interrupted while it saved" in record.getMessage()]
    assert "renamed to _incomplete-checkpoint-1" in said
    assert said.endswith("begins anew: there is no complete checkpoint.")
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="No valid checkpoint"):  # transformers' own word, where nothing was set aside
        trainer_of(tmp_path, "tokens").train(resume_from_checkpoint=True)


class Plain(Trainer):
    def train(self):
        return super().train()


class Named(Trainer):
    def train(self, **kwargs):
        return super().train(**kwargs)


class More(Trainer):
    def train(self, steps=None, resume_from_checkpoint=None):
        self.args.max_steps = steps
        return super().train(resume_from_checkpoint)


@pytest.mark.parametrize(("kind", "given"), [(Plain, {}), (Named, {}), (Named, {"trial": None}), (More, {"steps": 2})])
def test_a_subclass_may_have_a_train_of_its_own(tmp_path, kind, given):
    trainer = trainer_for(tmp_path, top(), trainer=kind, max_steps=2)
    trainer.train(**given)
    assert trainer.state.global_step == 2
    assert inspect.signature(trainer.train) == inspect.signature(kind.train.__get__(trainer))


def test_whole_checkpoints_and_other_folders_stay(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for name in ("checkpoint-best", "checkpoint-99-old", "runs"):
        (folder / name).mkdir()
    (folder / "checkpoint-98").write_text("a file")
    before = sorted(path.name for path in folder.iterdir())
    assert set_aside_incomplete(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_state_has_the_trainers_name():
    assert STATE == TRAINER_STATE_NAME


def test_weights_alone_are_a_complete_checkpoint(tmp_path):
    """`save_only_model=True` asks for no more."""
    trainer_for(tmp_path, top(), max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    assert is_complete(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


def test_what_a_killed_save_of_the_teacher_left_goes_with_the_next(tmp_path):
    (tmp_path / "_teacher-writing-abc" / "new").mkdir(parents=True)
    (tmp_path / "_teacher-mine").mkdir()
    (tmp_path / "_teacher-mine" / "model.safetensors").write_bytes(b"a person's copy")
    trainer_for(tmp_path, top()).train()
    assert sorted(path.name for path in tmp_path.glob("_*")) == ["_teacher", "_teacher-mine"]
    assert (tmp_path / "_teacher-mine" / "model.safetensors").exists()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step"])
def test_a_run_that_was_interrupted_can_be_begun_anew(tmp_path, name, event):
    """In a notebook, in the same Trainer; gates of the interrupted step are closed."""

    class Interrupt(TrainerCallback):
        times = 0

        def interrupt(self, _args, state, _control, **_):
            if state.global_step == DENSE + 1 and not self.times:
                self.times += 1
                raise KeyboardInterrupt

    setattr(Interrupt, event, Interrupt.interrupt)
    trainer = trainer_of(tmp_path, name, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert trainer.evaluate()["eval_macs_realised"] < 0.75


def test_what_an_interrupted_run_has_spent_is_no_part_of_what_the_resumed_one_reached(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, _args, state, _control, **_):
            if state.global_step == STEPS - 1:
                raise KeyboardInterrupt

    interrupt = Interrupt()
    trainer = trainer_of(tmp_path, "tokens", callbacks=[interrupt])
    trainer.args.logging_strategy = "no"
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train(resume_from_checkpoint=True)
    spent = trainer.evaluate(Texts(48))["eval_macs_realised"]
    assert trainer.state.log_history[-2]["train_macs_realised"] == pytest.approx(spent, abs=0.02)


@pytest.mark.parametrize("head", ["Model", HEAD])
def test_a_forward_that_was_interrupted_leaves_nothing_behind(head):
    """torch runs no hook after a KeyboardInterrupt."""
    model, inputs = tp.pack(build("bert", head)), make_inputs("bert", head)
    expected = outputs_of(model, inputs)
    _, encoder = find_encoder(model)

    def interrupt(*_):
        handle.remove()
        raise KeyboardInterrupt

    handle = encoder.encoder.layer[2].output.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    assert active.forward is active.call is active.head is None
    found = outputs_of(model, inputs)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
