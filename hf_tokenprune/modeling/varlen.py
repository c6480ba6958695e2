"""Attention over a packed batch in one kernel: torch's flash attention for sequences of unequal lengths, on CUDA."""

import inspect

import torch

try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn
except ImportError:  # torch older than 2.10
    AuxRequest = varlen_attn = None

KNOWN = inspect.signature(varlen_attn).parameters if varlen_attn else {}
if not KNOWN.keys() >= {"scale", "window_size", "return_aux"}:  # torch 2.10
    varlen_attn = None

HALF = (torch.float16, torch.bfloat16)
DEVICE = "cuda"
MORE = 8  # dimensions of a head that the kernel can take in addition; three of them hold a number of full width


def takes_varlen(query, batch, *, dropout, window, causal, asking):
    """Can `varlen` do this?

    The kernel knows neither dropout nor numbers of full width. It counts a window along the packed rows, which after dropping are
    no longer the original positions, and it takes the last queries for the askers of a window or causal mask.
    """
    return (
        varlen_attn is not None
        and query.device.type == DEVICE
        and query.dtype in HALF
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 256
        and not dropout
        and (window is None or batch.gapless)
        and (asking is None or (window is None and not causal))
    )


def takes_importance(query, batch, *, dropout, window, causal, asking):
    """Can `varlen_importance` do this? It gives no gradient."""
    return (
        not torch.is_grad_enabled()
        and not causal
        and window is None
        and asking is None
        and batch.weights is None
        and query.shape[3] + MORE <= 256
        and takes_varlen(query, batch, dropout=dropout, window=window, causal=causal, asking=asking)
    )


def varlen_importance(query, key, value, batch, *, scaling):
    """As `varlen`, and the attention that each token receives, without the matrices of attention ever being there.

    Query `q` gives key `k` the share `exp(s(q, k) - l(q))`, where `l` is the log of the sum over keys, which the kernel gives, too.
    With queries and keys in each other's place, and `l` taken from the scores by a few more dimensions, the log of the sum over
    queries is the log of what a key receives. No term is above 1, so nothing overflows, however sharp attention is.

    Args:
        query: `(1, heads, T, head_dim)`.
        key, value: the same, perhaps of fewer heads.
        batch, scaling: as for `attention.packed_attention`.

    Returns:
        `(context, importance)`: `(T, heads, head_dim)` and `(T,)`, mean over heads and queries.
    """
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    where = batch.ends, batch.ends, max(batch.lengths), max(batch.lengths)
    more = {"scale": scaling, "return_aux": AuxRequest(lse=True)}
    context, logs = _attend(queries, keys, values, *where, **more)
    keys = _for_every_head(keys, queries)
    givers = torch.cat([queries, _in_parts(logs.transpose(0, 1) / scaling, queries)], -1)
    takers = torch.cat([keys, keys.new_full((*keys.shape[:2], MORE), -1.0)], -1)
    _, logs = varlen_attn(takers, givers, givers, *where, **more)
    received = logs.transpose(0, 1).exp().mean(1)  # the kernel gives `(heads, T)`, whatever torch's documentation says
    return context, received / batch.lengths_by_token


def _in_parts(numbers, like):
    """Float32 numbers `(T, heads)` as `(T, heads, MORE)` of the type of `like`, which add up to them."""
    parts = []
    for _ in range(3):
        parts.append(numbers.to(like.dtype))
        numbers = numbers - parts[-1].float()
    return torch.stack([*parts, *[torch.zeros_like(parts[0])] * (MORE - 3)], -1)


def varlen(query, key, value, batch, *, scaling, window=None, causal=False, asking=None):
    """Attend within each sequence of a packed batch.

    Args:
        query: `(1, heads, T, head_dim)`.
        key, value: the same, perhaps of fewer heads.
        batch, scaling, window, causal, asking: as for `attention.packed_attention`.

    Returns:
        `(Q, heads, head_dim)`, `Q` being `T` or the number of those that ask.
    """
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    ends, longest = batch.ends, max(batch.lengths)
    asked, most = ends, longest
    if asking is not None:
        queries, asked, most = queries[asking], torch.arange(len(asking) + 1, dtype=torch.int32, device=query.device), 1
    left = -1 if window is None else window - 1
    return _attend(
        queries.contiguous(), keys.contiguous(), values.contiguous(), asked, ends, most, longest,
        scale=scaling, window_size=(left, 0 if causal else left),
    )  # fmt: skip


def _attend(queries, keys, values, *where, **more):
    """The kernel, which in torch 2.13, but not in 2.11, lets several heads of queries share keys and values."""
    if keys.shape[1] == queries.shape[1]:
        return varlen_attn(queries, keys, values, *where, **more)
    if "enable_gqa" in KNOWN:
        return varlen_attn(queries, keys, values, *where, enable_gqa=True, **more)
    return varlen_attn(queries, _for_every_head(keys, queries), _for_every_head(values, queries), *where, **more)


def _for_every_head(shared, queries):
    """`(T, fewer heads, head_dim)` -> `(T, heads, head_dim)`."""
    groups = queries.shape[1] // shared.shape[1]
    return shared.repeat_interleave(groups, 1) if groups > 1 else shared
