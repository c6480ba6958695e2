"""Losses against hand calculations, slow references and numerical gradients."""

import math

import pytest
import torch
from test_gates import double

from hf_tokenprune import losses

# constraint


@pytest.mark.parametrize("side", [1, -1])
def test_three_steps_of_the_lagrangian_by_hand(side):
    """SGD at rate 1 and a target of 0.5: the value falls by `first + 2 second v`, the multipliers rise by `v` and `v ** 2`. From
    below the target all is mirrored."""
    value, first, second = (torch.tensor(x, requires_grad=True) for x in (0.5 + side * 0.25, 0.0, 0.0))
    optimizer = torch.optim.SGD([value, first, second], lr=1.0)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = losses.lagrangian(value, 0.5, first, second)
        loss.backward()
        optimizer.step()
        seen.append([loss.item(), 0.5 + side * (value.item() - 0.5), side * first.item(), second.item()])
    assert seen == [
        [0.0, 0.75, 0.25, 0.0625],  # v = 0.25, multipliers 0
        [0.06640625, 0.46875, 0.5, 0.125],  # v = 0.25: 0.25 / 4 + 0.0625 / 16; slope 0.25 + 0.03125
        [-0.0155029296875, -0.0234375, 0.46875, 0.1259765625],  # v = -1 / 32: -1 / 64 + 1 / 8192; slope 0.5 - 1 / 128
    ]


def test_one_minimising_optimizer_meets_the_constraint():
    """Minimise (a - 1)^2 + (b - 2)^2 under a + b = 1: the optimum is a = 0, b = 1 with a first multiplier of 2."""
    a, b, first, second = (torch.zeros((), requires_grad=True) for _ in range(4))
    optimizer = torch.optim.Adam([a, b, first, second], lr=0.02, foreach=True)
    for _ in range(1500):
        optimizer.zero_grad()
        ((a - 1) ** 2 + (b - 2) ** 2 + losses.lagrangian(a + b, 1.0, first, second)).backward()
        optimizer.step()
    for found, optimum in ((a, 0.0), (b, 1.0), (first, 2.0)):
        assert found.item() == pytest.approx(optimum, abs=1e-2)


# bottleneck


def test_information_norm_by_hand():
    """Norms 5, 0 and 10 at width 2, weighted 1, 1 / 2 and 1 / 4: (5 + 0 + 2.5) / 3 / sqrt(2)."""
    states = double([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], requires_grad=True)
    keep = double([1.0, 0.5, 0.25], requires_grad=True)
    norm = losses.information_norm(states, keep)
    norm.backward()
    share = 3 * math.sqrt(2)
    assert norm.item() == pytest.approx(7.5 / share)
    torch.testing.assert_close(keep.grad, double([5.0, 0.0, 10.0]) / share)
    torch.testing.assert_close(states.grad, double([[0.6, 0.8], [0.0, 0.0], [0.15, 0.2]]) / share)


