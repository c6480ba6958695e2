"""A model that was opened with `trust_remote_code=True` has classes of the code in its folder. It is trained like any other."""

import pytest
import torch
from families import build
from training_helpers import at_home, kept_bins, logged, top, trained, trainer_for
from transformers import AutoModelForSequenceClassification
from weights_helpers import both, weights

import hf_tokenprune as tp
from hf_tokenprune.modeling import selection
from hf_tokenprune.modeling.pruner import TokenPruner
from hf_tokenprune.modeling.sizes import sizes_of

SETTLED = tp.Schedule(dense=0, anneal=1, settle=1)


def samplers(**settings):
    """An InforCoef that cuts no weights, and fits into a dozen steps."""
    return tp.InforCoef(**{"target_macs": 0.5, "static_macs": None, "schedule": SETTLED, **settings})


FIRST_AND_THEN = {
    "tokens": (top, lambda: top(target_macs=0.4, schedule=SETTLED)),
    "samplers": (samplers, lambda: samplers(target_macs=0.4)),
    "weights": (weights, lambda: weights(target_macs=0.25, schedule=SETTLED)),
    "weights, then tokens": (weights, lambda: top(target_macs=0.25, schedule=SETTLED)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a model lies that a method has pruned."""
    found = {}

    def of(method):
        if method not in found:
            found[method] = tmp_path_factory.mktemp("pruned")
            torch.manual_seed(0)
            trained(found[method] / "run", method()).save_model(found[method])
        return found[method]

    return of


def by_its_code(folder):
    model = at_home(AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True))
    assert not isinstance(model.token_pruner, TokenPruner), "of the folder's own code"
    return model


@pytest.mark.parametrize("name", FIRST_AND_THEN)
def test_it_is_pruned_further_like_one_that_this_package_opened(folder, tmp_path, name):
    first, then = FIRST_AND_THEN[name]
    seen = []
    for number, model in enumerate((at_home(tp.from_pretrained(folder(first))), by_its_code(folder(first)))):
        trainer = trainer_for(tmp_path / f"{number}", then(), model=model, max_steps=6, logging_steps=2)
        before = trainer.evaluate()
        torch.manual_seed(0)
        trainer.train()
        numbers = [before["eval_loss"], before["eval_macs_realised"], *logged(trainer, "loss")]
        seen.append((numbers, trainer.model.state_dict(), trainer.model.config.to_dict()))
        trainer.save_model(tmp_path / f"{number}")
        assert tp.from_pretrained(tmp_path / f"{number}").config.token_pruning == trainer.model.config.token_pruning
    (numbers, state, config), (same_numbers, same_state, same_config) = seen
    assert same_numbers == numbers
    assert same_state.keys() == state.keys()
    assert all(torch.equal(same_state[key], state[key]) for key in state)
    assert {**same_config, "_name_or_path": ""} == {**config, "_name_or_path": ""}


def test_a_cut_one_is_measured_packed_and_teaches(folder, tmp_path):
    ours, model = tp.from_pretrained(folder(weights)), by_its_code(folder(weights))
    assert sizes_of(model) == sizes_of(ours)
    assert tp.cost.dense_macs(model, [7, 9]) == tp.cost.dense_macs(ours, [7, 9])
    trainer_for(tmp_path, top(teacher=model, schedule=SETTLED), max_steps=2).train()
    assert tp.pack(tp.detach(model)) is model
    assert sizes_of(model) == sizes_of(ours)
    assert isinstance(model.token_pruner, TokenPruner)


def test_what_it_drops_stays_where_a_method_refuses_it(folder):
    model = by_its_code(folder(top))
    kept = kept_bins(model)
    with pytest.raises(tp.errors.ConfigError, match="drops tokens already"):
        tp.TokenPruneCallback(both()).attach(model)
    assert kept_bins(model) == kept
    assert all(type(site) is selection.RankBins for site in model.token_pruner.sites.values())


def test_one_that_this_package_opened_keeps_its_pruner():
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.RankBins(8)})
    pruner = model.token_pruner
    with pytest.raises(tp.errors.ConfigError):
        tp.TokenPruneCallback(samplers()).attach(model)
    assert model.token_pruner is pruner
