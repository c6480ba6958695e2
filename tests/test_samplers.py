"""InforCoef's dynamic stage: what samplers learn to drop, what a batch would spend, and what becomes of them at surgery."""

from types import SimpleNamespace

import pytest
import torch
from families import build, make_inputs, outputs_of
from test_infor_coef import HEAD, IMAGES, LEARNING, STEPS, offset_of, stages, tokens
from training_helpers import Recorder, Texts, at_home, logged, no_dropout, spent_share, trained
from weights_helpers import INPUTS, weights

import hf_tokenprune as tp
from hf_tokenprune.cost import dense_macs, trace_macs
from hf_tokenprune.methods import infor_coef as module
from hf_tokenprune.methods.layers import _tables
from hf_tokenprune.modeling.packing import PackedBatch
from hf_tokenprune.modeling.selection import Skim
from hf_tokenprune.modeling.sizes import sizes_of
from hf_tokenprune.schedule import Moment


class Margins(Skim):
    """A sampler by whose margins, from 0 to 7 as after foresight, everything is kept at inference."""

    def logits(self, states):
        margin = torch.linspace(0, 7, len(states))
        return torch.stack([-margin / 2, margin / 2], dim=1)


@pytest.mark.parametrize(("budget", "dropped"), [(None, 0.0990), (0.3, 0.0248)])
def test_under_a_budget_few_are_dropped_at_random(budget, dropped):
    """Of tokens with margins from 0 to 7, noise of scale 1 drops `log(2) / 7`, noise of a quarter of that a quarter of them."""
    objective = tokens(target_macs=budget).attach(build("bert", HEAD))
    objective.moment = Moment("anneal", 0.5)
    objective.start_run(1e-3, {"static": 0, "anneal": 100})
    objective.open_gates()
    torch.manual_seed(0)
    batch = PackedBatch.from_mask(None, batch_size=1, seq_len=40_000, device="cpu")
    look = objective.looks[0]
    look.sampler = Margins(32)
    kept = look(torch.zeros(40_000, 32), batch, torch.zeros(40_000, dtype=torch.bool))
    assert 1 - kept.mean().item() == pytest.approx(dropped, rel=0.15)


def test_tokens_that_a_sampler_has_dropped_are_not_distilled():
    batch = PackedBatch.from_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]), batch_size=2, seq_len=3, device="cpu")
    alive = torch.tensor([True, False, True, True, False, False])
    weighted = batch.with_weights(alive[batch.index].float(), masked=True)
    _, (there,) = _tables([SimpleNamespace(survivors=weighted, left=torch.zeros(1, 5, 4))], batch)
    assert torch.equal(there, alive[batch.index])


def test_tokens_of_a_model_that_was_cut_before_count_against_the_original(tmp_path):
    trained(tmp_path / "first", weights(target_macs=0.5), max_steps=16).save_model(str(tmp_path / "cut"))
    model = tp.from_pretrained(tmp_path / "cut")
    sizes, whole = sizes_of(model), spent_share(model, Texts())
    assert 0.36 < whole < 0.51
    method = tokens(target_macs=0.25, schedule=tp.Schedule(dense=1, anneal=4, settle=1))
    trainer = trained(tmp_path / "second", method, model=model, max_steps=STEPS, learning_rate=LEARNING)
    assert sizes_of(model) == sizes
    assert 0.19 < spent_share(model, Texts()) < 0.31
    assert logged(trainer, "macs_realised")[0] == pytest.approx(whole, abs=0.01)
    annealing = [entry["macs_target"] for entry in trainer.state.log_history if entry.get("pruning_phase") == 2]
    assert 0.25 <= annealing[-1] < annealing[len(annealing) // 2] < annealing[0] <= whole, "tightens from what the model spends"
    trainer.save_model(str(tmp_path / "saved"))
    opened = at_home(tp.from_pretrained(tmp_path / "saved"))
    assert sizes_of(opened) == sizes
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], outputs_of(at_home(model.eval()), INPUTS)["logits"])


@pytest.mark.parametrize("norm_weight", [0.0, 10.0])
def test_without_a_budget_the_norm_term_makes_tokens_drop(tmp_path, norm_weight):
    method = tp.InforCoef(
        static_macs=None, norm_weight=norm_weight, entropy_weight=0.0, schedule=tp.Schedule(dense=0, anneal=1, settle=0)
    )
    trainer = trained(tmp_path, method, learning_rate=1e-2, lr_scheduler_type="constant", max_steps=30)
    spent_share(trainer.model, Texts())
    arrived, *left = [sum(layer.entered) for layer in trainer.model.token_pruner.trace][::3]
    assert offset_of(trainer.model) == 0
    assert not logged(trainer, "macs_target")[1:]
    if norm_weight:
        assert left[0] < 0.2 * sum(len(row["input_ids"]) for row in Texts())
        norms = logged(trainer, "information_norm")
        assert norms[-1] < 0.1 * norms[0]
    else:
        assert arrived == left[0]


