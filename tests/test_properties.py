"""Invariant 2 on what nobody thought of: random families, heads, batches, selectors, cuts and precisions, against the reference
that masks (`reference.py`).

Where two tokens are equally important but for rounding, a packed and a padded computation may drop different ones, and both are
right. So this reference does not choose. It follows the packed model's choice, once it has checked by its own numbers that this is
one of those the selector allows; then the outputs must be the same.
"""

import copy
import random

import pytest
import torch
from families import CASES, FAMILIES, VOCAB, build, make_inputs, padded_left
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from reference import Reference, Rule, bins, number, samples_of, share
from test_pruning import SUMMARY, rank_bins
from test_skim import MaskedReference, sampler

import hf_tokenprune as tp
from hf_tokenprune.modeling.architectures import find_encoder, get_layers
from hf_tokenprune.modeling.modeling_token_pruned import resize
from hf_tokenprune.modeling.selection import Skim
from hf_tokenprune.modeling.shapes import shape_map
from hf_tokenprune.modeling.sizes import sizes_of

# Positions are relative in these, so that it does not matter on which side of a text its padding is.
EITHER_SIDE = [name for name in FAMILIES if SUMMARY[name] < 0] + ["modernbert", "nomic_bert", "gte", "eurobert"]
PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")
RANKING = st.one_of(
    st.integers(1, 100).map(lambda percent: tp.TopK(percent / 100)),
    st.integers(1, 20).map(tp.TopK),
    st.lists(st.booleans(), min_size=1, max_size=30).map(lambda kept: rank_bins(*kept)),
)
SAMPLERS = st.builds(sampler, st.integers(0, 9), offset=st.integers(-8, 8).map(float))


@st.composite
def sites(draw, possible):
    """`{layer: selector}`; a sampler can be at any layer, others at the possible ones."""
    layers = sorted(draw(st.sets(st.integers(0, 3), min_size=1)))
    return {layer: draw(st.one_of(RANKING, SAMPLERS) if layer in possible else SAMPLERS) for layer in layers}


@st.composite
def cuts(draw, model, may_cut_hidden):
    """Arguments of `resize`: any number of heads, FFN units and hidden units, any of them."""
    hidden, heads, units = sizes_of(model)
    pick = random.Random(draw(st.integers(0, 99)))

    def some(counts):
        return [sorted(pick.sample(range(n), draw(st.integers(0, n)))) for n in counts]

    left = {"heads": some(heads), "units": some(units)}
    if not any(left["heads"] + left["units"]):
        left["heads"][0] = [0]
    few = draw(st.integers(1, hidden)) if may_cut_hidden and draw(st.booleans()) else hidden
    return {**left, "hidden": None if few == hidden else sorted(pick.sample(range(hidden), few))}


@st.composite
def examples(draw):
    """A model that drops tokens, and a batch for it: `(model, head, inputs, padded on the left?)`."""
    name, head = draw(st.sampled_from(CASES))
    row = FAMILIES[name]
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 5))
    inputs = make_inputs(name, head, lengths, seed=draw(st.integers(0, 99)), seq_len=width)
    model = tp.pack(build(name, head, seed=draw(st.integers(0, 9))))
    reads_first = model.token_pruner.pooled_head and row.summary > 0
    left = name in EITHER_SIDE and not reads_first and draw(st.booleans())
    ids = [] if row.images else sorted(draw(st.sets(st.integers(5, VOCAB - 1), max_size=20)))
    tp.attach(model, draw(sites(model.token_pruner.possible_sites())), protected_token_ids=ids)
    if row.weights and draw(st.booleans()):
        resize(model, **draw(cuts(model, row.hidden)))
    model.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    note(f"{name} {head} of {model.dtype}, lengths {lengths} of {width}, padded {'left' if left else 'right'}")
    note(f"sites {model.token_pruner.sites}, protected {ids}, shapes {shape_map(model)}")
    return model, name, inputs, left


