"""FSDP2: gates and weights lie in shards between the steps, and still end as they would in one process. What torchrun runs is in
`sharded_runs.py`."""

import itertools
import json
import types

import pytest
import torch
from accelerate.state import AcceleratorState
from families import build, make_inputs
from sharded_runs import RESUMED, RUNS, STEPS, left_of, trained
from test_distributed import HERE, assert_same_gates, close, left_in, torchrun
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from training_helpers import Texts, spent_share, top, trainer_for
from transformers import AutoModelForSequenceClassification

import hf_tokenprune as tp
from hf_tokenprune import sharding

FSDP = [name for name in RUNS if "dense before" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that two processes have done."""
    folder = tmp_path_factory.mktemp("sharded")
    torchrun(HERE / "sharded_runs.py", folder, "fsdp", *FSDP)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What a run in two processes has left: of each of them."""
    return left_in(folder)


def one(folder, name, monkeypatch):
    """What the same run leaves in one process, with two micro-batches instead of two processes."""
    if name == "samplers":
        monkeypatch.setattr(torch, "rand_like", lambda like, **_: torch.full_like(like, 0.5))
    return left_of(*trained(folder, name, gradient_accumulation_steps=2))


@pytest.mark.parametrize("name", FSDP)
def test_all_parameters_are_sharded_and_both_processes_end_with_the_same_model(two, name):
    first, second = two(name)
    assert first["sharded"] == first["parameters"]
    assert any(name.startswith("token_pruner.") for name in first["sharded"])
    close(second["state"], first["state"], atol=0)


@pytest.mark.parametrize("name", ["tokens", "strong", "lagrangian", "learned", "samplers"])
def test_two_processes_are_two_micro_batches(tmp_path, monkeypatch, two, name):
    """Ragged texts: each process sees other lengths, and everything measured on them is brought together."""
    found, expected = two(name)[0], one(tmp_path, name, monkeypatch)
    assert not expected["sharded"]
    assert found["lengths"] == expected["lengths"]
    if name != "samplers":  # which are weights
        assert_same_gates(found, expected)
    # The softmax does not see the keys' bias, and of its gradient, which is rounding alone, Adam makes whole steps.
    states = ({k: v for k, v in left["state"].items() if not k.endswith("key.bias")} for left in (found, expected))
    close(*states)


def test_a_step_that_is_not_finite_leaves_the_gates_alone(two):
    """It is the fourth, in one of the processes only. In the third, the first of the annealing, information is measured."""
    for name, steps in (("strong", (3, 4, 5, 6, 7)), ("not finite", (3, 5, 6))):
        looks = two(name)[0]["looks"]
        assert torch.stack(looks).isfinite().all()
        moved = [not torch.equal(before, after) for before, after in itertools.pairwise(looks)]
        assert moved == [step in steps for step in range(2, STEPS + 1)]


def test_mixed_precision_meets_the_budget(two):
    logs = two("bf16")[0]["logs"]
    assert [log["macs_realised"] for log in logs if "macs_realised" in log][-1] < 0.55


def test_the_saved_folder_opens_as_the_class_that_it_was(folder, two):
    """With and without this package's own loading; not as the class that FSDP2 made on the spot."""
    for saved in (folder / "dropout" / "final", folder / "dropout" / f"checkpoint-{STEPS}"):
        opened = tp.from_pretrained(saved)
        weights = {name: value for name, value in two("dropout")[0]["state"].items() if ".training_state." not in name}
        close({name: opened.state_dict()[name] for name in weights}, weights, atol=0)
        assert 0.3 < spent_share(opened, Texts(48)) < 0.51
        remote = AutoModelForSequenceClassification.from_pretrained(saved, trust_remote_code=True).eval()
        inputs = make_inputs("bert", "ForSequenceClassification")
        torch.testing.assert_close(remote(**inputs).logits, opened.eval()(**inputs).logits)


def test_what_is_pushed_during_training_opens_as_the_class_that_it_was(folder, two):
    del two
    pushed = folder / "dropout" / "pushed"
    assert json.loads((pushed / "config.json").read_text())["auto_map"] == {
        "AutoModelForSequenceClassification": "modeling_token_pruned.BertForSequenceClassification"
    }
    assert (pushed / "modeling_token_pruned.py").exists()
    assert not list(pushed.glob("_fsdp*"))


def test_a_model_in_shards_says_how_to_save_it(folder, two):
    del two
    assert "trainer.save_model(folder)" in (folder / "refused.txt").read_text()


@pytest.mark.parametrize("step", RESUMED)
def test_a_run_killed_and_resumed_ends_with_the_same_weights(two, step):
    close(two(f"dropout {step}")[0]["state"], two("dropout")[0]["state"], atol=0)


class Plugin(types.SimpleNamespace):
    """What accelerate keeps of the settings of FSDP."""

    fsdp_version = 2
    state_dict_type = "StateDictType.FULL_STATE_DICT"
    cpu_ram_efficient_loading = False
    cpu_offload = OffloadPolicy()


@pytest.mark.parametrize(
    ("changed", "method", "message"),
    [
        ({"fsdp_version": 1}, top, r"FSDP2 only.*version.*2"),
        ({"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, top, r"SHARDED_STATE_DICT.*Say FULL_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, top, r"cpu_ram_efficient_loading.*buffers.*Leave it out"),
        ({"activation_checkpointing": True}, top, r"activation_checkpointing.*gradient_checkpointing=True"),
        ({"cpu_offload": CPUOffloadPolicy()}, top, r"offload_params.*Leave it out"),
        ({}, lambda: tp.StructuredPruning(target_macs=0.5), r"StructuredPruning cuts weights.*fsdp.*ToP"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, monkeypatch, changed, method, message):
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer.args, "fsdp", True)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin(**changed))
    before = type(trainer.model)
    with pytest.raises(tp.errors.TrainingError, match=message):
        tp.TokenPruneCallback(method()).on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert type(trainer.model) is before


def test_where_nothing_is_sharded_that_is_said(tmp_path, monkeypatch):
    """On a CPU, where accelerate falls back to DDP without a word."""
    told = []
    monkeypatch.setattr(sharding.logger, "warning", told.append)
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer.args, "fsdp", True)
    tp.TokenPruneCallback(top()).on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert len(told) == 1
    assert "plain DDP" in told[0]


def test_a_compiled_model_is_not_sharded(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(trainer.args, "fsdp", True)
    monkeypatch.setattr(trainer.args, "torch_compile", True)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin())
    with pytest.raises(tp.errors.TrainingError, match=r"torch_compile.*FSDP2"):
        tp.TokenPruneCallback(top()).on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_launcher_that_asks_for_shards_is_checked_too(tmp_path, monkeypatch):
    """accelerate launch says it by the environment alone."""
    trainer = trainer_for(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin(fsdp_version=1))
    with pytest.raises(tp.errors.TrainingError, match="FSDP2 only"):
        tp.TokenPruneCallback(top()).on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_adapters_are_not_sharded(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    model = build("bert", "ForSequenceClassification")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    trainer = trainer_for(tmp_path, model=model)
    monkeypatch.setattr(trainer.args, "fsdp", True)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin())
    with pytest.raises(tp.errors.TrainingError, match=r"adapters.*DDP"):
        tp.TokenPruneCallback(top()).on_init_end(trainer.args, trainer.state, trainer.control, model=model)
