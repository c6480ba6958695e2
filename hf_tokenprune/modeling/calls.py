"""One pass through an encoder, and one call of a layer in it.

A layer call travels through the unmodified layer as its `attention_mask`, so that the attention function finds it there, in a
layer that gradient checkpointing re-computes as well as in another thread; it decides who survives.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention import packed_attention
from .errors import UnsupportedInputError
from .packing import PackedBatch, rows_of
from .ranking import most_important


class Active(threading.local):
    """What runs on this thread right now.

    Attributes:
        forward: the `Forward` of the encoder that is running.
        call: the `LayerCall` whose attention has just run.
        head: the `TokenPruner` whose model's own head is calling its encoder.
        padding: `(B, S)` bool, where the padding is of what that encoder has read, if the head looks for spans; None = nowhere.
    """

    forward = None
    call = None
    head = None
    padding = None


active = Active()


@dataclass(frozen=True)
class LayerTrace:
    """Tokens per sequence, shortest sequences first: those that arrived at a layer, that entered it, that asked in its attention,
    and that survived it."""

    arrived: list[int]
    entered: list[int]
    queries: list[int]
    survived: list[int]


@dataclass
class LayerCall:
    """One call of one layer.

    Args:
        pruner: the model's `TokenPruner`.
        layer: the layer's number.
        batch: the tokens that enter the layer.
        entered: `(1, T, H)` hidden states that enter the layer.
        arrived: tokens per sequence before any were dropped at the entrance of the layer.
        site: the selector, if the layer is a site where tokens may be dropped this time.
        gates: what stands in for the selector in training, or None; see `TokenPruner.soft`.
        protected: `(T,)` bool at a site, else None.
        spared: how many of these each sequence has, where the host knows it.
        pooled: `(K,)` rows of the tokens, one of each sequence, that alone are read after this layer; None = all may be.
        summary: `(T,)` bool, the tokens that are there to be read by heads.
        watched: importance is wanted even if there is no site.
        differentiable: the importance is to have a gradient.
        rows: `(K,)` the tokens that stay, known once attention has run; None = all, who are then in `everyone` if gated.
        survivors: the tokens that leave the layer on its normal way.
        importance: `(T,)` attention received, at a site and in a watched layer; or what the site makes of it.
        received: `(T,)` the attention received, between the moment it is known and that at which survivors are chosen, where these
            are two.
        left: `(1, T, H)` hidden states of the survivors after the layer, if the pruner is to remember them.
    """

    pruner: Any
    layer: int
    batch: PackedBatch
    entered: torch.Tensor
    arrived: list[int]
    site: Any = None
    gates: Any = None
    protected: torch.Tensor | None = None
    spared: list[int] | None = None
    pooled: torch.Tensor | None = None
    summary: torch.Tensor | None = None
    watched: bool = False
    differentiable: bool = False
    rows: torch.Tensor | None = None
    survivors: PackedBatch | None = None
    everyone: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    received: torch.Tensor | None = None
    left: torch.Tensor | None = None

    @property
    def scorer(self):
        """What makes importance of the attention received, or None."""
        return getattr(self.site, "scorer", None)

    @property
    def needs_importance(self):
        """Must this layer's attention say what each token receives?"""
        return self.watched or self.site is not None

    @property
    def asking(self):
        """The rows whose attention is computed, or None for all."""
        return None if self.watched or not self.pruner.pooled_asks_alone else self.pooled

    def attend(self, query, key, value, dropout, scaling, window, causal):
        """Attention of this layer; chooses the survivors on the way."""
        active.call = self
        if query.device != self.batch.index.device:
            raise UnsupportedInputError(
                f"Layer {self.layer} is on {query.device}, the first on {self.batch.index.device}: a packed model has to be on one "
                'device. Load it with device_map={"": 0}, for instance.'
            )
        context, importance = packed_attention(
            query, key, value, self.batch,
            dropout=dropout, scaling=scaling, window=window, causal=causal,
            importance=self.needs_importance,
            asking=self.asking,
            differentiable=self.differentiable,
            say=None if self.pruner.structure is None else self.pruner.structure.say(self.layer),
        )  # fmt: skip
        self.decide(importance, context)
        return context

    def decide(self, importance, context=None):
        """Choose the survivors, now that attention has run.

        Args:
            importance: `(T,)` the attention received, or None where nobody needs it.
            context: `(1, T, heads, head_dim)` or `(1, T, width)` what it has brought together for each token; a scorer reads it.
        """
        if self.scorer is not None:
            importance = self.scorer(importance, self.batch, self.entered[0], context[0].flatten(1))
        again = self.survivors is not None
        weights = None if self.gates is None else self._weights(importance)
        if again:
            # Gradient checkpointing re-computes the layer. It must come to the same survivors by the same operations.
            if weights is not None:
                weights[self.rows if self.rows is not None else self.everyone]
        else:
            self.importance = importance
            self._choose(weights)

    @torch.compiler.disable
    def skip(self):
        """There is no attention in this layer."""
        active.call = self
        if self.survivors is None:
            self._choose(None)

    def _weights(self, importance):
        weights = self.gates(importance, self.batch, self.protected)
        if not self.pruner.family.summary_tokens:
            weights = torch.where(most_important(importance, self.batch, self.protected), torch.ones_like(weights), weights)
        return weights if self.batch.weights is None else weights * self.batch.weights

    def _choose(self, weights):
        self.survivors = self.batch
        if self.pooled is not None:
            rows, chosen = self.pooled, self.batch.one_each(self.pooled)
        elif self.site is None:
            return
        elif weights is not None:
            rows, chosen = self.batch.choose(weights > 0, weights)
        else:
            keep = self.site.keep(self.importance, self.batch, self.protected)
            if not self.pruner.family.summary_tokens:
                keep = keep | most_important(self.importance, self.batch, self.protected)
            rows, chosen = self.batch.choose(keep, lengths=self._known_lengths())
        if rows.shape[0] < self.batch.total:
            self.rows, self.survivors = rows, chosen
        elif weights is not None:
            self.everyone, self.survivors = rows, self.batch.with_weights(chosen.weights)

    def _known_lengths(self):
        """How many tokens of each sequence stay, where that depends on their number alone: nobody has to wait for the device."""
        if self.spared is None:
            return None
        counts = self.site.counts([n - spared for n, spared in zip(self.batch.lengths, self.spared, strict=True)])
        return counts and [sum(pair) for pair in zip(counts, self.spared, strict=True)]

    def stay(self, tensor):
        """The survivors' part of `(1, T, *rest)`."""
        return tensor if self.rows is None else tensor.index_select(1, self.rows)

    def trace(self):
        entered = self.batch.lengths
        asking = entered if self.asking is None else [min(n, 1) for n in entered]
        return LayerTrace(self.arrived, entered, asking, self.survivors.lengths)


