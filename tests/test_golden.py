"""Golden values: the formulae of gates and losses against hand calculation or a computation that shares nothing with them."""

import math

import pytest
import torch

from hf_tokenprune import gates, losses


def assert_frequency(events, probability):
    """Within four standard errors of a binomial proportion."""
    error = math.sqrt(probability * (1 - probability) / events.numel())
    assert abs(events.double().mean().item() - probability) < 4 * error


def double(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


# hard concrete: stretched to (-0.1, 1.1) at temperature 2 / 3


def hard_concrete_cdf(z, log_alpha):
    """P(gate <= z), or P(gate < 1) at 1: the u at which `sigmoid((logit(u) + log_alpha) * 3 / 2) * 1.2 - 0.1` is z."""
    concrete = (z + 0.1) / 1.2
    odds = (concrete / (1 - concrete)) ** (2 / 3) * math.exp(-log_alpha)
    return odds / (1 + odds)


def test_keep_probability_by_hand():
    """A gate is closed where the concrete variable is below 1 / 12, whose odds are 1 : 11."""
    edge = 11 ** (2 / 3)  # 4.9461: what log_alpha = 0 multiplies the odds of an open gate by
    found = gates.keep_probability(double([0.0, math.log(2), -math.log(edge), math.log(99 / edge)]))
    torch.testing.assert_close(found, double([edge / (1 + edge), 2 * edge / (1 + 2 * edge), 0.5, 0.99]))
    assert found[0].item() == pytest.approx(0.831822184, abs=1e-9)


@pytest.mark.parametrize("log_alpha", [-5.0, -1.2, 0.0, 0.8, 4.0])
def test_keep_probability_is_what_the_cdf_leaves_above_zero(log_alpha):
    assert gates.keep_probability(double(log_alpha)).item() == pytest.approx(1 - hard_concrete_cdf(0.0, log_alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_alpha", [-3.0, -1.5, 0.0, 1.0])
def test_sampled_gates_are_distributed_as_the_cdf_says(log_alpha, dtype):
    """Both atoms, and three quantiles between them."""
    z = gates.sample_hard_concrete(torch.full((200_000,), log_alpha, dtype=dtype))
    assert_frequency(z > 0, gates.keep_probability(double(log_alpha)).item())
    for bound in (0.0, 0.1, 0.5, 0.9):
        assert_frequency(z <= bound, hard_concrete_cdf(bound, log_alpha))
    assert_frequency(z == 1, 1 - hard_concrete_cdf(1.0, log_alpha))


def test_sampled_gates_by_hand():
    """`sigmoid(3 / 2 * log(odds))` of odds 4 is 8 / 9, of odds 1 / 4 is 1 / 9, of odds 9 is 27 / 28."""
    log_alpha = double([0.0, math.log(2), math.log(1 / 2), math.log(9), math.log(1 / 9)])
    noise = double([4 / 5, 2 / 3, 1 / 3, 1 / 2, 1 / 2])
    high, low = 8 / 9 * 1.2 - 0.1, 1 / 9 * 1.2 - 0.1
    torch.testing.assert_close(gates.sample_hard_concrete(log_alpha, noise=noise), double([high, high, low, 1.0, 0.0]))


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 0.7, 3.0])
def test_mean_gate_is_the_integral_of_its_survival_function(log_alpha):
    steps = 2000
    expected = sum(1 - hard_concrete_cdf((i + 0.5) / steps, log_alpha) for i in range(steps)) / steps
    z = gates.sample_hard_concrete(torch.full((200_000,), log_alpha, dtype=torch.float64))
    assert abs(z.mean().item() - expected) < 4 * z.std().item() / math.sqrt(len(z))


# straight-through Gumbel-softmax


def gumbel(noise):
    return -torch.log(-torch.log(noise))


def test_straight_through_by_hand():
    """Uniform numbers chosen so that the Gumbel noise is -1, 0, 1 or 2."""
    uniform = {g: math.exp(-math.exp(-g)) for g in (-1, 0, 1, 2)}
    logits = double([[0.0, 0.5], [0.0, 0.5], [2.5, 0.0], [2.5, 0.0]])
    noise = double([[uniform[0], uniform[0]], [uniform[1], uniform[0]], [uniform[0], uniform[2]], [uniform[-1], uniform[2]]])
    assert gates.sample_straight_through(logits, noise=noise).tolist() == [1, 0, 0, 1]  # leads of 0.5, -0.5, -0.5, 0.5


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_straight_through_is_exactly_0_or_1(temperature):
    decisions = gates.sample_straight_through(torch.randn(50, 40, 2, requires_grad=True), temperature=temperature)
    assert decisions.shape == (50, 40)
    assert decisions.requires_grad
    assert set(decisions.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize(("drop", "keep"), [(0.0, 0.0), (1.0, -0.5), (-1.0, 2.0), (5.0, 6.0)])
def test_straight_through_keeps_as_often_as_the_softmax_says(drop, keep, temperature):
    decisions = gates.sample_straight_through(torch.tensor([drop, keep]).expand(200_000, 2), temperature=temperature)
    assert_frequency(decisions, 1 / (1 + math.exp(drop - keep)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_straight_through_has_the_gradient_of_the_soft_sample(temperature):
    logits, noise = torch.randn(6, 3, 2, dtype=torch.float64), torch.rand(6, 3, 2, dtype=torch.float64)
    weight = torch.randn(6, 3, dtype=torch.float64)
    soft, hard = (logits.clone().requires_grad_() for _ in range(2))

    def relaxed(x):
        return ((x + gumbel(noise)) / temperature).softmax(-1)[..., 1]

    (weight * relaxed(soft)).sum().backward()
    (weight * gates.sample_straight_through(hard, temperature=temperature, noise=noise)).sum().backward()
    torch.testing.assert_close(hard.grad, soft.grad)

    step = torch.zeros_like(logits)
    step[2, 1, 1] = 1e-6
    slope = (weight * (relaxed(logits + step) - relaxed(logits - step))).sum() / 2e-6
    assert hard.grad[2, 1, 1].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


def test_straight_through_gradient_by_hand():
    """Equal noise cancels: s = sigmoid(log 3) = 3 / 4, gradient s (1 - s) / temperature to keep, its negative to drop."""
    logits = double([[0.0, math.log(3) / 2]], requires_grad=True)
    gates.sample_straight_through(logits, temperature=0.5, noise=torch.full_like(logits, 0.5)).sum().backward()
    torch.testing.assert_close(logits.grad, double([[-3 / 8, 3 / 8]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_through_survives_noise_at_its_ends(dtype):
    logits = torch.zeros(4, 2, dtype=dtype, requires_grad=True)
    noise = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    decisions = gates.sample_straight_through(logits, noise=noise)
    decisions.sum().backward()
    assert decisions.tolist() == [1, 0, 0, 0]
    assert logits.grad.isfinite().all()


def test_straight_through_draws_uniform_noise_of_its_own():
    logits = torch.randn(100, 2)
    torch.manual_seed(3)
    noise = torch.rand(100, 2)
    torch.manual_seed(3)
    assert gates.sample_straight_through(logits).equal(gates.sample_straight_through(logits, noise=noise))
    assert gates.sample_straight_through(logits.bfloat16()).dtype == torch.float32
    assert gates.sample_straight_through(logits.double()).dtype == torch.float64


# lagrangian


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


# layer match


def constant_layers(*values):
    """A layer of two tokens and three units per value."""
    return [torch.full((2, 3), float(x)) for x in values]


def test_layer_distances_by_hand():
    student = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2), torch.ones(2, 2)]
    teacher = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.full((2, 2), 2.0)]
    expected = [[(4 + 16) / 4, (1 + 9) / 4, (1 + 4 + 1) / 4], [(1 + 1 + 4) / 4, 4.0, 1.0]]
    assert losses.layer_distances(student, teacher).tolist() == expected


def test_layer_distances_equal_nested_loops():
    student, teacher = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = [
        [sum((s[t][h] - x[t][h]) ** 2 for t in range(5) for h in range(3)) / 15 for s in student.tolist()]
        for x in teacher.tolist()
    ]
    torch.testing.assert_close(losses.layer_distances(list(student), list(teacher)), double(expected))


DISTANCES = [[3.0, 1.0, 2.0, 9.0], [4.0, 0.5, 7.0, 0.25], [6.0, 5.0, 5.0, 8.0]]  # the last with a tie


@pytest.mark.parametrize(
    ("alive", "match"),
    [
        ([True, True, True, True], [1, 3, 1]),
        ([True, False, True, False], [2, 0, 2]),
        ([True, True, True, False], [1, 1, 1]),
        ([False, False, False, True], [3, 3, 3]),
        ([False, False, False, False], [1, 3, 1]),
    ],
)
@pytest.mark.parametrize("container", [list, torch.tensor])
def test_match_by_hand(alive, match, container):
    distances = torch.tensor(DISTANCES, requires_grad=True)
    found = losses.match_layers(distances, container(alive))
    assert found.dtype == torch.int64
    assert found.tolist() == match
    assert not found.requires_grad
    assert distances.tolist() == DISTANCES


def test_layer_distillation_by_hand():
    """Teacher 1 is nearest to 0 (distance 1), as 1.5 is gone; teacher -4 to 0 (16), teacher 5 to 6 (1)."""
    student, teacher = constant_layers(0, 1.5, 6), constant_layers(1, -4, 5)
    for states in (*student, *teacher):
        states.requires_grad_()
    loss, match = losses.layer_distillation(student, teacher, [True, False, True])
    loss.backward()
    assert loss.item() == (1 + 16 + 1) / 3
    assert match.tolist() == [0, 0, 2]
    torch.testing.assert_close(student[0].grad, torch.full((2, 3), (2 * (0 - 1) + 2 * (0 + 4)) / 6 / 3))
    torch.testing.assert_close(student[2].grad, torch.full((2, 3), 2 * (6 - 5) / 6 / 3))
    assert student[1].grad is None
    assert all(states.grad is None for states in teacher)


def test_layer_distillation_is_the_mean_of_the_smallest_distances():
    student, teacher = list(torch.randn(5, 4, 3)), list(torch.randn(3, 4, 3))
    student[1] = teacher[0]  # nearest, but pruned
    alive = [True, False, True, True, False]
    distances = losses.layer_distances(student, teacher)
    loss, match = losses.layer_distillation(student, teacher, alive)
    torch.testing.assert_close(loss, distances[:, alive].min(1).values.mean())
    assert match.equal(losses.match_layers(distances, alive))


def test_a_pruned_layer_may_hold_anything():
    student = constant_layers(0, math.nan, math.inf)
    for states in student:
        states.requires_grad_()
    loss, match = losses.layer_distillation(student, constant_layers(3), [True, False, False])
    loss.backward()
    assert (loss.item(), match.tolist()) == (9, [0])
    assert student[0].grad.isfinite().all()


def test_the_match_follows_the_transformed_states():
    """Teachers 3 and 8, layers 1 and 4 times a trained scale: at 1 both take layer 4, later the first takes layer 1.

    The scale then minimises `(s - 3) ** 2 + (4 s - 8) ** 2`: 35 / 17.
    """
    scale = torch.tensor(1.0, requires_grad=True)
    optimizer, matches = torch.optim.SGD([scale], lr=0.02), []
    for _ in range(40):
        optimizer.zero_grad()
        student = [states * scale for states in constant_layers(1, 4)]
        loss, match = losses.layer_distillation(student, constant_layers(3, 8), [True, True])
        loss.backward()
        optimizer.step()
        matches.append(match.tolist())
    assert matches[0] == [1, 1]
    assert matches[-1] == [0, 1]
    assert scale.item() == pytest.approx(35 / 17, abs=1e-3)


def test_only_tokens_that_both_layers_have_count():
    student = [torch.tensor([[1.0], [5.0], [9.0]]), torch.tensor([[2.0], [4.0], [9.0]])]
    teacher = [torch.tensor([[3.0], [3.0], [0.0]]), torch.tensor([[0.0], [0.0], [8.0]])]
    there = (torch.tensor([[1, 1, 0], [1, 0, 1]]).bool().unbind(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool().unbind())
    # First teacher layer: tokens 0 and 1 with the first student layer, token 0 with the second.
    expected = [[(4 + 4) / 2, 1.0], [(1 + 25) / 2, (4 + 1) / 2]]
    assert losses.layer_distances(student, teacher, there).tolist() == expected
    loss, match = losses.layer_distillation(student, teacher, [True, True], there)
    assert (loss.item(), match.tolist()) == ((1.0 + 2.5) / 2, [1, 1])


def test_layer_match_gradients():
    states = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher = list(torch.randn(2, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: losses.layer_distances(s.unbind(), teacher), states)
    assert torch.autograd.gradcheck(lambda s: losses.layer_distillation(s.unbind(), teacher, [True, False, True])[0], states)


def test_layer_match_is_computed_in_float32():
    student, teacher = ([states.bfloat16() for states in torch.randn(3, 4, 2)] for _ in range(2))
    wide_student, wide_teacher = ([states.float() for states in layers] for layers in (student, teacher))
    assert losses.layer_distances(student, teacher).equal(losses.layer_distances(wide_student, wide_teacher))
    loss, _ = losses.layer_distillation(student, teacher, [True] * 3)
    assert loss.equal(losses.layer_distillation(wide_student, wide_teacher, [True] * 3)[0])
