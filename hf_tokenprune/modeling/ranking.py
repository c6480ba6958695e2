"""Ranks of tokens within their text."""

import torch

from .kernels import has_kernels, ranks


def relative_rank(importance, batch, protected):
    """Where each token stands among the droppable tokens of its own sequence: 0 = most, 1 = least important.

    A token ranked `r` of `n` (from 0) gets `(r + 0.5) / n`, so that keeping all tokens below a share `f` keeps
    `round(f * n)` of them. Ties go to the earlier token.

    Args:
        importance: `(T,)` higher = kept longer.
        batch: the `PackedBatch` the tokens belong to.
        protected: `(T,)` bool; these tokens are left out of the ranking.

    Returns:
        `(rank, relative)`, both `(T,)`: the integer rank and the relative one. Neither means anything for a protected token.
    """
    if has_kernels(importance.device):
        return ranks(importance.detach().float(), protected, batch.bounds, max(batch.lengths))
    rows, width = len(batch.lengths), max(batch.lengths, default=0)
    score = importance.detach().float().masked_fill(protected, float("-inf"))
    even = batch.total == rows * width
    if even:
        table, droppable = score.view(rows, width), (~protected).view(rows, width).sum(1)
    else:
        table = score.new_full((rows, width), float("-inf"))
        table[batch.sequence_ids, batch.places] = score
        droppable = torch.zeros(rows, device=score.device).index_add_(0, batch.sequence_ids, (~protected).float())
    order = table.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(width, device=order.device).expand_as(order))
    relative = (rank + 0.5) / droppable.clamp(min=1)[:, None]
    if even:
        return rank.view(-1), relative.view(-1)
    return rank[batch.sequence_ids, batch.places], relative[batch.sequence_ids, batch.places]


def relative_ranks(count):
    """What `relative_rank` gives to the ranks of a sequence of so many droppable tokens, to the last bit."""
    return (torch.arange(count) + 0.5) / torch.full((count,), float(count))


def most_important(importance, batch, protected):
    """`(T,)` bool: the most important token of each sequence that has no protected one, so that none ever ends empty."""
    rank, _ = relative_rank(importance, batch, protected)
    guarded = torch.zeros(len(batch.lengths), device=protected.device).index_add_(0, batch.sequence_ids, protected.float())
    return (rank == 0) & (guarded == 0)[batch.sequence_ids]
