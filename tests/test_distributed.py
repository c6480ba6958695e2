"""Invariant 10, two processes: DDP changes speed, not results. What torchrun runs is in `distributed_runs.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import RUNS, STEPS, SURGERY, left_of, trained
from distributed_trainers import ROWS
from test_trainers import save_models
from training_helpers import Texts, spent_share

import hf_tokenprune as tp

HERE = Path(__file__).parent
DENSE_SIZES = (32, [4] * 4, [48] * 4)


def torchrun(*arguments):
    """Run a script of this folder in two processes on the CPU."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    # What the processes said comes before torchrun's own traceback, which says nothing of the cause.
    assert done.returncode == 0, done.stdout + done.stderr.partition(" failed (exitcode")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that two processes have done."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(HERE / "distributed_runs.py", folder, *RUNS)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What a run in two processes has left: of each of them."""
    return left_in(folder)


def left_in(folder):
    """From the name of a run in two processes, what it has left in a folder: of each of them."""
    return lambda name: [torch.load(folder / f"{name}-{number}.pt", weights_only=False) for number in (0, 1)]


def one(folder, name, monkeypatch, **arguments):
    """What the same run leaves in one process: two micro-batches instead of two processes, or one batch that is twice as large."""
    if name == "samplers":
        monkeypatch.setattr(torch, "rand_like", lambda like, **_: torch.full_like(like, 0.5))
    return left_of(*trained(folder, name, **arguments))


def differences(found, expected):
    """How far parameters and buffers are apart, by name; fingerprints are left out."""
    names = [name for name in expected if not name.endswith("teacher")]
    assert found.keys() == expected.keys()
    apart = {name: (found[name].double() - expected[name].double()).abs() for name in names}
    return {name: by.max().item() for name, by in apart.items() if by.numel()}


def close(found, expected, atol=1e-4):
    far = {name: distance for name, distance in differences(found, expected).items() if not distance <= atol}
    assert not far, far


def assert_same_gates(found, expected):
    assert found["moved"] > 0.1
    torch.testing.assert_close(found["gates"], expected["gates"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_end_with_the_same_model(two, name):
    first, second = two(name)
    assert first["sizes"] == second["sizes"]
    close(second["state"], first["state"], atol=0)


def test_both_processes_draw_the_same_gates(two):
    """Also where dropout has moved their random numbers apart. Gates are drawn in three of the steps, and anew in each."""
    first, second = (left["noise"] for left in two("dropout"))
    assert len(first) == 4
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert len({noise[0].item() for noise in first}) == 4


@pytest.mark.parametrize("name", ["tokens", "learned importance", "lagrangian", "weights and tokens", "samplers"])
def test_two_processes_are_two_micro_batches(tmp_path, monkeypatch, two, name):
    """Ragged texts: each process sees other lengths, and everything measured on them is brought together."""
    found, expected = two(name)[0], one(tmp_path, name, monkeypatch, gradient_accumulation_steps=2)
    assert found["sizes"] == expected["sizes"]
    assert (expected["sizes"] == DENSE_SIZES) == (name in ("tokens", "learned importance", "lagrangian"))
    assert_same_gates(found, expected)
    close(found["state"], expected["state"])


def test_two_processes_are_one_with_a_batch_twice_as_large(tmp_path, monkeypatch, two):
    found, expected = two("tokens, one length")[0], one(tmp_path, "tokens, one length", monkeypatch, per_device=8)
    assert_same_gates(found, expected)
    close(found["state"], expected["state"])


def test_the_log_is_about_the_samples_of_all_processes(tmp_path, monkeypatch, two):
    found, expected = two("tokens")[0]["logs"], one(tmp_path, "tokens", monkeypatch, gradient_accumulation_steps=2)["logs"]
    assert [log.keys() for log in found] == [log.keys() for log in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name in mine:
            # The gap is that of one micro-batch; and the Trainer multiplies the eval_loss of models like BERT by the number of
            # processes, that of dense ones, too.
            if not any(word in name for word in ("second", "runtime", "flos", "gap", "eval_loss", "train_loss")):
                assert mine[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_all_texts_are_counted(two):
    """The hard selection is fitted to the lengths that both have seen; in the phases before settling, 7 steps of 8 texts."""
    samples, _, droppable, *_, squares = two("tokens")[0]["lengths"]
    assert samples == 8 * 7
    assert 7 * samples < droppable < 23 * samples
    assert droppable**2 < samples * squares


def test_the_folder_is_complete_and_meets_the_budget(folder, two):
    del two
    opened = tp.from_pretrained(folder / "dropout" / f"checkpoint-{STEPS}")
    assert 0.2 < spent_share(opened, Texts(48)) < 0.31
    assert not any("teacher" in name and value.numel() > 1 for name, value in opened.state_dict().items())
    assert sorted(path.name for path in (folder / "dropout" / "_teacher").glob("*.safetensors")) == ["model.safetensors"]


def test_both_may_save_to_one_folder_at_a_time(folder, two):
    opened, state = tp.from_pretrained(folder / "by both").state_dict(), two("dropout")[0]["state"]
    weights = [name for name in opened if "token_pruner.training_state" not in name]
    assert len(weights) > 20
    close({name: opened[name] for name in weights}, {name: state[name] for name in weights}, atol=0)
    assert not list((folder / "by both").glob("_saving*"))


@pytest.mark.parametrize("step", [SURGERY - 2, SURGERY + 1])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(two, step):
    """Before and after surgery, with dropout."""
    whole, resumed = two("dropout")[0], two(f"dropout {step}")[0]
    assert whole["sizes"] == resumed["sizes"] != DENSE_SIZES
    close(resumed["state"], whole["state"], atol=0)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """What the Trainers of sentence-transformers have left in two processes."""
    folder = tmp_path_factory.mktemp("sentences")
    models = save_models(tmp_path_factory)
    torchrun(HERE / "distributed_trainers.py", folder, *(f"{head}={path}" for head, path in models.items()))
    return left_in(folder)


@pytest.mark.parametrize("row", ROWS)
def test_sentence_transformers_train_in_two_processes(sentences, row):
    """Both prune, meet the budget on the samples of both, and stay one model."""
    first, second = sentences(row)
    close(first["state"], second["state"], atol=0)
    assert first["kept"] == second["kept"]
    assert any(0 in kept for kept in first["kept"])
    assert first["phase"][0] == 0
    assert first["phase"][-1] == 3
    assert 0.5 < first["spent"][-1] < 0.65
    assert first["spent"][-1] == pytest.approx(second["spent"][-1])


@pytest.mark.skipif(not (HERE.parent / "examples").exists(), reason="needs the checkout")
def test_throughput_can_be_measured(tmp_path):
    script = HERE.parent / "examples" / "throughput.py"
    torchrun(script, "--shape", "2x128", "--rounds", 1, "--steps", 2, "--batch-size", 2, "--output", tmp_path / "ddp.json")
    report = json.loads((tmp_path / "ddp.json").read_text())
    assert report["processes"] == 2
    for name in ("ragged", "equal"):
        speeds = report["results"][name]["steps_per_second"]
        assert report["results"][name]["with_over_without"] == pytest.approx(speeds["with"] / speeds["without"])
