"""What a user of the callback may do, and may not."""

import pytest
import torch
from datasets import Dataset
from families import build
from training_helpers import Recorder, Texts, kept_bins, spent_share, top, trained, trainer_for
from transformers import Trainer

import hf_tokenprune as tp

HEAD = "ForSequenceClassification"
TOTAL = 12  # steps of a run


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


class LayerByLayer(Trainer):
    """Each part of the model has a learning rate of its own."""

    parts = ("embeddings", "layer.0.", "layer.1.", "layer.2.", "layer.3.", "pooler", "classifier")

    def create_optimizer(self, *_):
        named = list(self.model.named_parameters())
        groups = [{"params": [p for name, p in named if part in name], "lr": 1e-3} for part in self.parts]
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


class WithGates(LayerByLayer):
    parts = (*LayerByLayer.parts, "token_pruner.")


def test_an_optimizer_whose_groups_leave_out_the_gates_is_refused(tmp_path):
    with pytest.raises(tp.errors.TrainingError, match=r"this Trainer makes leaves out the gates.*'token_pruner\.' in name\]"):
        trainer_for(tmp_path, top(), trainer=LayerByLayer).train()
    assert spent_share(trained(tmp_path, trainer=WithGates).model, Texts()) < 0.51


@pytest.mark.parametrize("own", [False, True])
def test_gates_that_were_frozen_are_refused(tmp_path, own):
    """All but the head, after the Trainer was made; what leaves out the gates works."""
    callback = tp.TokenPruneCallback(top())
    model = callback.attach(build("bert", HEAD))
    optimizers = (torch.optim.AdamW(model.parameters(), lr=1e-3) if own else None, None)
    trainer = trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=optimizers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "classifier" in name
    with pytest.raises(tp.errors.TrainingError, match="gates are frozen"):
        trainer.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "classifier" in name or "token_pruner." in name
    trainer = trainer_for(tmp_path, model=model, callbacks=[callback])
    trainer.train()
    assert spent_share(model, Texts()) < 0.51


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
