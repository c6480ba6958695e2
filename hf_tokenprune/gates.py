"""Gates: learned relaxations of a keep-or-drop decision.

The hard concrete distribution (Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization",
arXiv 1712.01312): a concrete variable is stretched from (0, 1) to `(LOW, HIGH)` and clamped back, so that a gate is exactly 0
or exactly 1 with a probability above zero and has a gradient in between. `log_alpha`, of any shape, is what is learned.
"""

import math

import torch

from .errors import ConfigError

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # the log_alpha of a gate that is open half of the time


def sample_hard_concrete(log_alpha, *, noise=None):
    """Draw one gate per entry of `log_alpha` (equations 10 and 11 of the paper).

    Args:
        log_alpha: any shape; the higher, the more often the gate is open.
        noise: uniform (0, 1) numbers of the same shape; drawn with `torch.rand` if None.

    Returns:
        Gates in [0, 1] of the same shape, at least float32. A gate that is exactly 0 or 1 passes no gradient to `log_alpha`.

    Example:
        >>> sample_hard_concrete(torch.tensor([-20.0, 0.0, 20.0]), noise=torch.full((3,), 0.5))
        tensor([0.0000, 0.5000, 1.0000])
    """
    log_alpha = _at_least_float32(log_alpha)
    if noise is None:
        noise = torch.rand_like(log_alpha)
    concrete = torch.sigmoid((torch.logit(noise.to(log_alpha.dtype), eps=1e-6) + log_alpha) / TEMPERATURE)
    return _stretch(concrete)


def keep_probability(log_alpha):
    """How probable it is that a sampled gate is not 0 (equation 12 of the paper). Differentiable; summed, the expected L0 norm.

    Args:
        log_alpha: any shape.

    Returns:
        `P(z > 0)` of the same shape, at least float32.

    Example:
        >>> keep_probability(torch.tensor([-20.0, 0.0, 20.0]))
        tensor([1.0195e-08, 8.3182e-01, 1.0000e+00])
    """
    return torch.sigmoid(_at_least_float32(log_alpha) - _SHIFT)


def log_alpha_for(probability):
    """The `log_alpha` whose `keep_probability` is `probability`: an initial value for a gate.

    Args:
        probability: a float above 0 and below 1.

    Returns:
        A float.

    Example:
        >>> round(log_alpha_for(0.95), 4)
        1.3458
    """
    if not (isinstance(probability, float) and 0 < probability < 1):
        raise ConfigError(
            f"A gate cannot start with keep probability {probability!r}: it must be a float above 0 and below 1, e.g. 0.95."
        )
    return math.log(probability) - math.log1p(-probability) + _SHIFT


def scale_rate(parameter, scale):
    """`scale * parameter`, with the gradient passed through unscaled: its own learning rate without its own optimizer.

    Gates want a learning rate about 1000 times that of the weights. A gate stored as `p` (zero at first) and used as
    `initial + scale_rate(p, scale)` moves by `scale` times the step that the user's optimizer takes, so whatever the optimizer
    and scheduler, it learns at `gate_lr = scale * lr`. As its gradient is not multiplied, it does not inflate the global norm
    that `max_grad_norm` clips.

    Args:
        parameter: any shape.
        scale: a number, `gate_lr / lr`.

    Returns:
        A tensor of the same shape.

    Example:
        >>> p = torch.zeros(2, requires_grad=True)
        >>> scale_rate(p, 1000.0).sum().backward()
        >>> p.grad
        tensor([1., 1.])
    """
    return _ScaleRate.apply(parameter, scale)


class _ScaleRate(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, parameter, scale):
        return scale * parameter

    @staticmethod
    def backward(_ctx, gradient):
        return gradient, None


def _stretch(concrete):
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
