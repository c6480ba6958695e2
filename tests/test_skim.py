"""Token samplers that look before each layer: the same outputs as a slow reference that masks, whatever else is in the batch."""

import copy
from itertools import pairwise

import pytest
import torch
from families import FAMILIES, build, make_inputs, outputs_of
from reference import DEPTH, Reference
from safetensors.torch import load_file, save_file
from test_cost import counted_macs
from test_pruning import LENGTHS, SUMMARY, TEXT, assert_same_samples, one_head
from torch.nn.functional import gelu, layer_norm, linear
from training_helpers import at_home, no_dropout

import hf_tokenprune as tp
from hf_tokenprune.methods.samplers import SoftSkim
from hf_tokenprune.modeling.attention import weighted_softmax
from hf_tokenprune.modeling.selection import Skim

HEADS = [
    *((name, one_head(name)) for name in FAMILIES),
    *((name, "ForSequenceClassification") for name in ("bert", "esm", "distilbert", "modernbert")),
    ("bert", "ForMultipleChoice"),
    ("vit", "Model"),
    ("siglip", "VisionModel"),
]
SITES = {"every layer": range(DEPTH), "the first": (0,), "the last": (3,), "some": (1, 3)}


def sampler(seed, offset=0.0, hidden=32):
    """A sampler that drops about half of what it sees."""
    torch.manual_seed(seed + 30)
    skim = Skim(hidden, width=6)
    with torch.no_grad():
        for parameter in skim.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        skim.net[4].weight.sub_(skim.net[4].weight.mean(1, keepdim=True))
        skim.net[4].bias.zero_()
        skim.offset.fill_(offset)
    return skim


def skimming(name, head, layers=range(DEPTH), offset=0.0, **arguments):
    model = build(name, head, **no_dropout(name))
    return tp.attach(model, {layer: sampler(layer, offset) for layer in layers}, **arguments)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


class MaskedReference(Reference):
    """The dense model, in which a sampler's network, written out, masks tokens before each layer."""

    def __init__(self, model, samplers, summary):
        super().__init__(model, {})
        self.samplers, self.summary = samplers, summary

    def _before(self, layer, args, kwargs):
        states = args[0]
        if not self.alive:
            self.alive.append(torch.ones(states.shape[:2], dtype=torch.bool))
        alive = self.alive[-1].clone()
        number = len(self.alive) // 2  # one entry here and one after each layer
        if number in self.samplers:
            margin = self._margin(self.samplers[number], states)
            for row in range(len(alive)):
                best = max(alive[row].nonzero().flatten().tolist(), key=lambda i, row=row: margin[row, i])
                alive[row] &= margin[row] > 0
                alive[row, self.summary :] |= self.summary < 0
                alive[row, : self.summary] |= self.summary > 0
                if not self.summary:
                    alive[row, best] = True
        self.alive.append(alive)
        return super()._before(layer, args, kwargs)

    def _margin(self, skim, states):
        norm, first, inner, _, last = skim.net
        x = linear(layer_norm(states, norm.weight.shape, norm.weight, norm.bias), first.weight, first.bias)
        x = linear(gelu(layer_norm(x, inner.weight.shape, inner.weight, inner.bias)), last.weight, last.bias)
        return 10 * (x[..., 1] - x[..., 0]) + skim.offset


def reference_for(model, name, head):
    dense = build(name, head, **no_dropout(name))
    dense.config._attn_implementation = "eager"
    samplers = {int(layer): site for layer, site in model.token_pruner.sites.items()}
    return MaskedReference(dense, samplers, SUMMARY[name])


