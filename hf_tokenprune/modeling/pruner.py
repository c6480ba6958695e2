"""The hooks that pack an encoder's input, drop tokens at its sites, and unpack its output.

What one forward has to remember is in `calls`. The hooks before and after each layer, and around the layer's `cut` module (see
`architectures.Family`), carry out what its `LayerCall` decided.
"""

import contextlib
import functools

import torch
from torch import nn

from .architectures import find_encoder, get_layers, reads_only_pooled
from .attention import ATTENTION, register_attention
from .calls import Forward, LayerCall, active
from .errors import ConfigError, UnsupportedInputError
from .packing import PackedBatch
from .selection import SELECTORS


class TokenPruner(nn.Module):
    """Packs an encoder's input, drops tokens at the sites and unpacks the output; `model.token_pruner`.

    All that a checkpoint must hold is a parameter or buffer here: the selectors under `sites`, and under `training_state`
    what a method adds while it trains. Nothing else about the model changes but its hooks and its attention function.

    Attributes:
        sites: selectors by layer number.
        soft: by layer number, a callable `(importance, batch, protected) -> weights (T,)` in [0, 1] that stands in for the
            selector in training mode; a token of weight 0 is dropped.
        watched: layers whose importance is wanted, and then found in `last_forward.calls[layer].importance`.
        soft_in_eval: use `soft` in evaluation mode too.
        objective: called instead of the model's forward in training mode, as `objective(model, forward, args, kwargs)`.
        meter: called with the pruner after each forward.
        trace: a `LayerTrace` per layer of the latest forward.
    """

    def __init__(self, model, settings):
        super().__init__()
        self.family, encoder = find_encoder(model)
        layers = get_layers(self.family, encoder)
        self.layer_count = len(layers)
        self.pooled_head = reads_only_pooled(self.family, model, encoder)
        self.protected_ids = settings["protected_token_ids"]
        self.sites = nn.ModuleDict()
        self.check_sites(site["layer"] for site in settings["sites"])
        for site in settings["sites"]:
            selector = dict(site["selector"])
            self.sites[str(site["layer"])] = SELECTORS[selector.pop("kind")](**selector)
        self.soft = {}
        self.soft_in_eval = False
        self.watched = frozenset()
        self.objective = None
        self.meter = None
        self.trace = []
        self.last_forward = None
        self.handles = []
        self.dense_attention = None

    def __getstate__(self):
        """A copy or pickle is a model for inference: what hangs on it while it trains stays behind."""
        return {**self.__dict__, "soft": {}, "watched": frozenset(), "objective": None, "meter": None, "last_forward": None}

    @property
    def highest_site(self):
        """The last layer that can be a site: a pooled head's last layer computes one token anyway."""
        return self.layer_count - (2 if self.pooled_head else 1)

    def check_sites(self, layers):
        """Raise `ConfigError` if tokens cannot be dropped in one of these layers."""
        for layer in layers:
            if not 0 <= layer <= self.highest_site:
                raise ConfigError(
                    f"There is a site at layer {layer}, but this model with {self.layer_count} layers can drop tokens in layers "
                    f"0 to {self.highest_site}"
                    + (" (its last layer computes the pooled token alone)." if self.pooled_head else ".")
                )

    def site(self, layer):
        """The selector of a layer, or None."""
        name = str(layer)
        return self.sites[name] if name in self.sites else None

    @property
    def is_soft(self):
        """Do gates stand in for the selectors?"""
        return bool(self.soft) and (self.training or self.soft_in_eval)

    def needs_importance(self, site):
        """Must the layer that feeds this site compute importance? If not, the site keeps every token."""
        return self.is_soft or site.needs_importance

    def macs(self, layer, tokens):
        """MACs that the selector of a layer itself spends on `tokens` tokens."""
        site = self.site(layer)
        return 0 if site is None else site.macs(tokens)

    def install(self, model):
        """Hook the model that this pruner was made for, and switch its attention function."""
        _, encoder = find_encoder(model)
        layers = get_layers(self.family, encoder)
        attention = encoder.config._attn_implementation
        # Already ours if another packed model has the same config object.
        self.dense_attention = "sdpa" if attention == ATTENTION else attention
        self._use_packed_attention(encoder)
        keep = self.handles.append
        keep(encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True))
        keep(encoder.register_forward_hook(self._after_encoder, always_call=True))
        for number, layer in enumerate(layers):
            keep(layer.register_forward_pre_hook(functools.partial(self._before_layer, number), with_kwargs=True))
            # Before any hook of transformers that records hidden states, so that these are of the tokens that stay.
            keep(layer.register_forward_hook(self._after_layer, prepend=True))
            if str(number) in self.sites or (self.pooled_head and number == len(layers) - 1):
                cut = layer.get_submodule(self.family.cut)
                keep(cut.register_forward_pre_hook(self._before_cut))
                if not self.family.cut_residual:
                    keep(cut.register_forward_hook(self._after_cut))

    def uninstall(self, model):
        """Remove every hook and give the encoder the attention function that it came with."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        _, encoder = find_encoder(model, check=False)
        encoder.config._attn_implementation_internal = self.dense_attention

    def _use_packed_attention(self, encoder):
        register_attention()
        encoder.config._attn_implementation_internal = ATTENTION

    @contextlib.contextmanager
    def head(self):
        """Within this context the encoder is called by the model's own head, not by itself."""
        outer = active.head
        active.head = self
        try:
            yield
        finally:
            active.head = outer

    # The hooks, in the order in which they run.

    def _before_encoder(self, encoder, args, kwargs):
        asked = {}
        for name in ("output_attentions", "output_hidden_states"):
            value = kwargs.get(name, getattr(encoder.config, name, None))
            asked[name] = value is not None and value is not False  # 0 asks for the first hidden state
        if asked["output_attentions"]:
            raise UnsupportedInputError(
                "output_attentions=True: a packed model never forms the attention matrices. Ask the dense model: "
                "hf_tokenprune.detach(model) gives it back."
            )
        for name in ("past_key_values", "encoder_hidden_states", "use_cache"):
            if kwargs.get(name) is not None and kwargs.get(name) is not False:
                raise UnsupportedInputError(
                    f"{name} was given, but a packed model is an encoder: it has no cache and no cross-attention."
                )
        ids = kwargs.get("input_ids", args[0] if args else None)
        is_ids = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
        # Anew in every forward: a model with the same config object may have been detached, or this one come out of a pickle.
        self._use_packed_attention(encoder)
        return_tuple = kwargs.get("return_dict", encoder.config.return_dict) is False
        active.forward = Forward(
            self,
            ids if is_ids else None,
            self.pooled_head and active.head is self and not asked["output_hidden_states"],
            return_tuple,
            outer=active.forward,
        )
        return args, {**kwargs, "return_dict": True}

    def _before_layer(self, number, layer, args, kwargs):
        forward = active.forward
        states = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            batch = PackedBatch.from_mask(mask, batch_size=states.shape[0], seq_len=states.shape[1], device=states.device)
            if self.pooled_head and not batch.dense:
                _check_first_position(batch)
            states = batch.pack(states)
        else:
            batch = forward.calls[-1].survivors
        site = self.site(number)
        if site is not None and not self.needs_importance(site):
            site = None
        call = LayerCall(
            self, number, batch, states,
            site=site,
            gates=self.soft[number] if site is not None and self.is_soft else None,
            protected=None if site is None else forward.protected(batch),
            first_only=forward.first_only and number == self.layer_count - 1,
            watched=number in self.watched,
        )  # fmt: skip
        forward.calls.append(call)
        kwargs = {
            name: forward.gather(value, batch) if name == "position_embeddings" and value is not None else value
            for name, value in kwargs.items()
            if name not in ("hidden_states", "attention_mask")
        }
        if len(args) > 1:
            return (states, call, *args[2:]), kwargs
        return (states,), {**kwargs, "attention_mask": call}

    def _before_cut(self, module, args):
        call = active.call
        return None if call.rows is None else tuple(call.stay(tensor) for tensor in args)

    def _after_cut(self, module, args, output):
        call = active.call
        if call.rows is None:
            return None
        return output.new_zeros(1, call.batch.total, output.shape[-1]).index_copy(1, call.rows, output)

    def _after_layer(self, layer, args, output):
        forward = active.forward
        call = forward.calls[-1]
        states = output[0] if isinstance(output, tuple) else output
        if not self.family.cut_residual:
            states = call.stay(states)
        if not forward.first_only:
            if call.survivors.weights is not None:
                weights = call.survivors.weights[:, None].to(states.dtype)
                states = weights * states + (1 - weights) * call.stay(call.entered)
            if call.rows is not None:
                forward.departed.append((call.layer, call.departed()))
        call.entered = active.call = None
        if call.layer == self.layer_count - 1:
            states = call.survivors.unpack(states, [gone for _, gone in forward.departed])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _after_encoder(self, encoder, args, output):
        forward = active.forward
        if forward is None or forward.pruner is not self:
            return None
        active.forward = forward.outer
        active.call = None
        if output is None:  # the forward raised
            return None
        self.trace = [call.trace() for call in forward.calls]
        self.last_forward = forward if self.watched else None
        if self.meter is not None:
            self.meter(self)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(forward.padded(number, state) for number, state in enumerate(states))
        return output.to_tuple() if forward.return_tuple else output


def _check_first_position(batch):
    if (batch.positions[batch.first_rows] != 0).any():
        raise UnsupportedInputError(
            "attention_mask marks the first position of a sequence as padding, but this model's head reads the first position. "
            "Pad on the right: tokenizer.padding_side = 'right'."
        )
