"""Constraint: hold a quantity, such as the expected MACs, at a target."""


def lagrangian(value, target, first, second):
    """An augmented Lagrangian whose multipliers ascend while a minimising optimizer descends on everything else.

    With the violation `v = value - target` this is `first * v + second * v ** 2` (Wang et al. 2020, "Structured Pruning of
    Large Language Models", arXiv 1910.04732). It is to be minimised over what `value` depends on and maximised
    over the two multipliers. The multipliers therefore get the negative of their gradient, `-v` and `-v ** 2`: one optimizer
    that minimises does both.

    Args:
        value: scalar tensor with a gradient, e.g. the share of MACs saved.
        target: a float.
        first: scalar tensor, the multiplier of the violation. Either sign; starts at 0.
        second: scalar tensor, the multiplier of its square. Starts at 0 and only grows.

    Returns:
        A scalar tensor: the Lagrangian. It can be negative, and is 0 at the target.

    Example:
        >>> import torch
        >>> value, first, second = (torch.tensor(x, requires_grad=True) for x in (0.75, 1.0, 2.0))
        >>> loss = lagrangian(value, 0.5, first, second)
        >>> loss.backward()
        >>> loss.item(), value.grad.item(), first.grad.item(), second.grad.item()
        (0.375, 2.0, -0.25, -0.0625)
    """
    violation = value - target
    return _ascending(first) * violation + _ascending(second) * violation**2


def _ascending(multiplier):
    """The same value with the negative gradient."""
    return 2 * multiplier.detach() - multiplier
