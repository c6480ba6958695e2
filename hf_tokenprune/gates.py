"""Gates: learned relaxations of a keep-or-drop decision.

The hard concrete distribution (Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization",
arXiv 1712.01312): a concrete variable is stretched from (0, 1) to `(LOW, HIGH)` and clamped back, so that a gate is exactly 0
or exactly 1 with a probability above zero and has a gradient in between. `log_alpha`, of any shape, is what is learned.

Straight-through Gumbel-softmax (Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", arXiv 1611.01144): the
decision is taken, 0 or 1, and has the gradient of its relaxation. For decisions that depend on the input.
"""

import math

import torch

from .errors import ConfigError
from .precision import at_least_float32

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
    log_alpha = at_least_float32(log_alpha)
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
    return torch.sigmoid(keep_log_odds(log_alpha))


def keep_log_odds(log_alpha):
    """The log-odds of `keep_probability`, which tell gates apart whose probabilities are all 1 or 0 to the last bit.

    Example:
        >>> keep_log_odds(torch.tensor([-20.0, 0.0, 20.0]))
        tensor([-18.4014,   1.5986,  21.5986])
    """
    return at_least_float32(log_alpha) - _SHIFT


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


def sample_straight_through(logits, *, temperature=1.0, noise=None):
    """Decide to keep or to drop, at random, with a gradient (straight-through Gumbel-softmax, section 2.2 of Jang et al.).

    Forward: `argmax(logits + g)`, `g` being Gumbel noise, which keeps with probability `softmax(logits)[1]` whatever the
    temperature. Backward: the gradient of the soft sample, `softmax((logits + g) / temperature)[1]`.

    Args:
        logits: `(..., 2)`, entry 0 = drop, entry 1 = keep.
        temperature: a number above 0; the lower, the nearer the soft sample is to 0 or 1, and the noisier its gradient.
        noise: uniform (0, 1) numbers of the shape of `logits`; drawn with `torch.rand` if None.

    Returns:
        `(...)`, exactly 0.0 (drop) or 1.0 (keep), at least float32. A tie drops.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0], [2.0, 0.0]], requires_grad=True)
        >>> decisions = sample_straight_through(logits, noise=torch.full((2, 2), 0.5))
        >>> decisions.detach()
        tensor([1., 0.])
        >>> decisions.sum().backward()
        >>> logits.grad
        tensor([[-0.1050,  0.1050],
                [-0.1050,  0.1050]])
    """
    logits = at_least_float32(logits)
    if noise is None:
        noise = torch.rand_like(logits)
    limits = torch.finfo(logits.dtype)
    noisy = logits - (-noise.to(logits.dtype).clamp(limits.tiny, 1 - limits.eps).log()).log()
    lead = noisy[..., 1] - noisy[..., 0]
    soft = torch.sigmoid(lead / temperature)
    return (lead > 0).to(soft.dtype) + (soft - soft.detach())


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
