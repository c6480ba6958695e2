"""Gates on weights, and on tokens with them, keep to one budget, and what is worth least per cost goes first."""

import pytest
import torch
from families import build, make_inputs, outputs_of
from training_helpers import Texts, collate, no_dropout
from weights_helpers import HEAD, INPUTS, PLAN, both, dense, layers_left, said, weights

import hf_tokenprune as tp
from hf_tokenprune.budget import Lengths
from hf_tokenprune.cost import CostMeter, layer_costs
from hf_tokenprune.gates import keep_probability, sample_hard_concrete
from hf_tokenprune.methods.token_bins import TokenBins
from hf_tokenprune.schedule import Moment
from hf_tokenprune.surgery import operate


def gated(method, name="bert", head=HEAD, **overrides):
    """A model with gates at the start of a run, in training mode, and the gates."""
    model = tp.TokenPruneCallback(method).attach(build(name, head, **no_dropout(name), **overrides)).train()
    model.token_pruner.objective.start_run(1e-3, {"static": 100, "anneal": 100})
    return model, model.token_pruner.objective.gates


def randomise(gates, progress, seed=0):
    """Random log-odds, as if learned, at some point of the annealing."""
    gates.progress = progress
    with torch.no_grad():
        gates.state.start.copy_(2 * torch.randn(len(gates.state.start), generator=torch.Generator().manual_seed(seed)))


USELESS = {("heads", 0): [1, 2], ("heads", 2): [0], ("units", 1): list(range(10, 20)), ("units", 3): [0, 47]}


def test_what_has_no_influence_goes_first():
    """Nobody reads of these heads and units; what was measured says so, and no more than they are is cut."""
    model, gates = gated(weights(parts=("heads", "units")))
    structure, layers = model.token_pruner.structure, model.bert.encoder.layer
    wanted = torch.ones(gates.state.start.shape)
    with torch.no_grad():
        for (part, layer), numbers in USELESS.items():
            wanted[structure.layout.parts[part, layer]][numbers] = 0
            width, reader = (8, layers[layer].attention.output) if part == "heads" else (1, layers[layer].output)
            for number in numbers:
                reader.dense.weight[:, number * width : (number + 1) * width] = 0
    objective, batches = model.token_pruner.objective, collate(list(Texts(32)))
    for part in range(4):
        objective.moment = Moment("anneal", 0.03 * part)
        model(**{key: value[8 * part : 8 * part + 8] for key, value in batches.items()}).loss.backward()
        objective.end_step()
    assert gates.state.log_odds.grad.abs().max() == 0, "while measuring nothing is learned"
    information = gates.state.information.clone()
    gates.final = float(gates.share([wanted.double()])) + 1e-6
    objective.moment = Moment("anneal", 1.0)
    objective.harden()
    assert torch.equal(information > 0, wanted > 0)
    assert torch.equal(structure.hard, wanted)
    torch.testing.assert_close(said(model, INPUTS), said(model, INPUTS, gated=False), atol=1e-5, rtol=0)
    gates.final -= 0.01
    objective.harden()
    assert (structure.hard <= wanted).all()
    assert (structure.hard < wanted).any()


def test_information_counts_per_cost():
    """Of equal information, what costs more goes first; the cost is that of a model that was really cut."""
    _, gates = gated(weights(parts=("heads", "units")))
    gates.state.information.fill_(3.0)
    gates.progress = 0.5
    gates.log_alpha()
    gates.harden(gated=True)

    def spends(heads, units):
        model = operate(
            tp.pack(dense()), heads=[range(4), range(heads), range(4), range(4)], units=[range(48), range(units)] * 2
        )
        return sum(shape.macs(entered=[101], queries=[101], survived=[101]) for shape in layer_costs(model)[:2])

    ratio = (spends(4, 48) - spends(3, 48)) / (spends(4, 48) - spends(4, 47))
    layout = gates.parts[0].layout
    head, unit = (gates.state.start[layout.parts[name].start].item() for name in (("heads", 1), ("units", 1)))
    assert unit - head == pytest.approx(gates.PER_NEPER * torch.tensor(ratio).log().item(), abs=1e-4)
    assert ratio > 10
    assert gates.state.information.abs().max() == 0, "used once"


