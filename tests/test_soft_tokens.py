"""The forward in which ToP trains: tokens count in part. At 0 and 1 it is the model that drops them, in between a slow one that is
written out here."""

import math

import pytest
import torch
from families import FAMILIES, build, make_inputs, outputs_of
from reference import bins
from training_helpers import no_dropout

import hf_tokenprune as tp
from hf_tokenprune.methods.token_bins import SoftBins

HEAD = "ForTokenClassification"
NAMES = [name for name, row in FAMILIES.items() if HEAD in row.heads]
LENGTHS = (17, 5, 30, 17, 1)
HARD = {1: [1, 1, 0, 1, 0, 0], 2: [1, 0, 0, 1, 1, 0]}
SOFT = {1: [1.0, 0.9, 0.3, 0.5, 0.0, 0.2], 2: [1.0, 0.4, 0.0, 0.8, 0.6, 0.1]}


def pruned(name, rows):
    """A model in training, whose sites have these gates; and the same with what of them is 1 or more than 0."""
    model = tp.attach(build(name, HEAD, **no_dropout(name)), {layer: tp.RankBins(6) for layer in rows})
    pruner = model.token_pruner
    for layer, row in rows.items():
        pruner.site(layer).set_kept([int(weight > 0) for weight in row])
    pruner.soft = {layer: SoftBins(pruner.site(layer), torch.tensor(row).float()) for layer, row in rows.items()}
    return model


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_0_and_1_are_the_model_that_drops(name):
    model, inputs = pruned(name, HARD), make_inputs(name, HEAD, LENGTHS)
    hard = outputs_of(model.eval(), inputs)["logits"]
    assert sum(model.token_pruner.trace[2].survived) < 0.6 * sum(LENGTHS)
    torch.testing.assert_close(outputs_of(model.train(), inputs)["logits"], hard, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gates_near_0_and_1_are_near_it(name):
    """At one site: at a later one, what is nearly gone is still counted by relative ranks."""
    near = {1: [1 - 1e-5 if weight else 1e-5 for weight in HARD[1]]}
    model, inputs = pruned(name, near), make_inputs(name, HEAD, LENGTHS)
    soft = outputs_of(model.train(), inputs)["logits"]
    hard = outputs_of(pruned(name, {1: HARD[1]}).eval(), inputs)["logits"]
    assert (soft - hard).abs().max() < 0.02
    assert sum(model.token_pruner.trace[2].survived) == sum(LENGTHS), "none of them is 0"


def slow(model, ids):
    """BERT on one text, with nothing left out: a token that counts `w` has `log w` added to its scores as a key and counts so much as
    a query in what others receive; it keeps the part `1 - w` of the state with which it entered the layer."""
    states, weight = model.bert.embeddings(ids[None])[0], torch.ones(len(ids))
    for number, layer in enumerate(model.bert.encoder.layer):
        heads = [
            linear(states).unflatten(-1, (4, 8)).transpose(0, 1)
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
        ]
        shares = (heads[0] @ heads[1].transpose(1, 2) / math.sqrt(8) + weight.log()).softmax(-1)
        received = (shares * weight[:, None]).mean((0, 1))
        context = (shares @ heads[2]).transpose(0, 1).flatten(1)
        before = states
        if number in SOFT:
            alive = [place for place in range(1, len(ids)) if weight[place] > 0]
            rule, ranked = bins(SOFT[number]), sorted(alive, key=lambda place: -received[place])
            weight = weight.clone()
            for rank, place in enumerate(ranked):
                weight[place] = weight[place] * rule(rank, len(ranked))
        states = layer.output(layer.intermediate(middle := layer.attention.output(context, states)), middle)
        states = weight[:, None] * states + (1 - weight[:, None]) * before
    return model.classifier(states)


def test_gates_in_between_are_the_slow_model():
    model, inputs = pruned("bert", SOFT), make_inputs("bert", HEAD, LENGTHS)
    found = outputs_of(model.train(), inputs)["logits"].split(LENGTHS)
    dense = build("bert", HEAD)
    with torch.no_grad():
        for logits, ids, length in zip(found, inputs["input_ids"], LENGTHS, strict=True):
            torch.testing.assert_close(logits, slow(dense, ids[:length]), atol=1e-4, rtol=0)


def test_the_gradient_of_gates():
    """At the last site: the ranks at a later one may change."""
    model, inputs = pruned("bert", {2: SOFT[2]}), make_inputs("bert", HEAD, (17,))
    row = torch.tensor([weight if weight else 0.5 for weight in SOFT[2]], requires_grad=True)
    pruner = model.train().token_pruner
    pruner.soft = {2: SoftBins(pruner.site(2), row)}
    told = torch.randn(17, 3, generator=torch.Generator().manual_seed(0))

    def said():
        return (model(**inputs).logits[0] * told).sum()

    said().backward()
    for number in range(len(row)):
        with torch.no_grad():
            numeric = []
            for step in (1e-2, -1e-2):
                row[number] += step
                numeric.append(said().item())
                row[number] -= step
        expected = (numeric[0] - numeric[1]) / 2e-2
        assert row.grad[number].item() == pytest.approx(expected, abs=0.02, rel=0.02)
    assert row.grad.abs().max() > 0.5
