"""Attention over a packed batch in one kernel: torch's flash attention for sequences of unequal lengths, on CUDA.

This is the operator behind `torch.nn.attention.varlen`, which that module does not give in full: it has no dropout there.

Two things the kernel was not made for it does with a few more dimensions per head, whose products are added to the scores:

* soft gates: a key that counts `w` times has `log w` added to its scores;
* the attention that each token receives, without the matrices of attention ever being there, see `received`.
"""

from functools import cache
from importlib.util import find_spec

import torch

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
    return known and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0))


def takes_varlen(query, batch, *, window=None, causal=False, asking=None, importance=False):
    """Can `varlen` do this?

    The kernel does not know numbers of full width. It counts a window along the packed rows, which after dropping are no longer the
    original positions, and it takes the last queries for the askers of a window or causal mask. Importance relative to a mask is
    not made here, and tokens of weight 0 that wait for a gradient have no logarithm.
    """
    more = MORE if importance or batch.weights is not None else 0
    return (
        query.device.type == DEVICE
        and query.dtype in HALF
        and has_flash(query.device)
        and query.shape[3] % 8 == 0
        and query.shape[3] + more <= WIDEST
        and (window is None or batch.gapless)
        and (asking is None or (window is None and not causal))
        and not (importance and (causal or window is not None or asking is not None))
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
    taken = received(queries, keys, sums, batch, scaling, say) if importance else None
    return context[..., :size], taken


@torch.no_grad()
def received(queries, keys, sums, batch, scaling, say=None):
    """The attention that each token receives, mean over heads and queries.

    Query `q` gives key `k` the share `exp(s(q, k) - l(q))`, where `l` is the log of the sum over keys, which the kernel gives. With
    queries and keys in each other's place, and `l` taken from the scores by a few more dimensions, the log of the sum over queries
    is the log of what a key receives. No term is above 1, so nothing overflows, however sharp attention is. Soft gates count
    each query as often as it counts as a key.

    Args:
        queries, keys: `(T, heads, head_dim)`.
        sums: `(heads, T)`, the kernel's.

    Returns:
        `(T,)`.
    """
    logs, longest = sums, max(batch.lengths)
    if batch.weights is not None:
        logs = logs - batch.weights.float().log()
    givers, takers = _join(queries, logs.transpose(0, 1) / scaling), _join(keys, -1.0)
    _, sums = flash(
        takers, givers, givers, batch.ends, batch.ends, longest, longest, 0.0, False, False,
        scale=scaling, window_size_left=-1, window_size_right=-1,
    )  # fmt: skip
    shares = sums.exp()
    if say is None:
        mean = shares.mean(0)
    else:
        say = say.repeat_interleave(len(shares) // len(say))
        mean = (say / say.sum()) @ shares
    mean = mean if batch.weights is None else mean * batch.weights
    return mean / batch.lengths_by_token


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
