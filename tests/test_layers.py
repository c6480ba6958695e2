"""Layer-wise distillation, as the methods use it, is what dense models with their hidden states written out come to."""

import pytest
import torch
from families import build, make_inputs
from training_helpers import no_dropout, top
from weights_helpers import weights

import hf_tokenprune as tp
from hf_tokenprune.schedule import Moment

HEAD = "ForTokenClassification"
LENGTHS = (17, 5, 30, 17, 1)
LAYERS = range(4)


def taught(method, head=HEAD, seed=5):
    """A model in training, its objective, and its teacher as a dense model."""
    callback = tp.TokenPruneCallback(method)
    model = callback.attach(build("bert", head, **no_dropout())).train()
    teacher = build("bert", head, seed=seed)
    callback.objective.teacher = tp.pack(build("bert", head, seed=seed)).eval().requires_grad_(False)
    callback.objective.start_run(1e-3, {"anneal": 100})
    return model, callback.objective, teacher


def states_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs, output_hidden_states=True).hidden_states[1:]


def logged(model, objective, inputs):
    model.train()(**inputs, labels=inputs["input_ids"] % 3)
    return objective.pop_log()["layer_distillation"]


def apart(mine, theirs, there):
    return (mine - theirs)[there].square().mean()


@pytest.mark.parametrize("kept", [[1] * 8, [1, 1, 1, 0, 1, 0, 0, 0]])
def test_without_gates_on_weights_each_layer_is_pulled_to_its_own_where_tokens_are_left(kept):
    model, objective, teacher = taught(top(layer_weight=0.7))
    for site in model.token_pruner.sites.values():
        site.set_kept(kept)
    objective.moment, inputs = Moment("settle", 0.5), make_inputs("bert", HEAD, LENGTHS)
    found = logged(model, objective, inputs)
    mine, theirs = states_of(model, inputs), states_of(teacher, inputs)
    depths = tp.token_depths(model, inputs).depths
    assert (depths[inputs["attention_mask"].bool()] < 4).any() == (0 in kept)
    loss = sum(apart(mine[layer], theirs[layer], depths > layer) for layer in LAYERS)
    size = sum(apart(0 * theirs[layer], theirs[layer], depths >= 0) for layer in LAYERS)
    assert found == pytest.approx((0.7 * loss / size).item(), rel=1e-4)


def test_where_weights_are_gated_each_is_pulled_to_the_nearest_by_a_learned_matrix():
    model, objective, teacher = taught(weights(layer_weight=0.7))
    matrix = objective.gates.state.transform
    with torch.no_grad():
        matrix.add_(0.3 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)))
    objective.moment, inputs = Moment("anneal", 0.01), make_inputs("bert", HEAD, LENGTHS)
    there = inputs["attention_mask"].bool()
    found = logged(model, objective, inputs)
    mine, theirs = states_of(model, inputs), states_of(teacher, inputs)
    distances = torch.stack([torch.stack([apart(m @ matrix.T, t, there) for m in mine]) for t in theirs])
    assert distances.argmin(1).tolist() != list(LAYERS)
    size = sum(apart(0 * states, states, there) for states in theirs)
    assert found == pytest.approx((0.7 * distances.min(1).values.sum() / size).item(), rel=1e-4)


def test_of_a_pooled_last_layer_one_token_is_compared():
    head = "ForSequenceClassification"
    model, objective, teacher = taught(top(), head)
    objective.moment, inputs = Moment("anneal", 0.01), make_inputs("bert", head, LENGTHS)
    model.train()(**inputs, labels=torch.arange(5) % 3)
    found = objective.pop_log()["layer_distillation"]
    mine, theirs = states_of(tp.pack(build("bert", head)), inputs), states_of(teacher, inputs)
    everyone = inputs["attention_mask"].bool()
    there = [everyone] * 3 + [torch.zeros_like(everyone).index_fill_(1, torch.tensor(0), True)]
    loss = sum(apart(mine[layer], theirs[layer], there[layer]) for layer in LAYERS)
    size = sum(apart(0 * theirs[layer], theirs[layer], there[layer]) for layer in LAYERS)
    assert found == pytest.approx((loss / size).item(), rel=1e-4)