class Follower(Reference):
    """The dense model, in which those tokens are masked that a packed model has dropped, if it was free to.

    Args:
        model: the packed model.
        tolerance: how far importance may be off by rounding, as a share of itself.
    """

    margin = MaskedReference._margin

    def __init__(self, model, summary, tolerance):
        pruner = model.token_pruner
        self.tolerance, self.samplers, rules = tolerance, {}, {}
        for layer, site in copy.deepcopy(pruner.sites).items():
            rules[int(layer)] = Rule(rule_of(site), summary, tuple(pruner.protected_ids))
            if isinstance(site, Skim):
                self.samplers[int(layer)] = site
        dense = tp.detach(copy.deepcopy(model))
        dense.config._attn_implementation = "eager"
        super().__init__(dense, rules, causal=summary < 0)
        if dense.config.model_type != "albert":  # it calls the one that it has again and again
            self.layers = get_layers(*find_encoder(dense, check=False))

    def follow(self, sample, chosen):
        """The outputs for one sample, of whose tokens `chosen[layer]` `(rows, length)` are those a packed model let pass."""
        self.chosen = chosen
        return laid_out(self(sample), sample)

    def _before(self, layer, args, kwargs):
        self.entered = args[0]
        if self.number in self.samplers:
            before = self.alive[-1] if self.alive else torch.ones(args[0].shape[:2], dtype=torch.bool)
            margins = self.margin(self.samplers[self.number], args[0]).float()
            alive = [self._sampled(row, before[row], margin) for row, margin in enumerate(margins)]
            self.alive[-1:] = [torch.stack(alive)]
        return super()._before(layer, args, kwargs)

    def _choice(self, row, alive):
        """`(living, protected, survivors)` as numbers of tokens, in the layer that is running."""
        living = alive.nonzero().flatten().tolist()
        protected = self._protected(self.sites[self.number], row, living)
        survivors = self.chosen[self.number][row].nonzero().flatten().tolist()
        assert survivors, "nothing is left of a sequence"
        assert set(survivors) <= set(living), "a dropped token came back"
        assert set(protected) <= set(survivors), "a protected token is gone"
        return living, protected, survivors

    def _sampled(self, row, alive, margin):
        living, protected, survivors = self._choice(row, alive)
        best = max(margin[living].tolist())
        for i in set(living) - set(protected):
            slack = self.tolerance * (1 + abs(margin[i].item()))
            stays = margin[i] > 0 or (margin[i] == best and not protected)
            might = abs(margin[i]) <= slack or (margin[i] >= best - slack and not protected)
            assert (i in survivors) == stays or might, f"token {i} of row {row} at layer {self.number}, margin {margin[i]}"
        return self.chosen[self.number][row]

    def _survivors(self, rule, row, alive):
        if rule.stays is None:
            return alive
        living, protected, survivors = self._choice(row, alive)
        received = self._received(row, living).float()
        scores = {i: received[i].item() for i in living if i not in protected}
        stays = [rule.stays(rank, len(scores)) or (rank == 0 and not protected) for rank in range(len(scores))]
        assert sum(i in survivors for i in scores) == sum(stays), "another number stays than the selector says"
        for i, score in scores.items():
            slack = self.tolerance * score
            first = sum(other > score + slack for other in scores.values())
            last = sum(other >= score - slack for other in scores.values()) - 1
            assert (i in survivors) in stays[first : last + 1], f"token {i} of row {row} at layer {self.number}, rank {first}"
        return self.chosen[self.number][row]


def rule_of(site):
    """What a selector promises, as a `Rule.stays`; None for a sampler, which looks before the layer."""
    if isinstance(site, Skim):
        return None
    if isinstance(site, tp.RankBins):
        return bins(site.kept.tolist())
    return (number if isinstance(site.share, int) else share)(site.share)


def laid_out(output, inputs):
    """The tensors of an output by name; those with an entry per token as `(real tokens, ...)`."""
    mask, named = inputs.get("attention_mask"), {}
    for key, value in output.items():
        if isinstance(value, torch.Tensor):
            per_token = mask is not None and (key in PER_TOKEN or (key == "logits" and value.ndim == 3))
            named[key] = value[mask.bool()] if per_token else value
    return named


def let_pass(model):
    """Which tokens of the padded batch the model's last forward let pass at each layer's site: `(B, S)` each."""
    for call in model.token_pruner.last_forward.calls:
        site = model.token_pruner.site(call.layer)
        batch = call.batch if isinstance(site, Skim) else call.survivors
        alive = torch.zeros(batch.batch_size * batch.seq_len, dtype=torch.bool)
        alive[batch.index] = True
        yield alive.view(batch.batch_size, batch.seq_len)


def check(model, name, inputs, left):
    """Run the model and the reference; see the module's docstring."""
    half = model.dtype == torch.bfloat16
    given_inputs = as_type(padded_left(inputs) if left else inputs, model.dtype)
    model.token_pruner.remembers = True
    with torch.no_grad():
        packed = laid_out(model(**given_inputs), given_inputs)
    passed = list(let_pass(model))
    real = given_inputs.get("attention_mask", torch.ones(passed[0].shape)).reshape(passed[0].shape).bool()
    assert not any((alive & ~real).any() for alive in passed), "padding is kept"
    own = follow(Follower(model, SUMMARY[name], 0.2 if half else 1e-4), as_type(inputs, model.dtype), passed, real)
    assert packed.keys() == own.keys()
    exact = follow(Follower(model.float(), SUMMARY[name], 0.2), inputs, passed, real) if half else own
    for key, value in packed.items():
        assert value.isfinite().all(), f"{key} is not finite"
        scale, error = exact[key].abs().max().clamp(min=1), (value.float() - exact[key]).abs().max()
        allowed = 4 * (own[key] - exact[key]).abs().max() + 0.03 * scale if half else 1e-5 * scale
        assert error <= allowed, f"{key} of scale {scale} is off by {error}, more than {allowed}"


def as_type(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def follow(reference, inputs, passed, real):
    """What the reference gives for each sample in turn, laid together like those of a batch."""
    samples = list(samples_of(inputs))
    rows = len(real) // len(samples)
    found = []
    for place, sample in enumerate(samples):
        these = slice(rows * place, rows * (place + 1))
        found.append(reference.follow(sample, [alive[these][real[these]].view(rows, -1) for alive in passed]))
    return {key: torch.cat([outputs[key] for outputs in found]).float() for key in found[0]}


ALWAYS_THE_SAME = {
    "derandomize": True, "database": None, "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}  # fmt: skip


@settings(max_examples=25, **ALWAYS_THE_SAME)
@given(examples())
def test_packed_equals_masked(example):
    check(*example)


@pytest.mark.slow
@settings(max_examples=1000, **ALWAYS_THE_SAME)
@given(examples())
def test_packed_equals_masked_a_thousand_times(example):
    check(*example)
