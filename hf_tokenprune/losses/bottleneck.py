"""Information bottleneck: let a layer read little of its input, and keep the decision what to read open for long."""

import torch

from ..precision import at_least_float32


def information_norm(states, keep):
    """How much a layer is told about the tokens that enter it: the norm of what the keep probabilities let through.

    Infor-Coef (Tan 2023, arXiv 2305.12458) bounds the mutual information of a layer's input and what a token sampler makes of
    it by the norm of `keep * state`. This is `mean over tokens of ||p_i h_i||_2 / sqrt(H)`. The root takes the width out: where
    states come out of a LayerNorm, it is about the mean keep probability. Average it over the layers that sample.

    It is computed as `p_i ||h_i||_2`, the same for probabilities. So a token with keep probability 0 has a gradient (`||h_i||`)
    to the probability too, and a state of zeros has a gradient of 0.

    Args:
        states: `(T, H)` or `(1, T, H)` hidden states that enter the layer.
        keep: `(T,)` keep probabilities.

    Returns:
        A scalar, at least float32; 0 if there is no token.

    Example:
        >>> states = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> information_norm(states, torch.tensor([1.0, 1.0]))
        tensor(5.3033)
        >>> information_norm(states, torch.tensor([1.0, 0.0]))
        tensor(1.7678)
    """
    norms = torch.linalg.vector_norm(at_least_float32(states), dim=-1).flatten()
    return (at_least_float32(keep) * norms).sum() / (max(len(norms), 1) * states.shape[-1] ** 0.5)


def negative_entropy(keep):
    """How decided the keep probabilities are: minimised, it holds them near one half, so that no decision freezes early.

    Mean over tokens of `p log p + (1 - p) log(1 - p)` (Infor-Coef, Tan 2023, arXiv 2305.12458). The gradient, `log p -
    log(1 - p)`, is unbounded at 0 and 1; there it is cut off at the logarithm of the machine epsilon, about 17 in float32.

    Args:
        keep: `(T,)` keep probabilities, 0 and 1 included.

    Returns:
        A scalar, at least float32: `-log 2` if all are one half, 0 if all are 0 or 1 or if there is no token.

    Example:
        >>> negative_entropy(torch.tensor([0.5, 0.5]))
        tensor(-0.6931)
        >>> negative_entropy(torch.tensor([0.9, 0.1]))
        tensor(-0.3251)
    """
    keep = at_least_float32(keep)
    return sum((p * p.clamp(min=torch.finfo(p.dtype).eps).log()).sum() for p in (keep, 1 - keep)) / max(keep.numel(), 1)
