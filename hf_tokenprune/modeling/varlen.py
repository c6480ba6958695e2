"""Attention over a packed batch in one kernel: torch's flash attention for sequences of unequal lengths, on CUDA."""

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch older than 2.10
    varlen_attn = None

HALF = (torch.float16, torch.bfloat16)
DEVICE = "cuda"


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
    return varlen_attn(
        queries.contiguous(), keys.contiguous(), values.contiguous(), asked, ends, most, longest,
        scale=scaling, window_size=(left, 0 if causal else left), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
