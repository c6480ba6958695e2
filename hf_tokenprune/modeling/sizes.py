"""How much of a model there is: hidden units, heads and FFN units, layer by layer; and what stands where a block was cut out."""

import torch
from torch import nn

from .architectures import find_encoder, get_layers
from .errors import UnsupportedModelError


class NoAttention(nn.Module):
    """Stands where all heads of a layer were cut out. What follows adds nothing to the residual stream."""

    def __init__(self, empty):
        super().__init__()
        self.empty = empty

    def forward(self, hidden_states, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if hasattr(value, "skip"):
                value.skip()
        return (hidden_states[..., :0] if self.empty else torch.zeros_like(hidden_states)), None


class NoUnits(nn.Module):
    """Stands where all units of an FFN were cut out, before a `Residual`."""

    def forward(self, hidden_states):
        return hidden_states[..., :0]


class NoBlock(nn.Module):
    """Stands for an FFN that is gone and whose result would be added to a residual."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class Residual(nn.Module):
    """Stands for the end of a block that is gone: the residual passes through."""

    def forward(self, _, residual):
        return residual


def has_attention(family, layer):
    """Does this layer have heads left?"""
    return not _is(layer.get_submodule(family.attention), NoAttention)


def has_ffn(family, layer):
    """Does this layer have FFN units left?"""
    return not _is(layer.get_submodule(family.ffn), NoBlock, Residual)


def _is(module, *kinds):
    """By name: in a model that the code in its folder has opened they are classes of that code."""
    return type(module).__name__ in (kind.__name__ for kind in kinds)


def head_size(family, layer):
    """Width of one head of a layer that has any; where several queries share keys and values, of such a group: it is cut as one."""
    attention = layer.get_submodule(family.attention)
    return (getattr(attention, "head_dim", None) or attention.attention_head_size) * group_size(attention)


def group_size(attention):
    """How many query heads share one head of keys and values."""
    return getattr(attention, "num_key_value_groups", 1)


def sizes_of(model):
    """`(hidden, heads, units)` of a model as it is: the hidden size, and heads and FFN units of each layer.

    Raises:
        UnsupportedModelError: nothing can be cut out of the family, or the layers are not built as its row says.
    """
    family, encoder = find_encoder(model, check=False)
    if family.uncut:
        raise UnsupportedModelError(
            f"No weights can be cut out of {type(model).__name__}: {family.uncut}. Tokens can be dropped: ToP(target_macs=0.5), for "
            "instance."
        )
    heads, units, hidden = [], [], None
    for layer in get_layers(family, encoder):
        try:
            attention, ffn = has_attention(family, layer), has_ffn(family, layer)
            context = layer.get_submodule(family.context) if attention else None
            reader = layer.get_submodule(family.units_out) if ffn else None
        except AttributeError as error:
            raise UnsupportedModelError(
                f"The layers of this {type(model).__name__} are not built like those of its family ({error}), so no heads or FFN "
                "units can be cut out of it."
            ) from None
        heads.append(context.in_features // head_size(family, layer) if attention else 0)
        units.append(reader.in_features if ffn else 0)
        hidden = (context or reader).out_features
    return hidden, heads, units