def starts(method, monkeypatch, lasting=TokenBins.lasting):
    """Where gates start if the same was measured of all, and how many of them are on tokens."""
    monkeypatch.setattr(TokenBins, "lasting", lasting)
    _, gates = gated(method)
    gates.state.information.fill_(3.0)
    gates.progress = 0.5
    gates.harden(gated=True)
    return gates.state.start, gates.parts[-1].size


def test_tokens_outlast_weights(monkeypatch):
    """They are ahead of where their information would put them; among themselves that makes no difference."""
    method = both(parts=("units",), tokens=tp.ToP(rank_bins=8))
    (plain, tokens), (ahead, _) = (starts(method, monkeypatch, *lasting) for lasting in ((0.0,), ()))
    torch.testing.assert_close(ahead - plain, 2 * 5.0 * (torch.arange(len(plain)) >= len(plain) - tokens))
    alone = [starts(tp.ToP(target_macs=0.5, rank_bins=8, schedule=PLAN), monkeypatch, lasting)[0] for lasting in (0.0, 5.0)]
    torch.testing.assert_close(*alone)


def test_no_information_is_too_far_off_to_count():
    """Units that cost the same start in the order of what was measured, over 10 orders of magnitude: none share a start."""
    _, gates = gated(weights(parts=("units",)))
    with torch.no_grad():
        gates.state.information.copy_(torch.logspace(-5, 5, gates.parts[0].size))
    gates.progress = 0.5
    gates.log_alpha()
    gates.harden(gated=True)
    assert all((gates.state.start[where].diff() > 0).all() for where in gates.parts[0].layout.parts.values())
    assert gates.state.start.abs().max() > 12
    assert gates.state.start.abs().max() < 13


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("make", [weights, lambda **s: weights(target_params=0.4, **s), both], ids=["macs", "params", "both"])
def test_the_gradient_is_orthogonal_to_that_of_the_cost(make, constraint):
    """So that the task's loss shifts the budget from one gate to another, and never spends more or less."""
    model, gates = gated(make(constraint=constraint))
    randomise(gates, 0.6)
    model.token_pruner.soft = {}
    gates.open()
    loss = (model.token_pruner.structure.soft * torch.linspace(-1, 2, gates.sizes[0])).sum()
    loss = loss + sum(soft.weights.square().sum() for soft in model.token_pruner.soft.values())
    loss.backward()
    gradient = gates.state.log_odds.grad
    log_alpha = gates.log_alpha().detach().requires_grad_()
    (normal,) = torch.autograd.grad(gates.share(gates.scores(keep_probability(log_alpha))), log_alpha)
    cosine = torch.nn.functional.cosine_similarity(gradient, normal, dim=0).abs()
    assert gradient.norm() > 0.1
    assert cosine < 1e-4 if constraint == "projected" else cosine > 0.05


