"""Attention over a packed batch, and the importance of its tokens.

transformers hands `attention_mask` through to the registered attention function untouched, so a layer call puts itself
there (see `calls.LayerCall`): no state has to be found anywhere else, in a re-computed layer of gradient
checkpointing as little as in another thread.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface

from .varlen import takes_varlen, varlen

ATTENTION = "token_pruning"
WASTE = 0.2  # on CUDA one call with a little padding is faster than many; on a CPU it is not


def register_attention():
    """Make the packed attention known to transformers under `ATTENTION`, with a mask function that keeps 2-D masks."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, two_dimensional_mask)


def two_dimensional_mask(batch_size, q_length, kv_length, attention_mask=None, **_):
    """The mask function that belongs to `attention`: hand the 2-D mask through."""
    return attention_mask


@torch.compiler.disable
def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **_):
    """The attention function: `(1, heads, T, head_dim)` three times -> `((1, T, heads, head_dim), None)`.

    Keys and values may have fewer heads, each of which serves a group of neighbouring query heads.

    `attention_mask` is the layer call. A tensor or None there comes from a model that merely shares a packed model's config
    object; it is treated as transformers' own "sdpa" would treat it.
    """
    built_causal = getattr(module, "is_causal", False)
    causal = built_causal and getattr(getattr(module, "config", None), "is_causal", True)
    if built_causal and not causal and sliding_window is not None:
        sliding_window += 1  # transformers then also sees the token at just this distance
    if hasattr(attention_mask, "attend"):
        return attention_mask.attend(query, key, value, dropout, scaling, sliding_window, causal), None
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    if sliding_window is not None or causal:
        place = torch.arange(key.shape[2], device=query.device)
        apart = place[-query.shape[2] :, None] - place[None, :]
        seen = apart >= 0 if causal else torch.ones_like(apart, dtype=torch.bool)
        seen = seen if sliding_window is None else seen & (apart.abs() < sliding_window)
        attention_mask = seen if attention_mask is None else attention_mask & seen
    key, value = for_every_head(key, query), for_every_head(value, query)
    return sdpa(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling).transpose(1, 2), None


def for_every_head(shared, query):
    """Keys or values `(B, fewer heads, T, head_dim)` -> `(B, heads, T, head_dim)`, one for each head of the queries."""
    groups = query.shape[1] // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, 1)