# What it computes.


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize(("name", "head"), HEADS)
def test_skimmed_equals_masked(name, head, sites):
    inputs = make_inputs(name, head, LENGTHS)
    # Without boxes all of LayoutLM's tokens begin much alike, and its first sampler would keep them all.
    model = skimming(name, head, SITES[sites], offset=-6.0 if (name, sites) == ("layoutlm", "the first") else 0.0)
    assert_same_samples(run(model, inputs), reference_for(model, name, head), inputs)
    trace, everything = model.token_pruner.trace, sum(model.token_pruner.trace[0].arrived)
    assert sum(trace[3].entered) < (0.8 if len(SITES[sites]) > 1 else 1) * everything
    for before, after in pairwise(trace):
        assert after.arrived == before.survived == before.entered
    for layer in trace:
        assert all(0 < entered <= arrived for entered, arrived in zip(layer.entered, layer.arrived, strict=True))


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_samplers_that_keep_everything_change_nothing(name, head):
    inputs = make_inputs(name, head, LENGTHS)
    model = skimming(name, head, offset=float("inf"))
    dense = tp.pack(build(name, head))
    packed, spent = outputs_of(dense, inputs), sum(tp.cost.trace_macs(dense))
    for offset, free in ((float("inf"), True), (1000.0, False)):
        for site in model.token_pruner.sites.values():
            site.offset.fill_(offset)
        found = outputs_of(model, inputs)
        assert all(torch.equal(found[key], packed[key]) for key in packed)
        assert (sum(tp.cost.trace_macs(model)) == spent) is free
    untrained = tp.attach(build(name, head), {layer: Skim(32) for layer in range(DEPTH)})
    assert all(torch.equal(value, packed[key]) for key, value in outputs_of(untrained, inputs).items())