@pytest.mark.parametrize("progress", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("make", [weights, lambda: weights(target_params=0.4), both], ids=["macs", "params", "both"])
def test_the_expected_share_is_the_target_whatever_was_learned(make, progress):
    _, gates = gated(make())
    for seed in range(3):
        randomise(gates, progress, seed)
        expected = gates.share(gates.scores(keep_probability(gates.log_alpha()))).item()
        assert expected == pytest.approx(gates.target(), abs=1e-4)
    assert gates.target() == pytest.approx(gates.final) if progress >= 0.83 else gates.target() > gates.final


@pytest.mark.parametrize("make", [weights, lambda: weights(target_params=0.4), both], ids=["macs", "params", "both"])
def test_the_most_probable_meets_the_target_and_no_more_would(make):
    _, gates = gated(make())
    gates.progress = 1.0
    for seed in range(20):
        torch.manual_seed(seed)
        gates.final = (0.15, 0.3, 0.6, 0.8)[seed % 4]
        log_odds = torch.rand(len(gates.state.start)).double().logit()
        kept = gates._most_probable(log_odds)
        pieces = zip(gates.parts, log_odds.split(gates.sizes), strict=True)
        scores = [part.score_log_odds(piece) + part.tie_break() for part, piece in pieces]
        for piece, probable in zip(scores, gates.scores(log_odds.sigmoid()), strict=True):
            torch.testing.assert_close(piece.sigmoid(), probable, atol=1e-6, rtol=0)
        levels = [*torch.cat(scores).unique().tolist(), float("inf")]
        choices = [[part.choose(s, x) for part, s in zip(gates.parts, scores, strict=True)] for x in levels]
        shares = [float(gates.share([piece.double() for piece in choice])) for choice in choices]
        assert float(gates.share([piece.double() for piece in kept])) == max(x for x in shares if x <= gates.final)


@pytest.mark.parametrize(
    "make", [weights, lambda **s: both(tokens=tp.ToP(rank_bins=8, site_gates=True), **s)], ids=["macs", "both"]
)
def test_gates_that_are_all_but_certain_are_told_apart(make):
    """Their probabilities are 1 to the last bit, of many more than the target has room for."""
    _, gates = gated(make(target_macs=0.4), hidden_size=384)
    randomise(gates, 1.0)
    with torch.no_grad():
        gates.state.start.mul_(30)
    assert (keep_probability(gates.log_alpha()) == 1).float().mean() > 0.3
    assert 0.36 < gates.harden(gated=True) <= 0.4 + 1e-5


@pytest.mark.parametrize("name", ["macs", "lagrangian", "both"])
def test_gates_that_are_all_the_same_meet_the_target(name):
    """As after a first step in which nothing was learned: no layer goes, and none is cut more than others."""
    make = {"macs": weights, "lagrangian": lambda **s: weights(constraint="lagrangian", **s), "both": both}[name]
    model, gates = gated(make(target_macs=0.4))
    gates.progress = 1.0
    gates.state.start.zero_()
    assert 0.3 < gates.harden(gated=True) <= 0.4
    _, heads, units = gates.parts[0].layout.left(model.token_pruner.structure.hard)
    assert min(map(len, heads)) == max(map(len, heads)) > 0
    assert min(map(len, units)) == max(map(len, units)) > 0


def test_large_groups_are_cut_to_multiples_of_16():
    """As matrix products like it; those of the highest probability are what fills them up."""
    _, gates = gated(weights(), hidden_size=128, intermediate_size=160, num_hidden_layers=2)
    gates.progress, layout = 1.0, gates.parts[0].layout
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        probability = torch.rand(layout.size).double()
        gates.final = (0.2, 0.4, 0.6)[seed % 3]
        (kept,) = gates._most_probable(probability.logit())
        hidden, _, units = layout.left(kept.double())
        counts = [128 if hidden is None else len(hidden), *map(len, units)]
        assert all(count % 16 == 0 for count in counts)
        sizes.update(counts)
        for where in layout.parts.values():
            some = kept[where]
            if some.any() and not some.all():
                assert probability[where][some].min() >= probability[where][~some].max()
    assert len(sizes) > 5


SHARES = [(name, HEAD) for name in ("bert", "distilbert", "esm")]
SHARES += [("modernbert", "ForTokenClassification"), ("vit", "ForImageClassification")]


@pytest.mark.parametrize(("name", "head"), SHARES, ids=[name for name, _ in SHARES])
def test_the_share_of_hard_gates_is_what_the_cut_model_spends(name, head):
    inputs = make_inputs(name, head)
    lengths = [37] * 5 if name == "vit" else [17, 5, 30, 17, 1]
    equal = 0
    for seed in range(8):
        model, gates = gated(weights(), name, head)
        (part,) = gates.parts
        kept = part.choose(torch.rand(part.size, generator=torch.Generator().manual_seed(seed)), 0.3 + 0.05 * seed)
        meter = CostMeter(model)
        seen = Lengths.of(lengths, gates.budget.protected)
        expected = float(gates.share([kept.double()], seen))
        hidden, heads, units = part.layout.left(kept)
        if not any(map(len, (*heads, *units))):
            continue
        operate(model, hidden=hidden, heads=heads, units=units)
        outputs_of(model.eval(), inputs)
        meter.update()
        spent = 1 / meter.cost.true_length_reduction
        if heads[-1] or units[-1] or not model.token_pruner.pooled_head:
            equal += 1
            assert spent == pytest.approx(expected, rel=1e-5)
        else:  # now the layer before computes no more than the pooled token, which nobody could know
            assert spent < expected
    assert equal >= 4


def test_the_share_of_parameters_is_what_the_cut_model_has():
    for seed in range(4):
        model, gates = gated(weights(target_params=0.4))
        (part,) = gates.parts
        kept = part.choose(torch.rand(part.size, generator=torch.Generator().manual_seed(seed)), 0.4)
        expected = float(gates.share([kept.double()]))
        hidden, heads, units = part.layout.left(kept)
        operate(model, hidden=hidden, heads=heads, units=units)
        assert layers_left(model) == pytest.approx(expected, rel=1e-5)


def test_the_shift_is_solved_for_once_a_step(monkeypatch):
    """Nothing has changed between the hard model after one step and the forwards of the next."""
    _, gates = gated(weights())
    randomise(gates, 0.5)
    solved, real = [], gates.share
    monkeypatch.setattr(gates, "share", lambda scores, lengths=None: solved.append(1) or real(scores, lengths))
    first = gates.log_alpha()
    count = len(solved)
    assert count > gates.ROUNDS
    assert torch.equal(gates.log_alpha(), first)
    assert len(solved) - count < gates.ROUNDS, "the target asks for what everything costs, and no more"
    gates.progress = 0.6
    assert not torch.equal(gates.log_alpha(), first)
    gates.progress = 0.5
    with torch.no_grad():
        gates.state.start[0] += 1
    again = gates.log_alpha()
    assert not torch.equal(again, first)


@pytest.mark.parametrize("parts", [("blocks",), ("blocks", "heads", "units"), None])
@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification"])
def test_something_is_left_whatever_is_asked_for(parts, head, caplog):
    """Not even one block fits into a millionth; that is said while annealing, rather than at its end that nothing would be left."""
    model, gates = gated(weights(target_macs=1e-6, parts=parts), head=head)
    randomise(gates, 1.0)
    objective = model.token_pruner.objective
    objective.moment = Moment("anneal", 1.0)
    objective.harden()
    assert "cannot be reached" in caplog.text
    hidden, heads, units = model.token_pruner.structure.layout.left(model.token_pruner.structure.hard)
    assert sum(bool(len(some)) for some in (*heads, *units)) == 1
    operate(model, **dict(zip(("hidden", "heads", "units"), (hidden, heads, units), strict=True)))
    assert model.eval()(**make_inputs("bert", head)).logits.isfinite().all()


@pytest.mark.parametrize("site_gates", [True, False])
def test_a_site_may_have_a_gate_of_its_own(site_gates):
    """Without one, as many tokens pass in training as are expected to; half open, it lets the others through as well."""
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.RankBins(8), 2: tp.RankBins(8)})
    bins = TokenBins(model, [1, 2], 8, in_order=False, site_gates=site_gates)
    assert (bins.size, bins.start().shape, int(bins.shifted().sum())) == (16 + 2 * site_gates, (bins.size,), 16)
    log_odds = torch.zeros(2, bins.gates)
    kept = keep_probability(torch.tensor(0.0)).item()
    scores = bins.scores(keep_probability(log_odds).flatten())
    torch.testing.assert_close(scores, torch.full((16,), 1 - kept * (1 - kept) if site_gates else kept))
    weights = torch.stack([bins.scores(sample_hard_concrete(log_odds.flatten())) for _ in range(4000)])
    more = (weights > 0).double().mean() - scores.mean()
    assert more > 0.05 if site_gates else more.abs() < 0.02