def weighted_softmax(scores, weight):
    """Softmax in which each key counts `weight` times.

    The gradient with respect to a weight of 0 is what the share would be at a weight of 1. The derivative itself, which leaves that
    key out of the sum, says the same of keys that would get little; of one that lies far above all that are left (a separator that
    others rest on) it would say thousands, and nothing else would be heard in the step.

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
    above = (scores - top).masked_fill(weight == 0, nothing).exp()
    with torch.no_grad():
        total = (above * weight).sum(-1, keepdim=True)
        total = total + (total == 0)
        at_one = total * (scores - top - total.log()).sigmoid()
    return shared_out(above, weight, at_one)


def shared_out(amounts, weight, at_one):
    """Shares of keys that count `weight` times; `at_one`: the amounts by which those of weight 0 are heard in the gradient."""
    counted = torch.where(weight == 0, at_one, amounts) * weight
    total = counted.sum(-1, keepdim=True)
    return counted / (total + (total == 0))


def evenly_received(seen, weight=None):
    """What each token would receive if every query looked alike at all tokens it sees, for `importance` to be relative to.

    Without a causal mask that is 1 for all. With it, the first token is seen by every query and the last by itself alone.

    Args:
        seen: `(count, queries, keys)` bool.
        weight: `(count, keys)` how much each token counts, as a query and as a key; None = all fully.

    Returns:
        `(count, keys)`, 1 on average.

    Example:
        >>> evenly_received(torch.ones(3, 3).tril().bool()[None])
        tensor([[1.8333, 0.8333, 0.3333]])
    """
    seen = seen.float()
    weight = seen.new_ones(seen.shape[0], seen.shape[2]) if weight is None else weight.float()
    total = (seen * weight[:, None]).sum(2)
    return (seen * (weight / (total + (total == 0)))[..., None]).sum(1)


def packed_attention(
    query, key, value, batch, *,
    dropout=0.0, scaling=None, window=None, causal=False, importance=False, asking=None, say=None, differentiable=False,
):  # fmt: skip
    """Attend within each sequence of a packed batch.

    Args:
        query, key, value: `(1, heads, T, head_dim)`; keys and values may have fewer heads.
        batch: the `PackedBatch`; its `weights` multiply each key's share of the softmax (a weight of 0 would be a key that
            is not there), which makes dropping a token the exact limit of gating it.
        window: attend to keys less than so many original positions away.
        causal: attend to no key that comes later.
        importance: also return the attention each token receives, mean over heads and queries; if causal, relative to what it would
            receive if all queries looked at everything they see alike, since early tokens are seen by more of them.
        asking: `(number of non-empty sequences,)` packed row of the one token of each sequence that asks; the other rows of the
            result are zeros. None = all ask.
        say: `(heads,)` how much each head (or each that makes keys and values) counts in the mean over heads, not all 0;
            None = all alike.
        differentiable: the importance is to have a gradient; otherwise it has none.

    Returns:
        `(context, importance)`: `(1, T, heads, head_dim)` and `(T,)` or None.
    """
    total, device = query.shape[2], query.device.type
    # As sdpa would: rotary tables in full precision make queries and keys of full precision.
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    window = None if window is None or window >= batch.seq_len else window
    key, value = for_every_head(key, query), for_every_head(value, query)
    options = {"window": window, "causal": causal, "asking": asking, "importance": importance}
    if not differentiable and takes_varlen(query, batch, **options):
        context, received = varlen(query, key, value, batch, scaling=scaling, dropout=dropout, say=say, **options)
        return _everyone(context, asking, total)[None], received
    explicit = importance or batch.weights is not None or (dropout > 0 and query.device.type == "cpu")
    if explicit:
        query = query * scaling
    if len(batch.runs) == 1 and batch.runs[0][1] == 1 and not (explicit or window or asking is not None):
        return sdpa(query, key, value, dropout_p=dropout, scale=scaling, is_causal=causal).transpose(1, 2), None
    bundles = batch.bundles(WASTE if query.device.type == "cuda" else 0)
    # `split`, not slices: its gradient is one concatenation, where each slice's would be a tensor of the whole batch.
    sizes = [sum(lengths) for _, lengths in bundles]
    ask = sizes if asking is None else [len(lengths) for _, lengths in bundles]
    queries = query[0].transpose(0, 1)
    queries = queries if asking is None else queries[asking]
    pieces = zip(queries.split(ask), *(x[0].transpose(0, 1).split(sizes) for x in (key, value)), strict=True)
    weights = [None] * len(sizes) if batch.weights is None else batch.weights.split(sizes)
    where = [(None, None, None)] * len(sizes)
    if causal or window is not None:
        of_askers = (x if asking is None else x[asking] for x in (batch.places, batch.positions))
        where = zip(*(x.split(ask) for x in of_askers), batch.positions.split(sizes), strict=True)
    contexts, received = [], []
    for (_, lengths), (q, k, v), weight, (place, here, there) in zip(bundles, pieces, weights, where, strict=True):
        count, length = len(lengths), max(lengths)
        cells = None if sum(lengths) == count * length else Cells.of(lengths, q.device)
        asked = cells if asking is None else None
        q, place, here = (_table(x, count, asked) for x in (q, place, here))
        k, v, there, weight = (_table(x, count, cells) for x in (k, v, there, weight))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = bias = None
        if causal and (explicit or window is not None or asking is not None or cells is not None):
            seen = place[..., None] >= torch.arange(length, device=place.device)
        if window is not None:
            near = (here[..., None] - there[:, None]).abs() < window
            seen = near if seen is None else seen & near
        if cells is not None:
            there = cells.there[:, None].expand(count, q.shape[2], length)
            seen = there if seen is None else seen & there
        if seen is not None:
            bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, float("-inf"))[:, None]
        if weight is not None and not batch.masked:
            logs = weight.log()[:, None, None]
            bias = logs if bias is None else bias + logs
        if explicit:  # also where sdpa would take its slow path: the fast one on CPU knows no dropout
            scores = torch.matmul(q, k.transpose(-1, -2))
            scores = scores if bias is None else scores + bias
            if batch.masked:
                shares = weighted_softmax(scores, weight[:, None, None])
            else:
                shares = scores.softmax(-1, dtype=torch.float32)
            if importance:
                count_as = weight if cells is None else cells.queries(weight)
                with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                    mean = received_by(shares, count_as, say)
                    if causal:
                        even = evenly_received(seen, None if count_as is None else count_as.detach())
                        mean = mean / (even + (even == 0))
                received.append(_row(mean, cells))
            out = torch.matmul(drop(shares, dropout).to(v.dtype), v)
        else:
            out = sdpa(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scaling, is_causal=causal and bias is None)
        contexts.append(_row(out.transpose(1, 2), asked))
    context = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
    return _everyone(context, asking, total)[None], torch.cat(received) if importance else None


def _table(rows, count, cells):
    """`(count * length, *rest)` -> `(count, length, *rest)`, padded if there are `cells`; None stays None."""
    if rows is None:
        return None
    return rows.view(count, -1, *rows.shape[1:]) if cells is None else rows[cells.rows]


def _row(table, cells):
    """What `_table` does, undone."""
    flat = table.reshape(-1, *table.shape[2:])
    return flat if cells is None else flat[cells.back]


def _everyone(context, asking, total):
    """`(T, heads, head_dim)`, zeros for those who did not ask."""
    if asking is None:
        return context
    return context.new_zeros(total, *context.shape[1:]).index_copy(0, asking, context)


@dataclass(frozen=True)
class Cells:
    """A table of neighbouring sequences of unequal lengths, padded to the longest.

    Attributes:
        rows: `(count, length)` which row each cell holds; one of padding, the last of its sequence.
        there: `(count, length)` bool: is it none of padding?
        back: `(rows,)` the cell that holds each row.
        lengths: `(count, 1)`.

    Example:
        >>> Cells.of([1, 3], "cpu").rows
        tensor([[0, 0, 0],
                [1, 2, 3]])
    """

    rows: torch.Tensor
    there: torch.Tensor
    back: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, lengths, device):
        """From a list of lengths."""
        count, width, total = len(lengths), max(lengths), sum(lengths)
        lengths = torch.tensor(lengths, device=device)
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(width, device=device).expand(count, width)
        number = torch.repeat_interleave(torch.arange(count, device=device), lengths, output_size=total)
        back = torch.arange(total, device=device) - starts[number] + width * number
        rows = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
        return cls(rows, place < lengths[:, None], back, lengths[:, None])

    def queries(self, weight):
        """`(count, length)` how much each cell counts among all cells of its sequence; `weight` the same among the real ones."""
        alike = self.there * (self.there.shape[1] / self.lengths)
        return alike if weight is None else alike * weight


def received_by(shares, weight=None, say=None):
    """The attention each token receives: mean over heads and queries.

    Args:
        shares: `(count, heads, queries, keys)` after the softmax.
        weight: `(count, queries)` how much each query counts; None = all fully.
        say: `(heads,)` or one for each group of neighbouring heads, how much they count; None = all alike.

    Returns:
        `(count, keys)`.
    """
    asking = shares if weight is None else shares * weight[:, None, :, None]
    if say is None:
        return asking.mean((1, 2))
    of_heads = asking.mean(2)
    say = say.repeat_interleave(of_heads.shape[1] // len(say))
    return torch.einsum("chl,h->cl", of_heads, say / say.sum())
