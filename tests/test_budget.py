"""The budget's arithmetic is that of a model that really drops tokens."""

import pytest
import torch
from families import FAMILIES, build, make_inputs

import hf_tokenprune as tp
from hf_tokenprune.budget import Budget, Lengths

BINS = 4
CASES = [
    (name, head)
    for name, row in FAMILIES.items()
    for head in ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
    if head in row.heads
]
SOME = [("bert", "ForSequenceClassification"), ("distilbert", "ForTokenClassification"), ("deit", "ForImageClassification")]
ALL = [1] * BINS
PATTERNS = ((ALL, ALL), ([1, 0, 0, 1], ALL), (ALL, [0, 1, 1, 1]), ([0, 1, 0, 1], [1, 0, 0, 0]), ([1, 0, 1, 0], [0] * BINS))


def model_of(name, head, learned=False):
    model = build(name, head)
    sizes = {"hidden": 32, "width": tp.cost.layer_costs(model)[1].attention // 2, "near": 2} if learned else {}
    return tp.attach(model, {layer: tp.RankBins(BINS, **sizes) for layer in (1, 2)})


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("name", "head"), CASES)
def test_share_is_what_a_really_pruned_model_spends(name, head, learned):
    """Texts of such lengths that each bin holds whole tokens, at the second site too; images of whatever their patches give. A scorer
    looks at whoever enters its site, if anybody is to go there."""
    model = model_of(name, head, learned)
    protected = model.token_pruner.family.summary_tokens
    inputs = make_inputs(name, head, lengths=[n + protected for n in (16, 8, 48, 16)])
    for patterns in PATTERNS if not learned else [pair for pair in PATTERNS if ALL not in pair]:
        for selector, pattern in zip(model.token_pruner.sites.values(), patterns, strict=True):
            selector.set_kept(pattern)
        with torch.no_grad():
            model(**inputs)
        trace = model.token_pruner.trace
        lengths = trace[0].entered
        droppable = [sum(n - protected for n in layer.survived) for layer in trace]
        kept = torch.tensor([droppable[1] / droppable[0], droppable[2] / max(droppable[1], 1)], dtype=torch.float64)
        if not FAMILIES[name].images:
            assert kept.tolist() == [sum(pattern) / BINS for pattern in patterns]
        spent = sum(tp.cost.trace_macs(model)) / sum(tp.cost.dense_macs(model, lengths))
        assert Budget(model).share(kept, Lengths.of(lengths, protected)).item() == pytest.approx(spent, rel=1e-9)


@pytest.mark.parametrize(("name", "head"), SOME)
def test_keeping_more_costs_more_and_most_so_at_an_early_site(name, head):
    budget = Budget(model_of(name, head))
    lengths = Lengths.of([9, 17, 25], budget.protected)
    for values in ((1.0, 1.0), (0.7, 0.4), (0.3, 0.05)):
        kept = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda shares: budget.share(shares, lengths), kept)
        (gradient,) = torch.autograd.grad(budget.share(kept, lengths), kept)
        assert gradient[0] / values[1] > gradient[1] / values[0] > 0


def test_nothing_dropped_spends_the_dense_share_but_for_a_pooled_last_layer():
    ones, lengths = torch.ones(2), Lengths.of([9, 17, 25], 1)
    assert Budget(model_of("bert", "ForTokenClassification")).share(ones, lengths).item() == pytest.approx(1)
    assert 0.75 < Budget(model_of("bert", "ForSequenceClassification")).share(ones, lengths).item() < 1


@pytest.mark.parametrize(("name", "head"), SOME)
def test_least_is_a_bound_that_texts_come_close_to(name, head):
    budget = Budget(model_of(name, head))
    spent = [budget.share(torch.zeros(2), Lengths.of([n], budget.protected)).item() for n in (4, 30, 60, 100, 300, 100_000)]
    assert budget.least() < min(spent) < 1.2 * budget.least()


def test_lengths_count_droppable_tokens_of_real_sequences():
    assert Lengths.of([4, 1, 0, 3], 1) == Lengths(3, protected=3, droppable=5, protected_squares=3, products=5, squares=13)
    assert Lengths.of([1], 2) == Lengths(1, protected=1, droppable=0, protected_squares=1, products=0, squares=0)
    assert Lengths.of([4, 0, 3], [2, 0, 1]) == Lengths(2, protected=3, droppable=4, protected_squares=5, products=6, squares=8)
    assert Lengths.of([], 1) == Lengths(0, 0, 0, 0, 0, 0)


def test_tokens_that_the_user_protects_are_counted_in_each_text():
    model = model_of("bert", "ForTokenClassification")
    inputs = make_inputs("bert", "ForTokenClassification", lengths=[17, 9, 33])
    some = inputs["input_ids"][:, 1].tolist()
    protected = 1 + torch.isin(inputs["input_ids"][:, 1:], torch.tensor(some)).sum(1)
    assert len(set(protected.tolist())) > 1
    sites = {int(layer): selector for layer, selector in model.token_pruner.sites.items()}
    for selector in sites.values():
        selector.set_kept([0] * BINS)
    tp.attach(model, sites, protected_token_ids=some)
    with torch.no_grad():
        model(**inputs)
    spent = sum(tp.cost.trace_macs(model)) / sum(tp.cost.dense_macs(model, [17, 9, 33]))
    lengths = Lengths.of([17, 9, 33], protected.tolist())
    assert Budget(model).share([0.0, 0.0], lengths) == pytest.approx(spent, rel=1e-9)
