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
from .packing import PackedBatch
from .selection import most_important


class Active(threading.local):
    """What runs on this thread right now.

    Attributes:
        forward: the `Forward` of the encoder that is running.
        call: the `LayerCall` whose attention has just run.
        head: the `TokenPruner` whose model's own head is calling its encoder.
    """

    forward = None
    call = None
    head = None


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
        first_only: only the first token of each sequence is read after this layer.
        watched: importance is wanted even if there is no site.
        rows: `(K,)` the tokens that stay, known once attention has run; None = all, who are then in `everyone` if gated.
        survivors: the tokens that leave the layer on its normal way.
        importance: `(T,)` attention received, at a site and in a watched layer.
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
    first_only: bool = False
    watched: bool = False
    rows: torch.Tensor | None = None
    survivors: PackedBatch | None = None
    everyone: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    left: torch.Tensor | None = None

    def attend(self, query, key, value, dropout, scaling, window):
        """Attention of this layer; chooses the survivors on the way."""
        active.call = self
        context, importance = packed_attention(
            query, key, value, self.batch,
            dropout=dropout, scaling=scaling, window=window,
            importance=self.watched or self.site is not None,
            first_only=self.first_only and not self.watched,
            say=None if self.pruner.structure is None else self.pruner.structure.say(self.layer),
        )  # fmt: skip
        again = self.survivors is not None
        weights = None if self.gates is None else self._weights(importance)
        if again:
            # Gradient checkpointing re-computes the layer. It must come to the same survivors by the same operations.
            if weights is not None:
                weights[self.rows if self.rows is not None else self.everyone]
        else:
            self.importance = importance
            self._choose(weights)
        return context

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
        if self.first_only:
            rows = self.batch.first_rows
        elif self.site is None:
            return
        elif weights is not None:
            rows = (weights > 0).nonzero().squeeze(1)
            weights = weights[rows]
        else:
            keep = self.site.keep(self.importance, self.batch, self.protected)
            if not self.pruner.family.summary_tokens:
                keep = keep | most_important(self.importance, self.batch, self.protected)
            rows = keep.nonzero().squeeze(1)
        if rows.shape[0] < self.batch.total:
            self.rows, self.survivors = rows, self.batch.select(rows, weights)
        elif weights is not None:
            self.everyone, self.survivors = rows, self.batch.with_weights(weights)

    def stay(self, tensor):
        """The survivors' part of `(1, T, *rest)`."""
        return tensor if self.rows is None else tensor.index_select(1, self.rows)

    def departed(self):
        """`(index, states)` of the tokens that leave here: they keep the hidden state they entered the layer with."""
        gone = torch.ones(self.batch.total, dtype=torch.bool, device=self.rows.device)
        gone[self.rows] = False
        return self.batch.index[gone], self.entered[:, gone]

    def trace(self):
        entered = self.batch.lengths
        asking = [min(n, 1) for n in entered] if self.first_only and not self.watched else entered
        return LayerTrace(self.arrived, entered, asking, self.survivors.lengths)


@dataclass
class Forward:
    """What one pass through the encoder has to remember.

    Args:
        pruner: the model's `TokenPruner`.
        input_ids: `(B, S)`, or None if the caller passed embeddings or pixels.
        first_only: nothing but the first token of the last layer is read.
        outer: the forward that this one runs inside of, on the same thread.
        calls: one `LayerCall` per layer so far.
        departed: for each layer that dropped tokens, `(layer, (index, states))`.
    """

    pruner: Any
    input_ids: torch.Tensor | None
    first_only: bool
    return_tuple: bool
    outer: Any = None
    calls: list[LayerCall] = field(default_factory=list)
    departed: list = field(default_factory=list)
    gathered: dict = field(default_factory=dict)
    guarded: torch.Tensor | None = None

    def protected(self, batch):
        """`(T,)` bool: summary tokens, and tokens whose id the user protects."""
        if self.guarded is None:
            self.guarded = torch.zeros(batch.batch_size * batch.seq_len, dtype=torch.bool, device=batch.index.device)
            self.guarded[batch.index[batch.places < self.pruner.family.summary_tokens]] = True
            if self.pruner.protected_ids:
                if self.input_ids is None:
                    raise UnsupportedInputError(
                        f"The tokens {self.pruner.protected_ids} are protected, but this call has no input_ids to find them "
                        "in. Pass input_ids, or attach without protected_token_ids."
                    )
                ids = torch.tensor(self.pruner.protected_ids, device=self.input_ids.device)
                self.guarded |= torch.isin(self.input_ids.reshape(-1), ids)
        return self.guarded[batch.index]

    def gather(self, value, batch):
        """Bring a rotary `(cos, sin)` pair of `(1 or B, S, D)` into packed order `(1, T, D)`."""
        key = (id(value), id(batch))
        if key not in self.gathered:
            self.gathered[key] = tuple(part if part is None else batch.pack(part) for part in value)
        return self.gathered[key]

    def padded(self, number, states):
        """Entry `number` of `output_hidden_states` as `(B, S, H)`: 0 is the first layer's input, then each layer's output."""
        first = self.calls[0].batch
        if states is None or states.shape[:2] == (first.batch_size, first.seq_len):
            return states
        batch = self.calls[number - 1].survivors if number else first
        site = self.pruner.site(0)
        door = number == 0 and site is not None and site.before  # what a sampler drops before the first layer was in its input
        return batch.unpack(states, [gone for layer, gone in self.departed if layer < number + door])
