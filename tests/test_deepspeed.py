"""DeepSpeed's ZeRO up to stage 2: the engine takes gradients and steps away from the Trainer, and gates still end as under DDP. What
torchrun runs is in `sharded_runs.py`. `make test-deepspeed` installs what it needs."""

import os
from types import SimpleNamespace

import pytest
import torch
from sharded_runs import RESUMED, STEPS, left_of, trained
from test_distributed import HERE, assert_same_gates, close, left_in, torchrun
from training_helpers import Texts, spent_share, top

import hf_tokenprune as tp
from hf_tokenprune import sharding
from hf_tokenprune.methods.budgeted import BudgetedGates

RUNS = (
    "tokens, dense before", "strong, dense before", "bf16, dense before", "dropout, dense before", "not finite, dense before",
    "own schedule, dense before", "embeddings, dense before",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that two processes have done."""
    if "DS_ACCELERATOR" not in os.environ:  # `make test`, where it may happen to be installed
        pytest.skip("make test-deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    torchrun(HERE / "sharded_runs.py", folder, "deepspeed", *RUNS)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What a run in two processes has left: of each of them."""
    return left_in(folder)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_end_with_the_same_model(two, name):
    first, second = two(name)
    close(second["state"], first["state"], atol=0)


@pytest.mark.parametrize("name", RUNS[:2])
def test_two_processes_are_two_micro_batches(tmp_path, two, name, monkeypatch):
    """Under DeepSpeed no information is measured: gates start in the order of rank."""
    monkeypatch.setattr(BudgetedGates, "MEASURE", 0.0)
    found, expected = two(name)[0], left_of(*trained(tmp_path, name, gradient_accumulation_steps=2))
    assert found["lengths"] == expected["lengths"]
    assert_same_gates(found, expected)
    states = ({k: v for k, v in left["state"].items() if not k.endswith("key.bias")} for left in (found, expected))
    close(*states)


def test_mixed_precision_meets_the_budget(two):
    logs = two(RUNS[2])[0]["logs"]
    assert [log["macs_realised"] for log in logs if "macs_realised" in log][-1] < 0.55


def test_a_step_that_is_not_finite_leaves_the_gates_alone(two):
    for name, spoiled in ((RUNS[1], False), (RUNS[4], True)):
        looks = two(name)[0]["looks"]
        assert torch.stack(looks).isfinite().all()
        assert torch.equal(looks[1], looks[2]) == spoiled


def test_a_schedule_of_deepspeed_s_own_does_not_hide_the_learning_rate(two):
    """It warms up from 1e-6, which is no learning rate to measure gates by."""
    scales = [two(name)[0]["state"]["token_pruner.training_state.scale"] for name in (RUNS[0], RUNS[5])]
    torch.testing.assert_close(*scales)


def test_outputs_that_nobody_reads_get_a_gradient(two):
    """The pooler of a model that is read at its hidden states."""
    left = two(RUNS[6])[0]
    assert left["moved"] > 0
    assert left["logs"][-1]["train_loss"] > 0


def test_checkpoints_are_models(folder, two):
    name = RUNS[3]
    opened = tp.from_pretrained(folder / name / f"checkpoint-{STEPS}")
    weights = {k: v for k, v in two(name)[0]["state"].items() if ".training_state." not in k}
    close({k: opened.state_dict()[k] for k in weights}, weights, atol=0)
    assert 0.3 < spent_share(opened, Texts(48)) < 0.51


@pytest.mark.parametrize("step", RESUMED)
def test_a_run_killed_and_resumed_ends_with_the_same_weights(two, step):
    close(two(f"{RUNS[3]} {step}")[0]["state"], two(RUNS[3])[0]["state"], atol=0)


def test_a_dense_phase_is_refused_before_anything_is_trained(folder):
    assert "Schedule(dense=0)" in (folder / "refused.txt").read_text()


@pytest.mark.parametrize(
    ("stage", "precision", "schedule", "message"),
    [
        (3, "no", tp.Schedule(dense=0), r"stage 3.*stages 1 and 2.*FSDP2"),
        (0, "no", tp.Schedule(dense=0), r"stage 0.*stages 1 and 2.*DDP"),
        (2, "fp16", tp.Schedule(dense=0), r"fp16.*bf16=True"),
        (2, "bf16", tp.Schedule(dense=1), r"dense phase.*Schedule\(dense=0\)"),
    ],
)
def test_what_the_engine_does_not_allow_is_refused(stage, precision, schedule, message):
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage), mixed_precision=precision)
    with pytest.raises(tp.errors.TrainingError, match=message):
        sharding._check_engine(state, None, top(schedule=schedule))
