"""Ranking: pull the order in which early layers rank tokens towards the order of the teacher's last layer."""

import math

import torch
from torch.nn import functional

from ..precision import at_least_float32


def lambda_arp2(scores, relevance, mask, *, sigma=1.0):
    """LambdaARP2, a smooth bound of the average relevance position (Wang et al. 2018, "The LambdaLoss Framework for Ranking
    Metric Optimization", CIKM, ARP-Loss2).

    Per row, the sum over all pairs with `y_i > y_j` of `(y_i - y_j) * log2(1 + exp(-sigma * (s_i - s_j)))`: a pair in the wrong
    order costs more the further apart its relevances are.

    Args:
        scores: `(B, L)` what is to be ordered, higher = ranked first.
        relevance: `(B, L)` integers or floats; gets no gradient.
        mask: `(B, L)` bool, the real entries. The others may hold anything and get no gradient.
        sigma: steepness of the logistic.

    Returns:
        `(B,)`, at least float32.

    Example:
        >>> relevance, mask = torch.tensor([[2, 1, 0]]), torch.tensor([[True, True, True]])
        >>> lambda_arp2(torch.tensor([[3.0, 2.0, 1.0]]), relevance, mask)
        tensor([1.2701])
        >>> lambda_arp2(torch.tensor([[1.0, 2.0, 3.0]]), relevance, mask)
        tensor([9.9263])
    """
    scores = at_least_float32(scores).masked_fill(~mask, 0)
    relevance = relevance.detach().to(scores.dtype).masked_fill(~mask, 0)
    gain = (relevance[:, :, None] - relevance[:, None, :]).clamp(min=0) * (mask[:, :, None] & mask[:, None, :])
    lead = scores[:, :, None] - scores[:, None, :]
    return (gain * -functional.logsigmoid(sigma * lead)).sum((1, 2)) / math.log(2)


def listwise(scores, relevance, mask):
    """ListNet's loss (Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML): relevance, shared out
    to the entries of a row in proportion, is to be what the softmax of the scores gives them.

    Args:
        scores: `(B, L)` what is to be ordered, higher = ranked first.
        relevance: `(B, L)`, 0 or more; gets no gradient.
        mask: `(B, L)` bool, the real entries. The others may hold anything and get no gradient.

    Returns:
        A scalar, at least float32: the mean over rows of `KL(shares of relevance || softmax(scores))`, 0 for a row that has nothing
        relevant.

    Example:
        >>> relevance, mask = torch.tensor([[6.0, 3.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
        >>> listwise(relevance.log(), relevance, mask).abs() < 1e-6, listwise(-relevance.log(), relevance, mask) > 0.5
        (tensor(True), tensor(True))
    """
    scores = at_least_float32(scores).masked_fill(~mask, torch.finfo(torch.float32).min)
    relevance = relevance.detach().to(scores.dtype).masked_fill(~mask, 0)
    shares = relevance / relevance.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (torch.xlogy(shares, shares) - shares * scores.log_softmax(1)).sum(1).mean()


def ranking_distillation(student, teacher, mask, *, top_k=20, scale=None, sigma=1.0):
    """ToP's ranking distillation (Li et al. 2023, arXiv 2306.14393).

    The teacher's `top_k` most important tokens of every sequence are to be ranked by the student as by the teacher: LambdaARP2
    of the student's importance of these tokens, whose relevance is their reversed rank (`top_k - 1` for the first of them),
    over the square of the number of tokens taken. Ties of the teacher go to the earlier token.

    Importance is attention received, about `1 / n` in a sequence of `n` tokens. Differences that small leave the logistic at
    its middle, where it is a straight line: every pair then pulls as hard in the right order as in the wrong one, and the loss
    hardly moves. So scores are multiplied by `n` by default: uniform attention scores 1, differences are of order 1 whatever
    the length, and a pair that the student orders well stops pulling. `scale=1.0` takes the importance as it is, as the
    paper's own code does; the default's gradient is about `n` times as large, so a weight published for it is too high here.

    Args:
        student: `(B, L)` importance by an early layer of the student.
        teacher: `(B, L)` importance by the teacher's last layer; gets no gradient.
        mask: `(B, L)` bool, the tokens to rank: real ones, without those that are never dropped. The others may hold anything.
        top_k: how many of the teacher's tokens to order; all of a sequence that has fewer.
        scale: what the student's importance is multiplied by; None = the number of tokens to rank in the row.
        sigma: steepness of the logistic.

    Returns:
        A scalar, at least float32: the mean over all rows, where a row with fewer than two tokens to rank counts as 0.

    Example:
        >>> teacher, mask = torch.tensor([[0.5, 0.3, 0.2]]), torch.ones(1, 3, dtype=torch.bool)
        >>> ranking_distillation(teacher, teacher, mask) < ranking_distillation(teacher.flip(1), teacher, mask)
        tensor(True)
    """
    order = teacher.masked_fill(~mask, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, :top_k]
    taken = mask.gather(1, order)
    if scale is None:
        scale = mask.sum(1, keepdim=True)
    scores = at_least_float32(student).gather(1, order) * scale
    relevance = torch.arange(order.shape[1] - 1, -1, -1, device=order.device).expand_as(order)
    losses = lambda_arp2(scores, relevance, taken, sigma=sigma)
    return (losses / taken.sum(1).clamp(min=1) ** 2).mean()
