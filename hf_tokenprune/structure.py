"""Gates on weights: one vector of gates over a model's hidden units, heads, FFN units and blocks, put in force by hooks.

A gate of 0 does what cutting the part out would do, a gate of 1 changes nothing, and in between the effect is continuous:

* a head's or FFN unit's gate multiplies what the next Linear reads of it;
* a hidden unit's gate is its weight in the mean and variance of every LayerNorm, and multiplies the norm's output. So the norm
  over the gated units is exactly the norm of the cut model; and so it is with what scorers and samplers at the sites read of hidden
  units and heads;
* a block's gate moves its result from that of the untouched input (0) to its own (1): `x + gate * (block(x) - x)`. A block whose
  gate is 0 thus costs nothing, its norm included.
"""

import threading
from functools import partial

import torch
from torch import nn

from .errors import ConfigError
from .modeling.architectures import find_encoder, get_layers
from .modeling.cutting import hidden_dims
from .modeling.pruner import forget_compiled
from .modeling.selection import Skim
from .modeling.sizes import has_attention, has_ffn, head_size, sizes_of
from .precision import at_least_float32

PARTS = ("hidden", "heads", "units", "blocks")


class Layout:
    """Where in the vector of all gates those of each part of the model stand.

    Args:
        model: an encoder of a supported family.
        parts: which of `PARTS` have gates.

    Attributes:
        size: number of gates.
        blocks: of attention and FFNs, how many the model has.
        parts: where gates stand, by part: `"hidden"`, or `("heads", layer)`, `("units", layer)`, `("attention", layer)` and
            `("ffn", layer)` for the two blocks of a layer. A slice each.

    Raises:
        UnsupportedModelError: the model has no such parts.
    """

    def __init__(self, model, parts=PARTS):
        self.hidden, self.heads, self.units = sizes_of(model)
        self.parts, self.size = {}, 0
        self.blocks = sum(bool(count) for count in (*self.heads, *self.units))
        if "hidden" in parts:
            self._add("hidden", self.hidden)
        for layer, (heads, units) in enumerate(zip(self.heads, self.units, strict=True)):
            if heads:
                self._add(("heads", layer), heads, "heads" in parts)
                self._add(("attention", layer), 1, "blocks" in parts)
            if units:
                self._add(("units", layer), units, "units" in parts)
                self._add(("ffn", layer), 1, "blocks" in parts)

    def _add(self, name, count, wanted=True):
        if wanted:
            self.parts[name] = slice(self.size, self.size + count)
            self.size += count

    def of(self, gates, name):
        """The gates of one part, or None if it has none."""
        return gates[self.parts[name]] if name in self.parts else None

    def share(self, gates, name):
        """Mean of the gates of a part: the share of it that is left. 1 if it has no gates."""
        return gates[..., self.parts[name]].mean(-1) if name in self.parts else 1.0

    def left(self, gates):
        """What is left where gates are 0 or 1: `(hidden, heads, units)` as `cutting.cut` takes them, `hidden` None for all."""
        gates = gates.cpu() > 0.5

        def numbers(part, block, layer, count):
            on = self.of(gates, (block, layer))
            if not count or (on is not None and not on.item()):
                return []
            some = self.of(gates, (part, layer))
            return list(range(count)) if some is None else some.nonzero().flatten().tolist()

        hidden = self.of(gates, "hidden")
        return (
            None if hidden is None or bool(hidden.all()) else hidden.nonzero().flatten().tolist(),
            [numbers("heads", "attention", layer, count) for layer, count in enumerate(self.heads)],
            [numbers("units", "ffn", layer, count) for layer, count in enumerate(self.units)],
        )


