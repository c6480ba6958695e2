"""The hooks that pack an encoder's input, drop tokens at its sites, and unpack its output.

What one forward has to remember is in `calls`. The hooks before and after each layer, and around the layer's `exit` module (see
`architectures.Family`), carry out what its `LayerCall` decided.
"""

import contextlib
import sys
from inspect import signature

import torch
from torch import nn

from .architectures import find_encoder, get_layers, is_sharded, reads_only_pooled
from .attention import ATTENTION, register_attention
from .calls import Forward, LayerCall, active
from .errors import ConfigError, UnsupportedInputError, UnsupportedModelError
from .packing import PackedBatch, check_not_empty
from .padded import after_attention, before_attention, on_probabilities
from .selection import SELECTORS
from .shapes import shape_map
from .sizes import has_attention, sizes_of
from .spans import never_in_padding, padding_of, span_head


def forget_compiled():
    """Hooks come or go: what torch.compile has compiled before does not notice, and must be compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def check_unshared(model):
    """Raise `UnsupportedModelError` if the hooks of another model's pruner are on the encoder of this one."""
    family, encoder = find_encoder(model)
    own = getattr(model, "token_pruner", None)
    owners = [getattr(hook, "__self__", None) for hook in get_layers(family, encoder)[0]._forward_pre_hooks.values()]
    # By name: the code of a saved folder has a class of its own.
    if any(type(owner).__name__ == TokenPruner.__name__ and owner is not own for owner in owners):
        raise UnsupportedModelError(
            f"The {type(encoder).__name__} in this {type(model).__name__} is packed already, through another model that it is a part "
            "of, or was copied from. One encoder can be packed through one model: hf_tokenprune.detach that one first."
        )