def test_information_norm_is_the_norm_of_the_weighted_states():
    states, keep = torch.randn(7, 5, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    expected = sum(math.sqrt(sum((p * x) ** 2 for x in h)) for p, h in zip(keep.tolist(), states.tolist(), strict=True))
    found = losses.information_norm(states, keep)
    assert found.item() == pytest.approx(expected / 7 / math.sqrt(5))
    assert losses.information_norm(states[None], keep) == found


@pytest.mark.parametrize("width", [8, 64, 768])
def test_information_norm_of_normalised_states_is_the_mean_keep_probability(width):
    states, keep = torch.nn.functional.layer_norm(torch.randn(20, width), (width,)), torch.rand(20)
    assert losses.information_norm(states, keep).item() == pytest.approx(keep.mean().item(), rel=1e-4)


def test_information_norm_is_finite_where_nothing_is_left():
    """A dropped token can be called back; a state of zeros is no infinite slope."""
    states = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    keep = torch.tensor([0.0, 0.0, 1.0], requires_grad=True)
    norm = losses.information_norm(states, keep)
    norm.backward()
    assert norm == 0
    assert (states.grad == 0).all()
    torch.testing.assert_close(keep.grad, torch.tensor([0.0, 5.0, 0.0]) / (3 * math.sqrt(2)))


def test_negative_entropy_by_hand():
    """Of 1 / 2: -log 2. Of 1 / 4: log(3) * 3 / 4 - log(4). Of 0 and 1: 0. The gradient is the logit, over the count."""
    keep = double([0.5, 0.25], requires_grad=True)
    entropy = losses.negative_entropy(keep)
    entropy.backward()
    assert entropy.item() == pytest.approx((-math.log(2) + 0.75 * math.log(3) - math.log(4)) / 2)
    torch.testing.assert_close(keep.grad, double([0.0, -math.log(3) / 2]))
    assert losses.negative_entropy(torch.tensor([0.0, 1.0, 1.0])) == 0


def test_negative_entropy_is_that_of_bernoulli_variables():
    keep = torch.rand(50, dtype=torch.float64)
    expected = -torch.distributions.Bernoulli(probs=keep).entropy().mean()
    torch.testing.assert_close(losses.negative_entropy(keep), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_entropy_pulls_away_from_both_ends_with_a_finite_gradient(dtype):
    keep = torch.tensor([0.0, 1e-3, 0.5, 1 - 1e-3, 1.0], dtype=dtype, requires_grad=True)
    losses.negative_entropy(keep).backward()
    slopes = (5 * keep.grad).tolist()
    assert slopes[0] == pytest.approx(-slopes[4])
    assert slopes[2] == 0
    assert -math.inf < slopes[0] < slopes[1] < 0 < slopes[3] < slopes[4] < math.inf
    assert slopes[3] == pytest.approx(math.log(999), rel=1e-4)


def test_bottleneck_gradients():
    states = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    keep = double([0.05, 0.2, 0.4, 0.6, 0.8, 0.95], requires_grad=True)
    assert torch.autograd.gradcheck(losses.information_norm, (states, keep))
    assert torch.autograd.gradcheck(losses.negative_entropy, keep)


def test_bottleneck_is_computed_in_float32_and_is_zero_without_tokens():
    states, keep = torch.randn(5, 4).bfloat16(), torch.rand(5).bfloat16()
    assert losses.information_norm(states, keep).equal(losses.information_norm(states.float(), keep.float()))
    assert losses.negative_entropy(keep).equal(losses.negative_entropy(keep.float()))
    assert losses.information_norm(states[:0], keep[:0]) == 0
    assert losses.negative_entropy(keep[:0]) == 0


# distillation


def test_logit_distillation_by_hand():
    student, teacher, temperature = [1.0, -1.0, 0.5], [0.2, 0.4, -2.0], 3.0

    def softened(logits):
        weights = [math.exp(x / temperature) for x in logits]
        return [w / sum(weights) for w in weights]

    expected = temperature**2 * sum(p * math.log(p / q) for p, q in zip(softened(teacher), softened(student), strict=True))
    found = losses.logit_distillation(torch.tensor([student] * 2), torch.tensor([teacher] * 2), temperature=temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_logit_distillation_counts_masked_rows_only():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    expected = losses.logit_distillation(student[mask], teacher[mask])
    student[~mask], teacher[~mask] = math.nan, math.inf
    student.requires_grad_()
    loss = losses.logit_distillation(student, teacher, mask=mask)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses.logit_distillation(student, teacher, mask=mask.long()), expected)
    assert (student.grad[~mask] == 0).all()
    assert (student.grad[mask] != 0).all()


def test_logit_distillation_without_rows_is_zero():
    student = torch.randn(2, 3, requires_grad=True)
    loss = losses.logit_distillation(student, torch.randn(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_distillation_gives_the_teacher_no_gradient_and_computes_in_float32():
    for loss_of in (losses.logit_distillation, losses.regression_distillation):
        student, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
        loss = loss_of(student.bfloat16(), teacher.bfloat16())
        loss.backward()
        assert loss.dtype == torch.float32
        assert student.grad is not None
        assert teacher.grad is None


def test_distillation_gradients():
    student, teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    for loss_of in (losses.logit_distillation, losses.regression_distillation):
        assert torch.autograd.gradcheck(lambda s, loss_of=loss_of: loss_of(s, teacher), student)


def test_regression_distillation_by_hand():
    found = losses.regression_distillation(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]]))
    assert found.item() == (1 + 9) / 2


# ranking


def slow_arp2(scores, relevance, length, sigma=1.0):
    total = 0.0
    for i in range(length):
        for j in range(length):
            if relevance[i] > relevance[j]:
                total += (relevance[i] - relevance[j]) * math.log2(1 + math.exp(-sigma * (scores[i] - scores[j])))
    return total


def ragged(width=9, lengths=(9, 5, 2, 1)):
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), width, dtype=torch.float64), mask, lengths


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_lambda_arp2_equals_nested_loops(sigma):
    scores, mask, lengths = ragged()
    relevance = torch.randint(0, 4, scores.shape)  # with ties
    expected = [slow_arp2(s, r, n, sigma) for s, r, n in zip(scores.tolist(), relevance.tolist(), lengths, strict=True)]
    found = losses.lambda_arp2(scores, relevance, mask, sigma=sigma)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found[-1] == 0


def test_lambda_arp2_is_finite_for_scores_far_apart():
    scores = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    loss = losses.lambda_arp2(scores, torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == pytest.approx(1000 / math.log(2))
    torch.testing.assert_close(scores.grad, torch.tensor([[-1.0, 1.0]]) / math.log(2))


def test_ranking_gradients():
    scores, mask, _ = ragged()
    teacher = torch.rand_like(scores)
    relevance = torch.randint(0, 4, scores.shape)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.lambda_arp2(s, relevance, mask), scores)
    assert torch.autograd.gradcheck(lambda s: losses.ranking_distillation(s, teacher, mask, top_k=4), scores)


