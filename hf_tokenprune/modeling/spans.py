"""Heads that look for a span: their softmax runs over all positions of a padded row, and padding is none to look at.

An encoder that computes on real tokens only has no hidden states for padding, so the head would say the same of all of it: its bias.
That is no answer, but it would count in the loss, in what a teacher says and in every argmax, the more, the longer the padding is.
"""

import torch
from torch import nn

from .calls import active

NOWHERE = -10_000.0  # of a softmax nothing is left, in any precision, also after two of them have been added


def span_head(model):
    """The module that says of each token whether a span begins or ends there; None if the model looks for none."""
    name = getattr(type(model), "_dense_class", type(model)).__name__
    if not name.endswith("ForQuestionAnswering"):
        return None
    return next(
        (getattr(model, part) for part in ("qa_outputs", "classifier") if isinstance(getattr(model, part, None), nn.Module)),
        None,
    )


def padding_of(batch):
    """`(B, S)` bool: where the padding is; None where there is none."""
    if batch.dense:
        return None
    padding = torch.ones(batch.batch_size * batch.seq_len, dtype=torch.bool, device=batch.index.device)
    return padding.index_fill_(0, batch.index, False).view(batch.batch_size, batch.seq_len)


@torch.compiler.disable
def never_in_padding(module, args, output):
    """A hook on a span head. It knows no model: PEFT copies such a module, and whatever hangs on it."""
    padding = active.padding
    return output if padding is None else output.masked_fill(padding[..., None].to(output.device), NOWHERE)