class TokenPruner(nn.Module):
    """Packs an encoder's input, drops tokens at the sites and unpacks the output; `model.token_pruner`.

    All that a checkpoint must hold is a parameter or buffer here: the selectors under `sites`, and under `training_state`
    what a method adds while it trains. Nothing else about the model changes but its hooks and its attention function.

    Attributes:
        sites: selectors by layer number.
        soft: by layer number, a callable `(importance, batch, protected) -> weights (T,)` in [0, 1] that stands in for the
            selector in training mode; a token of weight 0 is dropped. In the place of a selector that looks before the layer
            it gets the hidden states `(T, H)` instead of importance, and a token of weight 0 waits, masked, for its gradient.
        watched: layers whose importance is wanted, and then found in `last_forward.calls[layer].importance`.
        differentiable: the importance of watched layers has a gradient.
        remembers: hidden states before and after each layer are wanted, and then found in `last_forward.calls[layer]` as `entered`
            and `left`.
        soft_in_eval: use `soft` in evaluation mode too.
        objective: called instead of the model's forward in training mode, as `objective(model, forward, args, kwargs)`.
        meter: called with the pruner after each forward.
        evaluation: what was measured of the model with its present weights, for its model card; or None.
        structure: while weights are gated, the package's `StructureGates`, of which this asks `say(layer)`: how much each head of a
            layer counts in importance.
        trace: a `LayerTrace` per layer of the latest forward.
        guarded: how many tokens of each sequence of the latest forward in training are protected, where the user protects some.
    """

    def __init__(self, model, settings):
        super().__init__()
        self.family, encoder = find_encoder(model)
        self.alone = encoder is model
        layers = get_layers(self.family, encoder)
        self._measure(encoder, layers)
        self.pooled_head = reads_only_pooled(self.family, model, encoder)
        self.protected_ids = settings["protected_token_ids"]
        self.sites = nn.ModuleDict()
        for site in settings["sites"]:
            selector = dict(site["selector"])
            kind = SELECTORS[selector.pop("kind")]
            self.check_sites([site["layer"]], kind)
            if selector.get("hidden", self.hidden_size) != self.hidden_size:
                raise ConfigError(
                    f"The selector at layer {site['layer']} reads {selector['hidden']} hidden units, but this model has "
                    f"{self.hidden_size}."
                )
            self.sites[str(site["layer"])] = kind(**selector)
        self.soft = {}
        self.soft_in_eval = False
        self.watched = frozenset()
        self.differentiable = False
        self.remembers = False
        self.objective = None
        self.meter = None
        self.evaluation = None
        self.trace = []
        self.guarded = None
        self.last_forward = None
        self.handles = []
        self.structure = None
        self.dense_attention = []
        self.finds_spans = False

    def __getstate__(self):
        """A copy or pickle is a model for inference: what hangs on it while it trains stays behind."""
        left = {"soft": {}, "watched": frozenset(), "remembers": False, "objective": None, "meter": None, "last_forward": None}
        return {**self.__dict__, **left}

    def _measure(self, encoder, layers):
        self.layer_count = len(layers)
        self.with_attention = [has_attention(self.family, layer) for layer in layers]
        self.hidden_size = encoder.config.hidden_size if shape_map(encoder) is None else sizes_of(encoder)[0]

    def keep_layers(self, model, numbers):
        """The model's layers at `numbers` are left, and perhaps less of them: the sites get their new numbers, or go."""
        _, encoder = find_encoder(model)
        self._measure(encoder, get_layers(self.family, encoder))
        old = {int(layer): selector for layer, selector in self.sites.items()}
        self.sites = nn.ModuleDict({str(new): old[number] for new, number in enumerate(numbers) if number in old})
        for layer in [int(layer) for layer in self.sites]:
            if layer not in self.possible_sites(self.site(layer)):
                del self.sites[str(layer)]
        self.trace = []
        if self.structure is not None:
            self.structure.remove()
            self.structure = None

    def possible_sites(self, selector=None):
        """The layers that can be sites of a kind of selector. One that ranks by attention needs some, and a pooled head's last
        layer computes one token anyway; one that looks before the layer can stand anywhere."""
        layers = range(self.layer_count)
        if selector is not None and selector.before:
            return list(layers)
        return [i for i in layers if self.with_attention[i] and not (self.pooled_head and i == self.layer_count - 1)]

    def check_sites(self, layers, selector=None):
        """Raise `ConfigError` if tokens cannot be dropped in one of these layers."""
        possible = self.possible_sites(selector)
        for layer in layers:
            if layer not in possible:
                raise ConfigError(
                    f"There is a site at layer {layer}, but this model with {self.layer_count} layers can drop tokens in layers "
                    f"{', '.join(map(str, possible)) or 'none at all'}"
                    + (" (its last layer computes the pooled token alone)" if self.pooled_head else "")
                    + (". Layers without attention cannot rank tokens." if not all(self.with_attention) else ".")
                )

    def site(self, layer):
        """The selector of a layer, or None."""
        name = str(layer)
        return self.sites[name] if name in self.sites else None

    @property
    def pooled_asks_alone(self):
        """Is the token that a pooled head reads the only one that asks in the last layer? Attention that a family computes itself
        computes all."""
        return self.pooled_head and not self.family.probabilities

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
        # The encoder's first. Mostly there is no other, but somebody may have given it one that its attention does not read.
        configs = {
            id(c): c for m in encoder.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation_internal")
        }
        names = [config._attn_implementation for config in configs.values()]
        # Already ours if another packed model has the same config object.
        names = ["sdpa" if name == ATTENTION else name for name in names]
        self.dense_attention = list(zip(configs.values(), names, strict=True))
        self._use_packed_attention(encoder)
        keep = self.handles.append
        if not self.alone:
            keep(encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True))
            keep(encoder.register_forward_hook(self._after_encoder, always_call=True))
        self._watch_spans(model)
        forget_compiled()
        # All layers alike, also where nobody is dropped: torch.compile uses the code of one layer for all.
        for layer in dict.fromkeys(layers):  # a shared one is there many times
            if self.family.probabilities:
                attention = layer.get_submodule(self.family.attention)
                keep(attention.register_forward_pre_hook(before_attention, with_kwargs=True))
                keep(attention.register_forward_hook(after_attention, with_kwargs=True))
                keep(layer.get_submodule(self.family.probabilities).register_forward_pre_hook(on_probabilities))
            keep(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
            # Before any hook of transformers that records hidden states, so that these are of the tokens that stay.
            keep(layer.register_forward_hook(self._after_layer, prepend=True))
            leaves = layer.get_submodule(self.family.exit)
            if self.family.exit_after:
                keep(leaves.register_forward_hook(self._leave))
                continue
            keep(leaves.register_forward_pre_hook(self._before_exit))
            if not self.family.exit_residual:
                keep(leaves.register_forward_hook(self._after_exit))

    def _watch_spans(self, model):
        """Hook the head that looks for spans, if the present one is not hooked: PEFT puts another there when it merges."""
        head = span_head(model)
        self.finds_spans = head is not None
        if self.finds_spans and never_in_padding not in head._forward_hooks.values():
            self.handles.append(head.register_forward_hook(never_in_padding))
            forget_compiled()

    def uninstall(self, model):
        """Remove every hook and give the encoder the attention function that it came with."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        forget_compiled()
        _, encoder = find_encoder(model, check=False)
        for config, name in ((encoder.config, self.dense_attention[0][1]), *self.dense_attention):
            config._attn_implementation_internal = name

    def _use_packed_attention(self, encoder):
        if self.family.probabilities:
            return
        register_attention()
        for config in (encoder.config, *(config for config, _ in self.dense_attention)):
            config._attn_implementation_internal = ATTENTION

    @contextlib.contextmanager
    def head(self, model):
        """Within this context the encoder is called by the model's own head, not by itself."""
        if self.finds_spans:
            self._watch_spans(model)
        outer = active.head, active.padding, active.forward
        active.head, active.padding = self, None
        try:
            yield
        finally:  # a KeyboardInterrupt runs no hooks, so the encoder's last one may not have run
            active.head, active.padding, active.forward = outer
            active.call = None

    def run(self, model, forward, args, kwargs):
        """The forward of a model that is itself the encoder. It may be called as `model.forward(...)`, which runs no hooks."""
        if not self.alone:
            return forward(model, *args, **kwargs)
        args, kwargs = self._before_encoder(model, args, kwargs)
        output = changed = None
        try:
            output = forward(model, *args, **kwargs)
        finally:
            changed = self._after_encoder(model, args, output)
        return output if changed is None else changed

    # The hooks, in the order in which they run. What they do depends on the data; torch.compile compiles what lies between them.

    @torch.compiler.disable
    def _before_encoder(self, encoder, args, kwargs):
        if getattr(encoder, "_is_replica", False):
            raise UnsupportedInputError(
                "This is a copy of a packed model that DataParallel has made for one of several GPUs; the hooks on it belong to the "
                "model that it was copied from. Start the script with `torchrun --nproc_per_node N`, or set CUDA_VISIBLE_DEVICES to "
                "one GPU."
            )
        if torch.jit.is_tracing():  # torch.export refuses by itself
            raise UnsupportedInputError(
                "A packed model cannot be traced or exported: the lengths of these very texts would be written into the graph. "
                "Export the dense model: hf_tokenprune.detach(model) gives it back."
            )
        asked = {}
        for name in ("output_attentions", "output_hidden_states"):
            by_config = getattr(encoder.config, name, None)
            value = kwargs.get(name, by_config)
            if value is None and self.family.probabilities:  # these encoders take None for their config's; all others for no
                value = by_config
            asked[name] = value is not None and value is not False  # 0 asks for the first hidden state
        if asked["output_attentions"]:
            raise UnsupportedInputError(
                "output_attentions=True: a packed model never forms the attention matrices. Ask the dense model: "
                "hf_tokenprune.detach(model) gives it back."
            )
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UnsupportedInputError(
                "cu_seq_lens_q was given: these texts come one after another in one row, and a packed model would read them as one "
                "text. Let it pack them: pass them padded, with their attention_mask (no DataCollatorWithFlattening; in "
                "sentence-transformers unpad_inputs=False)."
            )
        for name in ("past_key_values", "encoder_hidden_states", "use_cache"):
            if kwargs.get(name) is not None and kwargs.get(name) is not False:
                raise UnsupportedInputError(
                    f"{name} was given, but a packed model is an encoder: it has no cache and no cross-attention."
                )
        if self.family.pools_last and "use_cache" in signature(encoder.forward).parameters:
            kwargs = {**kwargs, "use_cache": False}  # else the config, made for generation, would have one filled
        given = signature(encoder.forward).bind_partial(*args, **kwargs).arguments
        if self.family.pools_last and given.get("attention_mask") is None and _begin_anew(given.get("position_ids")):
            raise UnsupportedInputError(
                "position_ids begin anew within a row (a step is not 1): a packed model would read the texts in it as one. Pass one "
                "text a row, with attention_mask; also where this is one text."
            )
        ids = given.get("input_ids")
        is_ids = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
        words = given.get("inputs_embeds") if ids is None else ids
        if isinstance(words, torch.Tensor) and words.ndim > 1:
            check_not_empty(*words.shape[:2])  # some encoders make of it an error of their own, before the first layer
        # Anew in every forward: a model with the same config object may have been detached, or this one come out of a pickle.
        self._use_packed_attention(encoder)
        return_tuple = kwargs.get("return_dict", encoder.config.return_dict) is False
        active.forward = Forward(
            self,
            ids if is_ids else None,
            given.get("attention_mask"),
            padding_id=getattr(encoder.config, "pad_token_id", None),
            head_reads=self.pooled_head and active.head is self,
            return_tuple=return_tuple,
            keeps_states=asked["output_hidden_states"],
            outer=active.forward,
        )
        return args, {**kwargs, "return_dict": True}

    @torch.compiler.disable
    def _before_layer(self, layer, args, kwargs):
        forward = active.forward
        if forward is None or forward.pruner is not self:
            raise UnsupportedInputError(
                "A part of a packed encoder was called by itself, but texts are packed at the encoder's entrance. Call the encoder "
                "as a whole, or hf_tokenprune.detach(model) first."
            )
        number = len(forward.calls)
        states = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            mask = forward.mask if self.family.own_mask else mask
            batch = PackedBatch.from_mask(mask, batch_size=states.shape[0], seq_len=states.shape[1], device=states.device)
            forward.begin(batch)
            states = batch.pack(states)
        else:
            batch = forward.calls[-1].survivors
        site, arrived = self.site(number), batch.lengths
        if site is not None and site.before:
            batch, states = self._skim(forward, number, site, batch, states)
            site = None
        elif site is not None and not self.needs_importance(site):
            site = None
        call = LayerCall(
            self, number, batch, states, arrived,
            site=site,
            gates=self.soft[number] if site is not None and self.is_soft else None,
            protected=None if site is None else forward.protected(batch),
            spared=None if site is None else forward.spared(),
            pooled=forward.pooled(batch) if forward.pooled_only and number == self.layer_count - 1 else None,
            summary=forward.summary(batch) if number in self.watched else None,
            watched=number in self.watched,
            differentiable=self.training and self.differentiable and number in self.watched,
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

    def _skim(self, forward, number, site, batch, states):
        """Let a selector that looks before the layer drop tokens, or in training mask them."""
        soft = self.soft.get(number) if self.is_soft else None
        if soft is None and site.idle:
            return batch, states
        protected = forward.protected(batch)
        if soft is not None:
            weights = soft(states[0], batch, protected)
            weights = weights if batch.weights is None else weights * batch.weights
            return batch.with_weights(weights, masked=True), states
        keep = site.keep(states[0], batch, protected, one_each=not self.family.summary_tokens)
        rows, chosen = batch.choose(keep)
        if rows.shape[0] == batch.total:
            return batch, states
        if not forward.pooled_only:
            forward.leave_behind(number, batch, states)
        return chosen, states.index_select(1, rows)

    @torch.compiler.disable
    def _before_exit(self, module, args):
        call = active.call
        return None if call.rows is None else tuple(call.stay(tensor) for tensor in args)

    @torch.compiler.disable
    def _leave(self, module, args, output):
        return (active.call.stay(output[0]), *output[1:])

    @torch.compiler.disable
    def _after_exit(self, module, args, output):
        call = active.call
        if call.rows is None:
            return None
        return output.new_zeros(1, call.batch.total, output.shape[-1]).index_copy(1, call.rows, output)

    @torch.compiler.disable
    def _after_layer(self, layer, args, output):
        forward = active.forward
        call = forward.calls[-1]
        states = output[0] if isinstance(output, tuple) else output
        if not self.family.exit_residual:
            states = call.stay(states)
        if not forward.pooled_only:
            if call.survivors.weights is not None:
                weights = call.survivors.weights[:, None].to(states.dtype)
                states = weights * states + (1 - weights) * call.stay(call.entered)
            if call.rows is not None:
                forward.leave_behind(call.layer, call.batch, call.entered)
        active.call = None
        if self.remembers:
            call.left = states
        elif call.scorer is None or not self.training:  # a scorer that gradient checkpointing runs again reads them again
            call.entered = None
        if call.layer == self.layer_count - 1:
            states = call.survivors.unpack(states, [before for _, before in forward.left_behind], forward.flat)
            if is_sharded(layer):  # FSDP2 hangs a hook on what a layer returns and warns of views
                states = states.clone()
        return (states, *output[1:]) if isinstance(output, tuple) else states

    @torch.compiler.disable
    def _after_encoder(self, encoder, args, output):
        forward = active.forward
        if forward is None or forward.pruner is not self:
            return None
        active.forward = forward.outer
        active.call = None
        if output is None:  # the forward raised
            return None
        self.trace = [call.trace() for call in forward.calls]
        if self.finds_spans and active.head is self:
            active.padding = padding_of(forward.first)
        self.guarded = forward.spared() if self.protected_ids and self.objective is not None and self.training else None
        self.last_forward = forward if self.watched or self.remembers else None
        if self.meter is not None:
            self.meter(self)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(forward.padded(number, state) for number, state in enumerate(states))
        return output.to_tuple() if forward.return_tuple else output


def _begin_anew(places):
    """Are these `position_ids` of several texts in one row? Without a cache, any step but 1 is a text's start to transformers."""
    return places is not None and places.ndim == 2 and bool((places.diff(dim=-1) != 1).any())