def test_samplers_cost_little_in_a_realistic_shape():
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2}
    model = tp.TokenPruneCallback(tokens()).attach(build("bert", HEAD, **shape)).eval()
    spent = []
    for offset in (float("inf"), 0.0):  # without looking, and looking but keeping everything
        model.token_pruner.objective._set_offset(offset)
        outputs_of(model, INPUTS)
        assert sum(model.token_pruner.trace[1].entered) == sum(model.token_pruner.trace[0].arrived)
        spent.append(sum(trace_macs(model)))
    assert 0 < spent[1] - spent[0] < 0.02 * spent[0]


def anneal(model, progress=0.5):
    """The objective of a model, in the middle of the dynamic stage."""
    objective = model.token_pruner.objective
    objective.start_run(1e-3, {"static": 10, "anneal": 10})
    objective.moment = Moment("anneal", progress)
    return objective


def spread(model):
    """Samplers that judge tokens differently."""
    with torch.no_grad():
        for sampler in model.token_pruner.sites.values():
            sampler.net[4].weight.normal_(std=0.1)


NAMES = [
    ("bert", HEAD), ("distilbert", HEAD), ("modernbert", HEAD), ("deberta-v2", HEAD), ("vit", IMAGES),
    ("bert", "ForTokenClassification"),
]  # fmt: skip


@pytest.mark.usefixtures("gates_without_noise")
@pytest.mark.parametrize(("name", "head"), NAMES)
def test_what_a_batch_would_spend_is_what_inference_spends(monkeypatch, name, head):
    """Without noise training decides as inference does, so the expected cost at the present offset is the real one; and at the
    offset that is solved for, the target is spent as far as tokens allow."""
    costs = []

    class Watched(module.SamplingCost):
        def __init__(self, *args):
            super().__init__(*args)
            costs.append(self)

    monkeypatch.setattr(module, "SamplingCost", Watched)
    model = tp.TokenPruneCallback(tokens()).attach(build(name, head, **no_dropout(name)))
    spread(model)
    objective, inputs = anneal(model), make_inputs(name, head)
    for offset in (0.0, -2.0, -4.0):
        objective._set_offset(offset)
        model.train()(**inputs)
        objective._set_offset(offset)
        outputs_of(model.eval(), inputs)
        lengths = model.token_pruner.trace[0].arrived
        expected = sum(trace_macs(model)) / sum(dense_macs(model, lengths))
        assert costs[-1].share(offset) == pytest.approx(expected, rel=1e-6)
    shares = [costs[-1].share(offset) for offset in (0.0, -1.0, -2.0, -3.0, -4.0, -30.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] + 0.2
    for target in (0.3, 0.5, 0.7):
        solved = costs[-1].offset_for(target)
        assert costs[-1].share(solved) <= target <= costs[-1].share(solved + 1e-3) + 0.1
    everything = costs[-1].offset_for(2.0)
    assert costs[-1].share(everything) == pytest.approx(max(costs[-1].share(30.0), shares[0]), abs=0.02)
    assert everything == pytest.approx(max(-costs[-1].margins.min().item(), 0), abs=1e-3), "no further than it takes"


def test_sites_of_layers_that_are_removed_go(tmp_path):
    """Layer 1 adds nothing to the residual stream, so it goes first; the others keep their samplers under new numbers."""
    model = build("bert", HEAD)
    with torch.no_grad():
        for part in (model.bert.encoder.layer[1].attention.output, model.bert.encoder.layer[1].output):
            part.dense.weight.zero_()
    samplers = {}
    recorder = Recorder(
        lambda model: samplers.setdefault(len(model.token_pruner.sites), dict(model.token_pruner.sites.items()))
    )
    plan = tp.Schedule(dense=0, static=1, anneal=1, settle=1)
    method = stages(parts=("blocks",), static_macs=0.65, target_macs=0.4, schedule=plan)
    trained(tmp_path / "run", method, model=model, max_steps=18, learning_rate=1e-5, callbacks=[recorder])
    assert sizes_of(model)[1:] == ([4] * 3, [48] * 3)
    assert [site["layer"] for site in model.config.token_pruning["sites"]] == [0, 1, 2]
    old, new = samplers[4], samplers[3]
    assert [new[str(layer)] for layer in range(3)] == [old[str(layer)] for layer in (0, 2, 3)]
    model.save_pretrained(tmp_path / "saved")
    assert list(tp.from_pretrained(tmp_path / "saved").token_pruner.sites) == ["0", "1", "2"]