@pytest.mark.parametrize("name", FAMILIES)
def test_only_summary_tokens_are_left_if_nothing_else_wins(name):
    model, inputs = skimming(name, one_head(name), offset=-1000.0), make_inputs(name, one_head(name), LENGTHS)
    assert_same_samples(run(model, inputs), reference_for(model, name, one_head(name)), inputs)
    least = [min(length, max(abs(SUMMARY[name]), 1)) for length in (LENGTHS if not FAMILIES[name].images else (99,) * 4)]
    assert [sorted(layer.entered) for layer in model.token_pruner.trace] == [sorted(least)] * DEPTH


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(name):
    head = one_head(name)
    model, inputs = skimming(name, head), make_inputs(name, head, LENGTHS)
    together = run(model, inputs).logits
    for row in range(len(LENGTHS)):
        alone = run(model, {key: value[row : row + 1] for key, value in inputs.items()}).logits
        per_token = head == "ForTokenClassification"
        mask = inputs["attention_mask"][row].bool() if per_token else slice(None)
        torch.testing.assert_close(alone[0][mask], together[row][mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_what_stands_in_the_padding_is_never_read(name):
    model, inputs = skimming(name, "ForTokenClassification"), make_inputs(name, "", LENGTHS)
    expected = outputs_of(model, inputs)["logits"]
    padding = inputs["attention_mask"] == 0
    junk = torch.where(padding, torch.arange(padding.shape[1]) + 6, inputs["input_ids"])
    assert torch.equal(outputs_of(model, {**inputs, "input_ids": junk})["logits"], expected)
    wider = {key: torch.nn.functional.pad(value, (0, 7)) for key, value in inputs.items()}
    torch.testing.assert_close(outputs_of(model, wider)["logits"], expected, rtol=0, atol=1e-5)
    assert sum(model.token_pruner.trace[0].arrived) == sum(LENGTHS)


def test_protected_ids_survive():
    inputs, ids = make_inputs("bert", "", LENGTHS), tuple(range(5, 120, 4))
    model = skimming("bert", "ForTokenClassification", offset=-1000.0, protected_token_ids=ids)
    run(model, inputs)
    real = inputs["attention_mask"].bool()
    protected = torch.isin(inputs["input_ids"], torch.tensor(ids)) & real
    protected[:, 0] = True
    assert sorted(model.token_pruner.trace[3].survived) == sorted(protected.sum(1).tolist())


@pytest.mark.parametrize(
    "sites",
    [
        (1, 3),
        (2,),
        range(DEPTH),
    ],
)
def test_hidden_states_of_dropped_tokens_stay_what_they_were(sites):
    inputs, asked = make_inputs("bert", "Model", LENGTHS), {"output_hidden_states": True}
    model = skimming("bert", "Model", sites)
    reference, found = reference_for(model, "bert", "Model"), run(model, {**inputs, **asked})
    assert len(found.hidden_states) == DEPTH + 1
    assert_same_samples(found, lambda sample: reference({**sample, **asked}), inputs)


def test_samplers_and_other_selectors_stand_side_by_side():
    inputs = make_inputs("bert", "", LENGTHS)
    model = tp.attach(build("bert", "ForTokenClassification"), {0: tp.TopK(0.5), 1: sampler(1)})
    run(model, inputs)
    both = [layer.survived for layer in model.token_pruner.trace]
    tp.attach(model, {0: tp.TopK(0.5)})
    run(model, inputs)
    half = [layer.survived for layer in model.token_pruner.trace]
    assert both[0] == half[0]
    assert sum(both[1]) < sum(half[1]) == sum(half[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_lower_precision_drops_tokens(name):
    head = one_head(name)
    model, inputs = skimming(name, head), make_inputs(name, head, LENGTHS)
    run(model, inputs)
    expected = sum(model.token_pruner.trace[3].entered)
    model.bfloat16()
    logits = run(model, {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert abs(sum(model.token_pruner.trace[3].entered) - expected) < 0.2 * sum(model.token_pruner.trace[0].arrived)


# What it costs.


@pytest.mark.parametrize(
    ("name", "head"), [case for case in HEADS if case[0] in ("bert", "distilbert", "modernbert", "vit", "siglip")]
)
def test_macs_are_those_that_run_the_samplers_included(name, head):
    model, inputs = skimming(name, head, (0, 2, 3)), make_inputs(name, head)
    counted = counted_macs(model, inputs)
    assert tp.cost.trace_macs(model) == counted
    trace, free = model.token_pruner.trace, tp.cost.layer_costs(model)
    for layer in range(DEPTH):
        entered = {"entered": trace[layer].entered, "queries": trace[layer].queries, "survived": trace[layer].survived}
        sampling = (32 * 6 + 2 * 6) * sum(trace[layer].arrived) if layer != 1 else 0
        assert counted[layer] == free[layer].macs(**entered) + sampling
    for site in model.token_pruner.sites.values():
        site.offset.fill_(float("inf"))
    assert tp.cost.trace_macs(tp.pack(build(name, head)), trace) == tp.cost.trace_macs(model, trace)


# Training: tokens of weight 0 wait, masked.


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_in_training_equals_dropped(name):
    head = one_head(name)
    model, inputs = skimming(name, head), make_inputs(name, head, (60, 70, 5, 1))
    dropped = outputs_of(model, inputs)
    entered = [sorted(layer.entered) for layer in model.token_pruner.trace]
    pruner, alive = model.token_pruner, []

    def weigh(site):
        def weights(states, batch, protected):
            here = torch.ones_like(protected) if batch.weights is None else batch.weights > 0
            kept = here.clone()
            rows, left = batch.choose(here)
            kept[rows] = site.keep(states[rows], left, protected[rows])
            alive.append(sorted(torch.bincount(batch.sequence_ids[kept], minlength=len(batch.lengths)).tolist()))
            return kept.to(states.dtype)

        return weights

    pruner.soft = {int(layer): weigh(site) for layer, site in pruner.sites.items()}
    masked = outputs_of(model.train(), inputs)
    assert alive == entered
    assert sum(alive[3]) < 0.8 * sum(alive[0])
    for key in dropped:
        torch.testing.assert_close(masked[key], dropped[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_reaches_the_samplers_and_is_finite(name, offset):
    """At an offset of -1000 whole windows of local attention are dropped."""
    head = one_head(name)
    model, inputs = skimming(name, head).train(), make_inputs(name, head, (60, 70, 5))
    pruner = model.token_pruner
    for site in pruner.sites.values():
        torch.nn.init.normal_(site.net[4].weight, std=0.02)
    pruner.sites["2"].offset.fill_(offset)
    pruner.soft = looks = {int(layer): SoftSkim(site) for layer, site in pruner.sites.items()}
    output = model(**inputs).logits
    assert output.isfinite().all()
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "pooler" not in name and parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    for layer, site in pruner.sites.items():
        if offset == 0 or layer in "01":
            assert all(parameter.grad.count_nonzero() for parameter in site.parameters()), layer
    alive = [int(look.alive.sum()) for look in looks.values()]
    assert alive == sorted(alive, reverse=True)
    assert alive[0] == looks[0].batch.total > alive[1]
    if offset:
        assert alive[3] <= 2 * 3


@pytest.mark.parametrize("name", ["bert", "vit", "siglip"])
def test_in_training_too_every_sequence_keeps_a_token(name):
    head = one_head(name)
    model = skimming(name, head, offset=-30.0).train()
    looks = {int(layer): SoftSkim(site) for layer, site in model.token_pruner.sites.items()}
    model.token_pruner.soft = looks
    run(model, make_inputs(name, head, LENGTHS))
    last = looks[DEPTH - 1]
    left = torch.bincount(last.batch.sequence_ids[last.alive], minlength=len(LENGTHS))
    assert left.tolist() == [max(SUMMARY[name], 1)] * len(LENGTHS)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "vit"])
def test_gradient_checkpointing_changes_no_gradient(name):
    head, found = one_head(name), []
    for checkpointing in (False, True):
        model, inputs = skimming(name, head).train(), make_inputs(name, head)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.token_pruner.soft = {int(layer): SoftSkim(site) for layer, site in model.token_pruner.sites.items()}
        torch.manual_seed(1)
        model(**inputs).logits.square().sum().backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


# Saved, opened, copied, cut.


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "siglip"])
def test_a_saved_model_opens_to_the_same_logits(tmp_path, name):
    head = one_head(name)
    model, inputs = skimming(name, head, (0, 1, 3), offset=-0.5), make_inputs(name, head)
    model.save_pretrained(tmp_path)
    opened = at_home(tp.from_pretrained(tmp_path))
    assert opened.config.token_pruning == model.config.token_pruning
    selector = {"kind": "skim", "hidden": 32, "width": 6}
    assert model.config.token_pruning["sites"] == [{"layer": layer, "selector": selector} for layer in (0, 1, 3)]
    expected = outputs_of(model, inputs)
    for twin in (opened, copy.deepcopy(model)):
        assert all(torch.equal(value, expected[key]) for key, value in outputs_of(twin, inputs).items())
    for site in model.token_pruner.sites.values():
        site.offset.fill_(-1000.0)
    assert all(torch.equal(value, expected[key]) for key, value in outputs_of(opened, inputs).items())
    assert not any(torch.equal(value, expected[key]) for key, value in outputs_of(model, inputs).items())


@pytest.mark.parametrize("missing", ["offset", "net.0.bias", "net.1.weight", "net.4.weight", "net.4.bias", ""])
def test_a_checkpoint_without_all_of_its_samplers_is_refused_at_latest_when_it_runs(tmp_path, missing):
    skimming("bert", "ForTokenClassification").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {key: value for key, value in tensors.items() if not key.startswith(f"token_pruner.sites.2.{missing}")}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(tp.errors.ConfigError, match="samplers"):
        tp.from_pretrained(tmp_path)(**make_inputs("bert", ""))


SETTINGS = {
    "no hidden size": {"width": 16},
    "hidden of 0": {"hidden": 0},
    "hidden as text": {"hidden": "32"},
    "hidden as bool": {"hidden": True},
    "hidden as a float": {"hidden": 32.0},
    "hidden of another model": {"hidden": 31},
    "hidden of a huge one": {"hidden": 1_000_000, "width": 10_000},
    "hidden beyond bounds": {"hidden": 2**40},
    "width of 0": {"hidden": 32, "width": 0},
    "width below 0": {"hidden": 32, "width": -1},
    "width beyond bounds": {"hidden": 32, "width": 2**40},
    "width as text": {"hidden": 32, "width": "16"},
    "width as nothing": {"hidden": 32, "width": None},
    "a setting of another kind": {"hidden": 32, "keep": 0.5},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_damaged_config_is_refused(tmp_path, what):
    model = skimming("bert", "Model", (1,))
    model.config.token_pruning["sites"][0]["selector"] = {"kind": "skim", **SETTINGS[what]}
    model.save_pretrained(tmp_path)
    with pytest.raises(tp.errors.ConfigError):
        tp.from_pretrained(tmp_path)


def test_a_sampler_of_another_width_of_model_is_refused():
    with pytest.raises(tp.errors.ConfigError, match="31 hidden units"):
        tp.attach(build("bert", "Model"), {1: Skim(31)})
    for layer in (DEPTH, -1):
        with pytest.raises(tp.errors.ConfigError, match="layer"):
            tp.attach(build("bert", "Model"), {layer: Skim(32)})


def test_the_sampler_by_itself():
    skim = Skim(32)
    assert skim.idle
    margin = torch.full((4, 2), 1.75) * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(skim.logits(torch.randn(4, 32)), margin)
    states, other = torch.randn(50, 32), sampler(0)
    plain = other.logits(states)
    other.offset.fill_(0.75)
    assert not other.idle
    torch.testing.assert_close(other.logits(states), plain + torch.tensor([0.0, 0.75]))
    assert other.macs(3) == 3 * (32 * 6 + 2 * 6)
    skim.reset()
    assert skim.offset.isnan()
    assert not skim.idle


# The softmax in which keys have weights.


def test_weighted_softmax_of_full_weights_is_the_softmax():
    scores = 20 * torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(weighted_softmax(scores, torch.ones(2, 1, 1, 5)), scores.softmax(-1))
    shares = weighted_softmax(scores.bfloat16(), torch.ones(2, 1, 1, 5))
    assert shares.dtype == torch.float32


def test_weighted_softmax_of_weights_0_and_1_is_the_softmax_of_the_keys_that_count():
    scores, kept = 20 * torch.randn(2, 3, 4, 6), [0, 2, 5]
    scores[..., 1] += 1000.0  # far above all others, and no key
    weight = torch.zeros(2, 1, 1, 6).index_fill(3, torch.tensor(kept), 1.0)
    shares = weighted_softmax(scores, weight)
    torch.testing.assert_close(shares[..., kept], scores[..., kept].softmax(-1))
    assert shares.sum(-1).allclose(torch.ones(2, 3, 4))
    assert not shares[..., [1, 3, 4]].any()


def test_weighted_softmax_of_weights_between_adds_their_logarithm():
    scores, weight = 3 * torch.randn(2, 4, 5), torch.rand(2, 1, 5) + 0.01
    torch.testing.assert_close(weighted_softmax(scores, weight), (scores + weight.log()).softmax(-1))


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 0.1, 0.9], [1.0, 0.3, 1.0, 1.0]])
def test_the_gradient_of_weighted_softmax(weight):
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([weight], dtype=torch.float64, requires_grad=True)
    # It computes in float32, hence the wide steps.
    assert torch.autograd.gradcheck(weighted_softmax, (scores, weight), eps=1e-2, atol=5e-3, rtol=5e-3)


def test_the_gradient_of_a_weight_of_0_is_what_a_weight_of_1_would_change():
    """However far above the others the key lies: that of [SEP], on which others rest, often does."""
    scores, alive = 4 * torch.randn(2, 3, 6), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    scores[0, :, 1] += 40
    weight = alive.repeat(2, 1, 1).requires_grad_()
    values = torch.randn(2, 6, 5)
    said = weighted_softmax(scores, weight) @ values
    told = torch.randn_like(said)
    (said * told).sum().backward()
    for dead in (1, 3):
        with torch.no_grad():
            back = weighted_softmax(scores, alive.index_fill(0, torch.tensor([dead]), 1.0).expand(2, 1, 6)) @ values
        # A query's share goes from 0 to s, and those of all others fall by the factor 1 - s.
        torch.testing.assert_close(weight.grad[:, 0, dead], ((back - said) * told).sum((1, 2)).detach(), atol=1e-4, rtol=1e-4)


def test_weighted_softmax_of_a_query_that_sees_no_key_that_counts():
    scores = torch.randn(2, 4).masked_fill(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool(), float("-inf")).requires_grad_()
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0]], requires_grad=True)
    shares = weighted_softmax(scores, weight)
    assert shares[0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(shares[1, 2:], scores[1, 2:].softmax(-1))
    (shares * torch.randn(2, 4)).sum().backward()
    assert scores.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert weight.grad.count_nonzero() == 4


def test_weighted_softmax_with_a_key_far_above_all_others_has_a_finite_gradient():
    scores = torch.tensor([[500.0, 1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    (weighted_softmax(scores, weight) * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert scores.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert weight.grad[0, 0] != 0


def test_a_quantised_sampler_reads_hidden_states_as_its_norm_does():
    """bitsandbytes puts weights of whole numbers in the place of those of each Linear."""

    class Quantised(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, torch.zeros(1, dtype=torch.int8)

        def forward(self, states):
            return self.inner(states)

    skim, states = sampler(0), torch.randn(7, 32)
    expected = skim.logits(states)
    skim.net[1] = Quantised(skim.net[1])
    assert torch.equal(skim.logits(states), expected)
