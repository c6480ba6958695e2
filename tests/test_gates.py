"""Gates: hard concrete and straight-through samples are what hand calculations and closed forms say, and `scale_rate` is a
learning rate."""

import math

import pytest
import torch

from hf_tokenprune import errors, gates

ENDS = torch.tensor([-4.0, -1.0, 0.0, 1.5, 4.0])


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


def test_noise_at_its_ends_is_harmless():
    log_alpha = torch.tensor([0.0, 0.0, 20.0, -20.0], requires_grad=True)
    z = gates.sample_hard_concrete(log_alpha, noise=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    z.sum().backward()
    assert z.tolist() == [0, 1, 1, 0]
    assert log_alpha.grad.tolist() == [0, 0, 0, 0]


def test_gradients():
    log_alpha = torch.tensor([-0.5, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: gates.sample_hard_concrete(a, noise=noise), log_alpha)
    assert torch.autograd.gradcheck(gates.keep_probability, log_alpha)


def test_a_closed_gate_has_no_gradient():
    log_alpha = torch.tensor([-6.0, 0.0], requires_grad=True)
    gates.sample_hard_concrete(log_alpha, noise=torch.tensor([0.5, 0.5])).sum().backward()
    assert log_alpha.grad[0] == 0
    assert log_alpha.grad[1] > 0


@pytest.mark.parametrize("function", [gates.sample_hard_concrete, gates.keep_probability])
def test_half_precision_is_computed_in_float32(function):
    assert function(ENDS.bfloat16()).dtype == torch.float32
    assert function(ENDS.double()).dtype == torch.float64


@pytest.mark.parametrize("probability", [1e-6, 0.05, 0.5, 0.95, 0.999999])
def test_log_alpha_for_is_the_inverse_of_keep_probability(probability):
    log_alpha = gates.log_alpha_for(probability)
    assert isinstance(log_alpha, float)
    assert gates.keep_probability(torch.tensor(log_alpha, dtype=torch.float64)).item() == pytest.approx(probability)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, 1.1, math.nan, 1, True, "0.5", None])
def test_log_alpha_for_refuses_what_is_no_probability_of_both(probability):
    with pytest.raises(errors.ConfigError, match="above 0 and below 1"):
        gates.log_alpha_for(probability)


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


# the rate of a gate


def test_scale_rate_scales_forward_only():
    parameter = torch.tensor([1.0, -2.0], requires_grad=True)
    scaled = gates.scale_rate(parameter, 500.0)
    (scaled * torch.tensor([3.0, 4.0])).sum().backward()
    assert scaled.tolist() == [500, -1000]
    assert parameter.grad.tolist() == [3, 4]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_scale_rate_is_a_learning_rate(optimizer):
    """A gate with `scale` ends where a plain parameter ends whose learning rate is `scale` times as high."""
    plain, stored = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (2.0, 0.0))
    slow, fast = optimizer([stored], lr=1e-4), optimizer([plain], lr=1e-2)
    for _ in range(30):
        for weight, value, step in ((plain, plain, fast), (stored, 2.0 + gates.scale_rate(stored, 100.0), slow)):
            weight.grad = None
            (value**2).backward()
            step.step()
    assert plain.item() < 1.9
    assert (2.0 + 100.0 * stored).item() == pytest.approx(plain.item(), abs=1e-6)
