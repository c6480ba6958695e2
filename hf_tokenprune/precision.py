"""Numbers that gates and losses compute with."""

import torch


def at_least_float32(tensor):
    """The tensor, in float32 if its own type is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
