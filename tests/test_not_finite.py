"""A step whose loss or gradient is NaN or infinite: what decides about tokens and weights comes out of it as it went in."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from families import build
from training_helpers import Recorder, no_dropout, top, trainer_for
from transformers import Trainer, TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.methods.budgeted import BudgetedGates

STEPS = 20
PLAN = tp.Schedule(dense=1, anneal=2, settle=1)  # dense to step 5, annealing to 15
STAGES = tp.Schedule(dense=1, static=1, anneal=2, settle=1)  # dense to step 4, static to 8, annealing to 16
PARTS = tp.StructuredPruning(parts=("hidden", "heads", "units"))
METHODS = {
    "tokens": lambda: top(schedule=PLAN),
    "tokens, lagrangian": lambda: top(schedule=PLAN, constraint="lagrangian"),
    "weights": lambda: tp.StructuredPruning(target_macs=0.4, schedule=PLAN),
    "weights, lagrangian": lambda: tp.StructuredPruning(target_macs=0.4, schedule=PLAN, constraint="lagrangian"),
    "both": lambda: tp.Compose(PARTS, tp.ToP(rank_bins=8, rank_topk=4), target_macs=0.3, schedule=PLAN),
    "infor-coef": lambda: tp.InforCoef(static_macs=0.5, target_macs=0.3, schedule=STAGES),
    "samplers": lambda: tp.InforCoef(static_macs=None, target_macs=0.5, schedule=PLAN),
    "samplers without a budget": lambda: tp.InforCoef(static_macs=None, schedule=PLAN),
}
SEVERAL = (1, 6, 7, 9, 12, 13, 17, 18)  # of every phase; numbers of steps, from 1


class Spoiler(TrainerCallback):
    """Says in which steps something goes wrong, and takes care of the weights, as a careful user may."""

    def __init__(self, steps, heals=True):
        self.steps, self.heals, self.now = steps, heals, False

    def on_step_begin(self, _, state, *__, **___):
        self.now = state.global_step + 1 in self.steps

    def on_pre_optimizer_step(self, *_, model=None, **__):
        for name, parameter in model.named_parameters():
            ours = name.startswith("token_pruner.")
            if self.heals and not ours and parameter.grad is not None and not parameter.grad.isfinite().all():
                parameter.grad = None


def spoiled_run(folder, name, what, steps, heals=True):
    """A run in some steps of which the loss is NaN or infinite, or the embeddings are. Returns `(trainer, looks)`: the state of
    `token_pruner` after each step."""
    spoiler = Spoiler(steps, heals)
    model = build("bert", "ForSequenceClassification", **no_dropout())
    factor = {"nan loss": math.nan, "infinite loss": math.inf, "nan states": math.nan, "infinite states": math.inf}[what]

    class Spoiled(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * factor if spoiler.now and what.endswith("loss") else loss

    def spoil(_, __, output):
        return output * factor if spoiler.now and model.training and what.endswith("states") else None

    model.get_input_embeddings().register_forward_hook(spoil)
    recorder = Recorder(lambda m: {k: v.clone() for k, v in m.token_pruner.state_dict().items()})
    trainer = trainer_for(
        folder, METHODS[name](), model=model, trainer=Spoiled, callbacks=[spoiler, recorder], max_steps=STEPS, logging_steps=1
    )
    trainer.train()
    return trainer, recorder.looks


def assert_sound(state):
    """No NaN, and nothing infinite but the offset of samplers that keep everything."""
    for name, value in state.items():
        assert not value.isnan().any(), name
        if value.is_floating_point() and not (name.endswith("offset") and (value == math.inf).all()):
            assert value.isfinite().all(), name


def learned(name):
    """Is this moved by the optimizer?"""
    return name.endswith(("log_odds", "multipliers", "transform")) or ".net." in name


SLOW = [pytest.param(what, marks=pytest.mark.slow) for what in ("infinite loss", "nan states")]


@pytest.mark.parametrize("what", ["nan loss", "infinite states", *SLOW])
@pytest.mark.parametrize("name", METHODS)
def test_gates_samplers_and_counts_survive(tmp_path, caplog, name, what):
    trainer, looks = spoiled_run(tmp_path, name, what, SEVERAL)
    moved = 0
    for step, (before, after) in enumerate(zip([looks[0], *looks], looks, strict=False), start=1):
        assert_sound(after)
        if step == 1:
            continue
        same = [torch.equal(before[key], after[key]) for key in after if learned(key) and before[key].shape == after[key].shape]
        if step in SEVERAL:
            assert all(same), f"step {step}"
        moved += not all(same)
    assert moved >= 4, "and in sound steps they learn"
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values() if value.dim())
    assert [record.getMessage().split(" is not finite")[0] for record in caplog.records if "not finite" in record.message] == [
        "The gradient of step 1"
    ], "said once"


@pytest.mark.parametrize("name", METHODS)
def test_they_survive_also_where_the_weights_do_not(tmp_path, name):
    """With `max_grad_norm` the whole gradient becomes NaN; the Trainer steps all the same."""
    trainer, looks = spoiled_run(tmp_path, name, "nan loss", (10,), heals=False)
    for state in looks:
        assert_sound(state)
    assert trainer.model.bert.embeddings.word_embeddings.weight.isnan().any()
    assert trainer.state.global_step == STEPS


def test_the_offset_of_samplers_stays_where_it_was(tmp_path):
    """It is no parameter, but follows what each batch would spend."""
    _, looks = spoiled_run(tmp_path, "samplers", "nan states", (10, 18))
    offsets = [next(value.item() for key, value in state.items() if key.endswith("offset")) for state in looks]
    assert offsets[9] == offsets[8]
    assert offsets[17] == offsets[16]
    assert offsets[10] != offsets[9]


def test_information_never_overflows():
    model = tp.attach(build("bert", "ForSequenceClassification"))
    objective = tp.StructuredPruning(target_macs=0.5).attach(model)
    gates = objective.gates
    assert isinstance(gates, BudgetedGates)
    gradient = torch.ones_like(gates.state.information)
    for factor in (1.0, 1e30, math.inf, math.nan):
        gates.open()
        gates._measure(gradient * factor)
        gates.close()
        gates.end_step()
    assert torch.equal(gates.state.information, gradient)


def test_a_gradient_scaler_is_shown_every_gradient(tmp_path, caplog):
    """In fp16 the first steps overflow as a matter of course. The scaler leaves out the whole step, and tries a smaller scale."""
    trainer = trainer_for(tmp_path, METHODS["tokens"](), max_steps=1)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, tp.TokenPruneCallback))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(trainer.model.parameters()), device_placement=False, scaler=scaler)
    gates = trainer.model.token_pruner.training_state.log_odds
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for overflow in (math.inf, 1.0):
        scaler.scale(torch.ones(()))  # as before a backward
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        gates.grad *= overflow
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=optimizer)
        optimizer.step()
        moved = [name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])]
        assert moved == ([] if overflow == math.inf else list(before))
        assert optimizer.step_was_skipped == (overflow == math.inf)
        assert scaler.get_scale() == 512.0
    assert not [record for record in caplog.records if "not finite" in record.getMessage()]