class StructureGates:
    """Puts gates on the weights of a model in force.

    Args:
        model: the model, packed.
        layout: which gates there are.

    Attributes:
        hard: `(gates,)` of 0 and 1: what holds in evaluation mode, and whenever `soft` is None. None = all 1.
        soft: `(gates,)` in [0, 1] with a gradient, for a forward in training mode.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hf_tokenprune import pack
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        >>> model = pack(BertModel(config))
        >>> structure = StructureGates(model, Layout(model))
        >>> structure.hard = torch.ones(structure.layout.size)
        >>> structure.hard[structure.layout.parts["attention", 1]] = 0.0
        >>> _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> structure.remove()
    """

    def __init__(self, model, layout):
        self.pruner, self.layout = model.token_pruner, layout
        self.hard = self.soft = None
        self.inputs = {}
        self.handles = []
        self._install(model)

    def __getstate__(self):
        return {**self.__dict__, "soft": None, "inputs": {}}

    def remove(self):
        """Take all hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def say(self, layer):
        """How much each head of a layer counts in the importance of tokens: a head that is gated off will have no say once it is cut
        out. None = all alike, also where no head is left to say anything."""
        gates = self._now()
        heads = None if gates is None else self.layout.of(gates, ("heads", layer))
        return None if heads is None or not heads.any() else heads.detach().float()

    def hidden(self):
        """The gates of the hidden units that are in force, or None."""
        gates = self._now()
        return None if gates is None else self.layout.of(gates, "hidden")

    def _now(self):
        if self.soft is not None and (self.pruner.training or self.pruner.soft_in_eval):
            return self.soft
        return self.hard

    def _gate(self, name, like):
        """The gates of a part as a tensor like another, or None if they change nothing."""
        gates = self._now()
        gates = None if gates is None else self.layout.of(gates, name)
        return None if gates is None else gates.to(like.dtype)

    def _install(self, model):
        forget_compiled()
        keep = self.handles.append
        family, encoder = find_encoder(model)
        layers = get_layers(family, encoder)
        if "hidden" in self.layout.parts:
            within = {id(module) for layer in layers for module in layer.modules()}
            for name, dims in hidden_dims(model).items():
                module = model.get_submodule(name.rpartition(".")[0])
                if not name.endswith(".weight") or dims[0][0] != 0:
                    continue
                if isinstance(module, nn.LayerNorm):
                    keep(module.register_forward_hook(partial(self._norm, "hidden", 1)))
                elif isinstance(module, nn.Linear) and id(module) not in within:
                    if dims[0][1] != 1:
                        raise ConfigError(f"{name} makes the hidden units {dims[0][1]} times, which cannot be gated.")
                    keep(module.register_forward_hook(self._linear))
        for number, layer in enumerate(layers):
            site = self.pruner.site(number)
            if isinstance(site, Skim):
                # Samplers only look on: what they learn is none of the gates' business.
                keep(site.net[0].register_forward_hook(partial(self._norm, "hidden", 1, learns=False)))
            scorer = getattr(site, "scorer", None)
            if scorer is not None:
                keep(scorer.norms["entered"].register_forward_hook(partial(self._norm, "hidden", 1)))
                width = head_size(family, layer)
                keep(scorer.norms["context"].register_forward_hook(partial(self._norm, ("heads", number), width)))
            blocks = (
                (has_attention, "attention", ("heads", family.context), family.attention, family.exit),
                (has_ffn, "ffn", ("units", family.units_out), family.ffn, family.ffn),
            )
            for place, (has, block, (part, reader), whole, end) in enumerate(blocks):
                if not has(family, layer):
                    continue
                if (part, number) in self.layout.parts:
                    width = head_size(family, layer) if part == "heads" else 1
                    hook = partial(self._read, (part, number), width)
                    keep(layer.get_submodule(reader).register_forward_pre_hook(hook))
                if (block, number) not in self.layout.parts:
                    continue
                if family.exit_residual:
                    keep(layer.get_submodule(end).register_forward_hook(partial(self._residual, (block, number))))
                elif family.norms:
                    hook = partial(self._remember, (block, number))
                    # Before tokens are dropped at the door of the FFN.
                    keep(layer.get_submodule(whole).register_forward_pre_hook(hook, prepend=True))
                    keep(
                        layer.get_submodule(family.norms[place]).register_forward_hook(
                            partial(self._after_norm, (block, number))
                        )
                    )
                else:
                    keep(layer.get_submodule(whole).register_forward_hook(partial(self._block, (block, number))))

    # The hooks. Each leaves things as they are while its gates are not in force.

    @torch.compiler.disable
    def _norm(self, name, width, norm, args, output, *, learns=True):
        gates = self._gate(name, torch.empty(0))
        if gates is None:
            return None
        gates = gates if learns else gates.detach()
        return gated_layer_norm(args[0], norm, gates.repeat_interleave(width)).to(output.dtype)

    @torch.compiler.disable
    def _linear(self, linear, args, output):
        gates = self._gate("hidden", output)
        return None if gates is None else output * gates

    @torch.compiler.disable
    def _read(self, name, width, linear, args):
        gates = self._gate(name, args[0])
        return None if gates is None else (args[0] * gates.repeat_interleave(width),)

    @torch.compiler.disable
    def _residual(self, name, module, args, output):
        gate = self._gate(name, output)
        return None if gate is None else torch.lerp(args[1].to(output.dtype), output, gate)

    @torch.compiler.disable
    def _block(self, name, module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        gate = self._gate(name, states)
        if gate is None:
            return None
        return (states * gate, *output[1:]) if isinstance(output, tuple) else states * gate

    @torch.compiler.disable
    def _remember(self, name, module, args):
        if self._now() is not None:
            self.inputs[threading.get_ident(), name] = args[0]

    @torch.compiler.disable
    def _after_norm(self, name, norm, args, output):
        gate = self._gate(name, output)
        return (
            None if gate is None else torch.lerp(self.inputs.pop((threading.get_ident(), name)).to(output.dtype), output, gate)
        )


def gated_layer_norm(states, norm, gates):
    """LayerNorm in which each unit counts `gates` times, in float32 at least.

    With gates of 0 and 1 this is the LayerNorm over the units that are left, and 0 elsewhere.

    Args:
        states: `(..., H)`.
        norm: the `nn.LayerNorm`.
        gates: `(H,)` in [0, 1].

    Returns:
        `(..., H)` in float32 at least.

    Example:
        >>> norm, states = nn.LayerNorm(4, elementwise_affine=False), torch.tensor([1.0, 9.0, 3.0, 9.0])
        >>> gated_layer_norm(states, norm, torch.tensor([1.0, 0.0, 1.0, 0.0]))
        tensor([-1.0000,  0.0000,  1.0000,  0.0000])
    """
    states = at_least_float32(states)
    gates = gates.to(states.dtype)
    share = gates / gates.sum().clamp(min=1e-6)
    weight = gates if norm.weight is None else norm.weight.to(states.dtype) * gates
    bias = getattr(norm, "bias", None)
    with torch.autocast(states.device.type, enabled=False):  # products with a vector take a fraction of the memory of means
        centred = states - (states @ share)[..., None]
        scaled = centred * torch.rsqrt(centred.square() @ share + norm.eps)[..., None]
    return scaled * weight if bias is None else torch.addcmul(bias.to(states.dtype) * gates, scaled, weight)
