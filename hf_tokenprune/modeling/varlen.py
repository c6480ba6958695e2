"""Attention over a packed batch in one kernel: torch's flash attention for sequences of unequal lengths, on CUDA.

This is the operator behind `torch.nn.attention.varlen`, which that module does not give in full: it has no dropout there. What each
token receives `kernels.received` makes of the sums that it gives. Soft gates, which it was not made for, it does with a few more
dimensions per head, whose products are added to the scores: a key that counts `w` times has `log w` added to its own.
"""

from functools import cache
from importlib.util import find_spec

import torch

from .kernels import has_kernels, received

HALF = (torch.float16, torch.bfloat16)
DEVICE = "cuda"
MORE = 8  # dimensions of a head in addition, as the kernel takes multiples of 8; three of them hold a number of full width
WIDEST = 256  # dimensions of a head, at most


def flash(*args, **kwargs):
    """The kernel, as `(output, log of the sums over keys (heads, T))`."""
    return torch.ops.aten._flash_attention_forward(*args, **kwargs)[:2]


@cache
def has_flash(device):
    """Is the operator there, as this file knows it (torch 2.10 or newer), and made for this GPU?"""
    known = torch.version.hip is None and find_spec("torch.nn.attention.varlen") is not None
    if device.type != "cuda" or not known:
        return known
    # The operator is known to every build, also to those for Windows, which are made without it.
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_varlen(query, batch, *, window=None, causal=False, asking=None, importance=False):
    """Can `varlen` do this?

    The kernel does not know numbers of full width. It counts a window along the packed rows, which after dropping are no longer the
    original positions, and it takes the last queries for the askers of a window or causal mask. Importance relative to a mask is
    not made here, and tokens of weight 0 that wait for a gradient have no logarithm.
    """
    more = 0 if batch.weights is None else MORE
    return (
        query.device.type == DEVICE
        and query.dtype in HALF
        and has_flash(query.device)
        and query.shape[3] % 8 == 0
        and query.shape[3] + more <= WIDEST
        and (window is None or batch.gapless)
        and (asking is None or (window is None and not causal))
        and not (importance and (causal or window is not None or asking is not None or not has_kernels(query.device)))
        and not (batch.weights is not None and batch.masked)
    )


def varlen(
    query, key, value, batch, *, scaling, dropout=0.0, window=None, causal=False, asking=None, importance=False, say=None
):  # fmt: skip
    """Attend within each sequence of a packed batch.

    Args:
        query, key, value: `(1, heads, T, head_dim)` each.
        importance: also say what each token receives; without a gradient.
        batch, scaling, dropout, window, causal, asking, say: as for `attention.packed_attention`.

    Returns:
        `(context, importance)`: `(Q, heads, head_dim)`, `Q` being `T` or the number of those that ask, and `(T,)` or None.
    """
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    longest, size = max(batch.lengths), query.shape[3]
    where = [batch.ends, batch.ends, longest, longest]
    if asking is not None:
        queries = queries[asking]
        where[0], where[2] = torch.arange(len(asking) + 1, dtype=torch.int32, device=query.device), 1
    mine, theirs, contents = queries, keys, values
    if batch.weights is not None:
        logs = (batch.weights.float().log() / scaling)[:, None].expand(keys.shape[:2])
        mine, theirs = _join(queries, 1.0), _join(keys, logs)
        contents = torch.nn.functional.pad(values, (0, MORE))
    left = -1 if window is None else window - 1
    context, sums = flash(
        mine.contiguous(), theirs.contiguous(), contents.contiguous(), *where, dropout, causal and window is None, False,
        scale=scaling, window_size_left=left, window_size_right=0 if causal else left,
    )  # fmt: skip
    return context[..., :size], _received(queries, keys, sums, batch, scaling, say) if importance else None


@torch.no_grad()
def _received(queries, keys, sums, batch, scaling, say):
    """What each token receives. Soft gates count each query as often as it counts as a key."""
    logs = sums if batch.weights is None else sums - batch.weights.float().log()
    say = None if say is None else say.repeat_interleave(len(sums) // len(say))
    taken = received(queries, keys, logs, batch.bounds, max(batch.lengths), scaling, say)
    return taken if batch.weights is None else taken * batch.weights


def _join(rows, numbers):
    """`(T, heads, head_dim)` -> `(T, heads, head_dim + MORE)`: with numbers of full width `(T, heads)` in three parts that add up to
    them, or with a number of half width to multiply such parts by."""
    if isinstance(numbers, float):
        return torch.cat([rows, rows.new_full((), numbers).expand(*rows.shape[:2], MORE)], -1)
    first = numbers.to(rows.dtype)  # the part that has the gradient of the whole
    rest = numbers.detach() - first.detach().float()
    second = rest.to(rows.dtype)
    third = (rest - second.float()).to(rows.dtype)
    nothing = rows.new_zeros(()).expand(rows.shape[:2])
    return torch.cat([rows, torch.stack([first, second, third, *[nothing] * (MORE - 3)], -1)], -1)
