"""Attention over a packed batch, and the importance of its tokens.

transformers hands `attention_mask` through to the registered attention function untouched, so a layer call puts itself
there (see `modeling_token_pruned.LayerCall`): no state has to be found anywhere else, in a re-computed layer of gradient
checkpointing as little as in another thread.
"""

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "token_pruning"


def register_attention():
    """Make the packed attention known to transformers under `ATTENTION`, with a mask function that keeps 2-D masks."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, two_dimensional_mask)


def two_dimensional_mask(batch_size, q_length, kv_length, attention_mask=None, **_):
    """The mask function that belongs to `attention`: hand the 2-D mask through."""
    return attention_mask


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **_):
    """The attention function: `(1, heads, T, head_dim)` three times -> `((1, T, heads, head_dim), None)`.

    `attention_mask` is the layer call. A tensor or None there comes from a model that merely shares a packed model's config
    object; it is treated as transformers' own "sdpa" would treat it.
    """
    if hasattr(attention_mask, "attend"):
        return attention_mask.attend(query, key, value, dropout, scaling, sliding_window), None
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    if sliding_window is not None:
        place = torch.arange(query.shape[2], device=query.device)
        window = (place[:, None] - place[None, :]).abs() < sliding_window
        attention_mask = window if attention_mask is None else attention_mask & window
    return sdpa(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling).transpose(1, 2), None


def weighted_softmax(scores, weight):
    """Softmax in which each key counts `weight` times, with a finite gradient where that is 0.

    Args:
        scores: `(..., queries, keys)`.
        weight: `(..., 1, keys)`, 0 or more.

    Returns:
        Shares in float32, of the shape of `scores`; zeros where a query sees no key that counts.
    """
    scores, weight = scores.float(), weight.float()
    nothing = float("-inf")
    top = scores.detach().masked_fill(weight == 0, nothing).amax(-1, keepdim=True)
    top = top.masked_fill(top == nothing, 0.0)  # a dropped token in a window of dropped tokens
    counted = (scores - top).clamp(max=10).exp() * weight  # a key of weight 0 may lie far above all others
    total = counted.sum(-1, keepdim=True)
    return counted / (total + (total == 0))


def packed_attention(
    query, key, value, batch, *, dropout=0.0, scaling=None, window=None, importance=False, first_only=False, say=None
):
    """Attend within each sequence of a packed batch.

    Args:
        query, key, value: `(1, heads, T, head_dim)`.
        batch: the `PackedBatch`; its `weights` multiply each key's share of the softmax (a weight of 0 would be a key that
            is not there), which makes dropping a token the exact limit of gating it.
        window: attend to keys less than so many original positions away.
        importance: also return the attention each token receives, mean over heads and queries.
        say: `(heads,)` how much each head counts in the mean over heads, not all 0; None = all alike.
        first_only: only the first token of each sequence asks; the other rows of the result are zeros.

    Returns:
        `(context, importance)`: `(1, T, heads, head_dim)` and `(T,)` or None.
    """
    total, heads, width = query.shape[2], query.shape[1], value.shape[3]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    window = None if window is None or window >= batch.seq_len else window
    explicit = importance or batch.weights is not None or (dropout > 0 and query.device.type == "cpu")
    if explicit:
        query = query * scaling
    if len(batch.runs) == 1 and batch.runs[0][1] == 1 and not (explicit or window or first_only):
        return sdpa(query, key, value, dropout_p=dropout, scale=scaling).transpose(1, 2), None
    # `split`, not slices: its gradient is one concatenation, where each slice's would be a tensor of the whole batch.
    sizes = [count * length for _, count, length in batch.runs]
    pieces = zip(*(x[0].transpose(0, 1).split(sizes) for x in (query, key, value)), strict=True)
    weights = [None] * len(sizes) if batch.weights is None else batch.weights.split(sizes)
    contexts, received = [], []
    for (start, count, length), piece, weight in zip(batch.runs, pieces, weights, strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in piece)
        if first_only:
            q = q[:, :, :1]
        bias = None
        if window is not None:
            place = batch.positions[start : start + count * length].view(count, 1, length)
            near = (place.transpose(1, 2)[:, : q.shape[2]] - place).abs() < window
            bias = torch.zeros(near.shape, dtype=q.dtype, device=q.device).masked_fill(~near, float("-inf"))[:, None]
        if weight is not None and not batch.masked:
            logs = weight.log().view(count, 1, 1, length)
            bias = logs if bias is None else bias + logs
        if explicit:  # also where sdpa would take its slow path: the fast one on CPU knows no dropout
            scores = torch.matmul(q, k.transpose(-1, -2))
            scores = scores if bias is None else scores + bias
            if batch.masked:
                shares = weighted_softmax(scores, weight.view(count, 1, 1, length))
            else:
                shares = scores.softmax(-1, dtype=torch.float32)
            if importance:
                asking = shares if weight is None else shares * weight.view(count, 1, length, 1)
                heads_alike = asking.mean(2)  # (count, heads, length)
                mean = heads_alike.mean(1) if say is None else torch.einsum("chl,h->cl", heads_alike, say / say.sum())
                received.append(mean.flatten())
            out = torch.matmul(drop(shares, dropout).to(v.dtype), v)
        else:
            out = sdpa(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scaling)
        contexts.append(out.transpose(1, 2).reshape(-1, heads, width))
    context = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
    if first_only:
        context = value.new_zeros(total, heads, width).index_copy(0, batch.first_rows, context)
    return context[None], torch.cat(received) if importance else None
