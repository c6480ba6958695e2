"""Gates: the hard concrete distribution behaves as its closed forms say, and `scale_rate` is a learning rate."""

import math

import pytest
import torch
from families import build

import hf_tokenprune as tp
from hf_tokenprune import errors, gates
from hf_tokenprune.methods.top import TokenBins

ENDS = torch.tensor([-4.0, -1.0, 0.0, 1.5, 4.0])


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


@pytest.mark.parametrize("site_gates", [True, False])
def test_a_site_may_have_a_gate_of_its_own(site_gates):
    """Without one, as many tokens pass in training as are expected to; half open, it lets the others through as well."""
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.RankBins(8), 2: tp.RankBins(8)})
    bins = TokenBins(model, [1, 2], 8, in_order=False, site_gates=site_gates)
    assert (bins.size, bins.start().shape, int(bins.shifted().sum())) == (16 + 2 * site_gates, (bins.size,), 16)
    log_odds = torch.zeros(2, bins.gates)
    kept = gates.keep_probability(torch.tensor(0.0)).item()
    scores = bins.scores(gates.keep_probability(log_odds).flatten())
    torch.testing.assert_close(scores, torch.full((16,), 1 - kept * (1 - kept) if site_gates else kept))
    weights = torch.stack([bins.scores(gates.sample_hard_concrete(log_odds.flatten())) for _ in range(4000)])
    more = (weights > 0).double().mean() - scores.mean()
    assert more > 0.05 if site_gates else more.abs() < 0.02