@dataclass
class Forward:
    """What one pass through the encoder has to remember.

    Args:
        pruner: the model's `TokenPruner`.
        input_ids: `(B, S)`, or None if the caller passed embeddings or pixels.
        mask: the `attention_mask` that the caller passed.
        padding_id: id of the padding token, or None.
        head_reads: the model's own head is calling, and reads nothing but one pooled token of each sequence.
        return_tuple: the caller wants a tuple.
        keeps_states: hidden states were asked for, so that other tokens than the pooled one are read.
        outer: the forward that this one runs inside of, on the same thread.
        calls: one `LayerCall` per layer so far.
        first: the batch of all real tokens.
        left_behind: for each layer that dropped tokens, `(layer, (index, states))` of all that entered it: those that leave there
            keep the hidden state they entered with. Where nobody will ask for them again, they are in `flat` instead.
        flat: `(B * S, H)` the latest known hidden state of each token of layers that dropped some, or None.
    """

    pruner: Any
    input_ids: torch.Tensor | None
    mask: Any
    padding_id: int | None
    head_reads: bool
    return_tuple: bool
    keeps_states: bool
    outer: Any = None
    calls: list[LayerCall] = field(default_factory=list)
    left_behind: list = field(default_factory=list)
    flat: torch.Tensor | None = None
    gathered: dict = field(default_factory=dict)
    read: torch.Tensor | None = None
    guarded: torch.Tensor | None = None
    first: PackedBatch | None = None
    counted: list[int] | None = None

    @property
    def pooled_only(self):
        """Is nothing but the pooled token of the last layer read?"""
        return self.head_reads and not self.keeps_states

    def begin(self, batch):
        """Find the tokens that heads read, in the batch of all real tokens."""
        self.first = batch
        self.read = torch.zeros(batch.batch_size * batch.seq_len, dtype=torch.bool, device=batch.index.device)
        family = self.pruner.family
        if not family.pools_last:
            if self.pruner.pooled_head and not batch.begins:
                raise UnsupportedInputError(
                    "attention_mask marks the first position of a sequence as padding, but this model's head reads the first "
                    "position. Pad on the right: tokenizer.padding_side = 'right'."
                )
            if family.summary_tokens == 1:
                self.read.index_fill_(0, batch.index[batch.first_rows], True)
            else:
                self.read.index_copy_(0, batch.index, batch.places < family.summary_tokens)
        elif self.head_reads:
            self.read[self._last_that_is_no_padding(batch)] = True
        else:
            self.read[batch.index[batch.last_rows]] = True

    def _last_that_is_no_padding(self, batch):
        """Where in the flat padded batch the tokens stand that transformers' classification heads of causal models read: the last
        of each sequence whose id is not that of padding, or its very last position where there are no ids."""
        device, pad = batch.index.device, self.padding_id
        last = torch.full((batch.batch_size,), batch.seq_len - 1, device=device)
        if self.input_ids is not None and pad is not None:
            place = torch.arange(batch.seq_len, device=device)
            last = ((self.input_ids.to(device) != pad) * place).argmax(1)
        flat = last + batch.seq_len * torch.arange(batch.batch_size, device=device)
        real = torch.zeros_like(self.read).index_fill_(0, batch.index, True).view(batch.batch_size, -1)
        if (real.any(1) & ~real.view(-1)[flat]).any():
            raise UnsupportedInputError(
                "attention_mask marks as padding what this model's head reads: the last token that is not the padding token "
                f"(config.pad_token_id = {pad}) in input_ids, or the last position where there is no padding token or no "
                "input_ids. Set config.pad_token_id to the token you pad with, and where you pass inputs_embeds pad on the left: "
                "tokenizer.padding_side = 'left'."
            )
        return flat[real.any(1)]

    def leave_behind(self, layer, batch, states):
        """Remember the hidden states `(1, T, H)` with which tokens entered a layer that drops some of them."""
        if self.keeps_states or torch.is_grad_enabled():
            self.left_behind.append((layer, (batch.index, states)))
            return
        if self.flat is None:
            self.flat = states.new_zeros(batch.batch_size * batch.seq_len, states.shape[-1])
        self.flat.index_copy_(0, batch.index, states[0].to(self.flat.dtype))

    def summary(self, batch):
        """`(T,)` bool: tokens that are there to be read by heads."""
        return self.read[batch.index]

    def pooled(self, batch):
        """`(number of non-empty sequences,)` rows of the tokens that a pooled head reads."""
        return (
            rows_of(self.read[batch.index], sum(map(bool, batch.lengths)))
            if self.pruner.family.pools_last
            else batch.first_rows
        )

    def protected(self, batch):
        """`(T,)` bool: summary tokens, and tokens whose id the user protects."""
        if self.guarded is None:
            self.guarded = self.read
            if self.pruner.protected_ids:
                if self.input_ids is None:
                    raise UnsupportedInputError(
                        f"The tokens {self.pruner.protected_ids} are protected, but this call has no input_ids to find them "
                        "in. Pass input_ids, or attach without protected_token_ids."
                    )
                ids = torch.tensor(self.pruner.protected_ids, device=self.input_ids.device)
                self.guarded = self.read | torch.isin(self.input_ids.reshape(-1), ids)
        return self.guarded[batch.index]

    def spared(self):
        """How many tokens of each sequence, in packed order, are protected; None where some sequence has none."""
        if not self.pruner.family.summary_tokens:
            return None
        if self.counted is None:
            batch = self.first
            most = 1 if self.pruner.family.pools_last else self.pruner.family.summary_tokens
            self.counted = [min(length, most) for length in batch.lengths]
            if self.pruner.protected_ids:
                _, guarded = batch.choose(self.protected(batch))
                self.counted = guarded.lengths
        return self.counted

    def gather(self, value, batch):
        """Bring a rotary `(cos, sin)` pair of `(1 or B, S, D)` into packed order `(1, T, D)`."""
        key = (id(value), id(batch))
        if key not in self.gathered:  # with what it is of: that must live, or another may get its id
            self.gathered[key] = value, batch, tuple(part if part is None else batch.pack(part) for part in value)
        return self.gathered[key][-1]

    def padded(self, number, states):
        """Entry `number` of `output_hidden_states` as `(B, S, H)`: 0 is the first layer's input, then each layer's output."""
        first = self.calls[0].batch
        if states is None or states.shape[:2] == (first.batch_size, first.seq_len):
            return states
        batch = self.calls[number - 1].survivors if number else first
        site = self.pruner.site(0)
        door = number == 0 and site is not None and site.before  # what a sampler drops before the first layer was in its input
        return batch.unpack(states, [before for layer, before in self.left_behind if layer < number + door])