@pytest.mark.parametrize("top_k", [3, 9, 20])
@pytest.mark.parametrize("scale", [None, 1.0, 7.0])
def test_ranking_distillation_equals_nested_loops(top_k, scale):
    """Including a `top_k` above the length, and rows with one token or none."""
    student, mask, lengths = ragged(lengths=(9, 5, 2, 1, 0))
    teacher = torch.rand_like(student)
    total = 0.0
    for row, n in enumerate(lengths):
        best = sorted(range(n), key=lambda i, row=row: -teacher[row, i])[:top_k]
        scores = [student[row, i].item() * (n if scale is None else scale) for i in best]
        total += slow_arp2(scores, list(range(len(best)))[::-1], len(best), sigma=0.7) / max(len(best), 1) ** 2
    found = losses.ranking_distillation(student, teacher, mask, top_k=top_k, scale=scale, sigma=0.7)
    assert found.item() == pytest.approx(total / len(lengths))


def test_the_teachers_order_costs_least():
    teacher = torch.randn(2, 12).softmax(1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    order = teacher.argsort(1)
    upside_down = torch.empty_like(teacher).scatter_(1, order, teacher.gather(1, order).flip(1))
    same, flat, reverse = (
        losses.ranking_distillation(s, teacher, mask) for s in (teacher, torch.full_like(teacher, 1 / 12), upside_down)
    )
    assert same < flat < reverse


def test_padding_and_tokens_beyond_top_k_have_no_part_in_the_ranking():
    student, mask, _ = ragged()
    teacher = torch.rand_like(student)
    expected = losses.ranking_distillation(student, teacher, mask, top_k=4)
    beyond = mask & (teacher.masked_fill(~mask, -1).argsort(1, descending=True).argsort(1) >= 4)
    student[~mask], teacher[~mask], student[beyond] = math.nan, math.inf, 99.0
    student.requires_grad_()
    teacher.requires_grad_()
    loss = losses.ranking_distillation(student, teacher, mask, top_k=4)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    part = mask & ~beyond
    part[-1] = False  # one token cannot be out of order
    assert (student.grad != 0).equal(part)
    assert teacher.grad is None


def test_the_default_scale_makes_the_loss_independent_of_the_length():
    """Importances `2 / n` and `0.5 / n` of two tokens cost the same whatever n is; unscaled, the order hardly shows."""
    found = {}
    for scale in (None, 1.0):
        for n in (8, 512):
            student = torch.full((1, n), 1.0)
            student[0, 0], student[0, 1] = 2.0, 0.5
            teacher = torch.arange(n, 0, -1.0)[None]
            found[scale, n] = losses.ranking_distillation(
                student / n, teacher, torch.ones(1, n, dtype=torch.bool), top_k=2, scale=scale
            ).item()
    ordered = math.log2(1 + math.exp(-1.5)) / 4
    assert found[None, 8] == pytest.approx(ordered)
    assert found[None, 512] == pytest.approx(ordered)
    assert found[1.0, 512] == pytest.approx(1 / 4, abs=1e-3)  # log2(2), as if the scores were equal


def test_teacher_ties_go_to_the_earlier_token():
    student = torch.tensor([[0.1, 0.2, 0.3]], requires_grad=True)
    losses.ranking_distillation(student, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), top_k=2).backward()
    assert student.grad[0, 0] < 0 < student.grad[0, 1]
    assert student.grad[0, 2] == 0


def test_ranking_is_computed_in_float32():
    student, teacher = torch.rand(2, 5).bfloat16(), torch.rand(2, 5).bfloat16()
    mask = torch.ones(2, 5, dtype=torch.bool)
    half = losses.ranking_distillation(student, teacher, mask)
    assert half.dtype == torch.float32
    assert half == losses.ranking_distillation(student.float(), teacher.float(), mask)
    assert losses.lambda_arp2(student, teacher, mask).equal(losses.lambda_arp2(student.float(), teacher.float(), mask))


# listwise ranking


@pytest.mark.parametrize("seed", range(5))
def test_listwise_is_the_divergence_of_shares_from_a_softmax(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, relevance = torch.randn(4, 7, generator=generator), torch.rand(4, 7, generator=generator)
    mask = torch.rand(4, 7, generator=generator) < 0.7
    mask[0], mask[1, 2], relevance[2] = True, True, 0
    mask[3] = False
    scores[~mask], relevance[~mask] = float("nan"), float("inf")
    scores.requires_grad_()
    loss = losses.listwise(scores, relevance, mask)
    expected = 0
    for row in range(2):
        y, s = relevance[row][mask[row]].double(), scores[row][mask[row]].detach().double()
        for share, score in zip((y / y.sum()).tolist(), s.tolist(), strict=True):
            expected += share * (math.log(share) - (score - math.log(s.exp().sum().item())))
    assert loss.item() == pytest.approx(expected / 4, abs=1e-6)
    loss.backward()
    assert scores.grad[~mask].eq(0).all()
    assert scores.grad[0].abs().min() > 0


def test_listwise_is_0_at_its_optimum():
    relevance, mask = torch.tensor([[3.0, 1.0, 0.0, 9.0]]), torch.tensor([[True, True, True, False]])
    scores = torch.tensor([[math.log(3) + 5, 5.0, -100.0, 0.0]], requires_grad=True)
    loss = losses.listwise(scores, relevance, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert scores.grad.abs().max() < 1e-6
