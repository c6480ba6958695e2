"""Attention that a family computes itself, with relative positions, on the tokens that are left.

Between its layers such a model is packed like any other. Its attention module gets each sequence padded to the longest one that is
left, with the relative positions of these very tokens; what it gives is packed again. The module of the family that is
called on the attention's probabilities (a dropout) tells how much attention each token receives, and lets tokens count for less.
Survivors are chosen once the module has run, when it is known what attention has brought to each token.
"""

from inspect import signature

import torch

from .attention import shared_out
from .calls import active


def spread(batch, packed):
    """`(1, T, *rest)` -> `(sequences, longest, *rest)`, zeros after the end of each sequence."""
    padded = packed.new_zeros(len(batch.lengths), max(batch.lengths), *packed.shape[2:])
    return padded.index_put((batch.sequence_ids, batch.places), packed[0])


def collect(batch, padded):
    """`(sequences, longest, *rest)` -> `(1, T, *rest)`: the inverse of `spread`."""
    return padded[batch.sequence_ids, batch.places][None]


def relative(batch, between):
    """What stands between each two tokens of the padded batch -> between each two of those that are left.

    Args:
        batch: the `PackedBatch`.
        between: `(B or 1, S, S, *rest)`.

    Returns:
        `(sequences, longest, longest, *rest)`.
    """
    places = spread(batch, batch.positions[None])
    samples = torch.tensor(batch.samples, device=places.device) if between.shape[0] > 1 else torch.zeros_like(places[:, 0])
    return between[samples[:, None, None], places[:, :, None], places[:, None, :]]


def _position_bias(batch, bias, heads):
    """MPNet: `(B, heads, S, S)`, added to the scores."""
    return relative(batch, bias.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _relative_pos(batch, distances, heads):
    """DeBERTa: `(1, S, S)` bucketed distances. Its attention wants them as `(1, sequences * heads, longest, longest)`, and makes two
    more of that size for each layer; or as `(1, longest, longest)`, if they are the same for all."""
    if batch.gapless:
        longest = max(batch.lengths)
        return distances[:, :longest, :longest]
    return relative(batch, distances).repeat_interleave(heads, 0)[None]


RELATIVE = {"position_bias": _position_bias, "relative_pos": _relative_pos}


def reweighted(shares, weight):
    """Shares `(..., queries, keys)` in which each key counts `weight` times, with the gradient of `attention.weighted_softmax`."""
    with torch.no_grad():
        total = (shares * weight).sum(-1, keepdim=True)
        total = total + (total == 0)
        at_one = total * shares / (total + shares)
    return shared_out(shares, weight, at_one)


@torch.compiler.disable
def before_attention(module, args, kwargs):
    """A pre-hook: pad the hidden states, and make the mask and the relative positions those of the tokens that are left."""
    given = signature(module.forward).bind(*args, **kwargs).arguments
    call = active.call = given["attention_mask"]
    batch = call.batch
    given["hidden_states"] = spread(batch, given["hidden_states"])
    real = spread(batch, torch.ones(1, batch.total, dtype=torch.bool, device=batch.index.device))[:, None, None]
    additive = "position_bias" in given
    lowest = torch.finfo(given["hidden_states"].dtype).min
    given["attention_mask"] = (~real).to(given["hidden_states"].dtype) * lowest if additive else real
    for name, select in RELATIVE.items():
        between = given.get(name)
        if between is not None:
            key = (name, id(between))
            if key not in batch.between:  # one for all layers, until tokens leave
                batch.between[key] = between, select(batch, between, module.num_attention_heads)
            given[name] = batch.between[key][1]
    return (), given


@torch.compiler.disable
def on_probabilities(module, args):
    """A pre-hook of what is called on `(sequences, heads, queries, keys)`: let tokens count for less, and see what they receive."""
    call, shares = active.call, args[0]
    batch = call.batch
    weight = None
    if batch.weights is not None:
        weight = spread(batch, batch.weights[None])
        shares = reweighted(shares.float(), weight[:, None, None]).to(shares.dtype)
    importance = None
    if call.needs_importance:
        asking = spread(batch, shares.new_ones(1, batch.total, dtype=torch.float32)) if weight is None else weight.float()
        received = (shares.float() * asking[:, None, :, None]).sum(2).mean(1)
        importance = collect(batch, received)[0] / batch.lengths_by_token
    call.received = importance
    return (shares, *args[1:])


@torch.compiler.disable
def after_attention(module, args, kwargs, output):
    """A hook: pack what the attention gives, and choose the survivors."""
    call = active.call
    context = collect(call.batch, output[0])
    call.decide(call.received, context)
    return (context, *output[1:])
