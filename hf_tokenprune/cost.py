"""MACs (multiply-accumulates) of an encoder's forward, from lengths and module shapes.

Counted, per layer: every `nn.Linear` (inputs x outputs, per token that runs through it), attention
(`2 * width` per query-key pair of the same sequence, `width` = heads x head size; a sliding window saves nothing), and what a
selector spends itself. Not counted: embeddings, norms, activations, softmax, biases and the head, nor what MPNet and DeBERTa spend
on relative positions and on padding to the longest text that is left in their attention; on a GPU neither that a site multiplies its
layer's queries and keys a second time to see what tokens receive, nor padding of up to a fifth where texts of about equal lengths
share a call of attention. FLOPs are twice the MACs.

    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    >>> dense_macs(BertModel(config), [3, 5]), padded_macs(BertModel(config), 2, 5)
    ([59520, 59520], [74880, 74880])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import UnsupportedInputError, UnsupportedModelError
from .modeling.architectures import find_encoder, get_layers, transformers_model
from .modeling.calls import LayerTrace
from .modeling.configs import dense_skeleton
from .modeling.shapes import shape_map
from .modeling.sizes import has_ffn


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, in MACs.

    Args:
        before: per token that enters the layer.
        after: per token that survives it.
        attention: per query-key pair.
    """

    before: int
    after: int
    attention: int

    def macs(self, *, entered: Sequence[int], queries: Sequence[int], survived: Sequence[int]) -> int:
        """MACs of one call, from tokens per sequence: entering, asking in the attention, and surviving."""
        pairs = sum(q * k for q, k in zip(queries, entered, strict=True))
        return self.before * sum(entered) + self.after * sum(survived) + self.attention * pairs

    def whole(self, lengths: Sequence[int]) -> int:
        """MACs of one call in which every token of sequences of these lengths stays."""
        return self.macs(entered=lengths, queries=lengths, survived=lengths)


def layer_costs(model: nn.Module) -> list[LayerCost]:
    """The `LayerCost` of each layer of a dense or token-pruned encoder.

    Raises:
        UnsupportedModelError: the model is of no supported family, or its attention has no projection of the queries.
    """
    family, encoder = find_encoder(model)
    boundary = family.attention if family.exit_residual and not family.exit_after else family.exit
    costs = []
    for layer in get_layers(family, encoder):
        beside = [part for path, part in layer.named_modules() if path in family.positional]
        total, inside = (_linear_macs(part, beside) for part in (layer, layer.get_submodule(boundary)))
        before, after = (inside, total - inside) if family.exit_residual else (total - inside, inside)
        costs.append(LayerCost(before, after, 2 * _attention_width(layer.get_submodule(family.attention))))
    return costs


def dense_layer_costs(model: nn.Module) -> list[LayerCost]:
    """The `LayerCost` of each layer of the model before any weights were cut out of it."""
    return layer_costs(model if shape_map(model) is None else dense_skeleton(model))


@dataclass(frozen=True)
class BlockCost:
    """What the two blocks of one layer cost, in MACs.

    Args:
        attention: of the attention's Linears, per token, `(before, after)` as in `LayerCost`.
        pairs: of attention itself, per query-key pair.
        ffn: of the FFN's Linears, per token that survives the layer.
    """

    attention: tuple[int, int]
    pairs: int
    ffn: int

    def scaled(self, hidden, heads, units):
        """The `LayerCost` that is left with such shares of hidden units, heads and FFN units: floats or scalar tensors."""
        before, after = self.attention
        linear = hidden * heads
        return LayerCost(linear * before, linear * after + hidden * units * self.ffn, heads * self.pairs)


def block_costs(model: nn.Module) -> list[BlockCost]:
    """The `BlockCost` of each layer."""
    family, encoder = find_encoder(model)
    found = []
    for cost, layer in zip(layer_costs(model), get_layers(family, encoder), strict=True):
        ffn = 0
        if has_ffn(family, layer):
            ffn = sum(_linear_macs(layer.get_submodule(path)) for path in (*family.units_in, family.units_out))
        found.append(BlockCost((cost.before, cost.after - ffn), cost.attention, ffn))
    return found


def trace_macs(model: nn.Module, trace: Sequence[LayerTrace] | None = None) -> list[int]:
    """MACs of each layer in a forward of a packed or token-pruned model.

    Args:
        model: a model that `pack` or `attach` has been called on.
        trace: tokens per sequence of each layer; by default those of the model's latest forward.

    Raises:
        UnsupportedModelError: the model is dense.
        UnsupportedInputError: it has not run yet.
    """
    model = transformers_model(model)
    return _trace_macs(model, layer_costs(model), _trace_of(model) if trace is None else trace)


def dense_macs(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """MACs of each layer if the unmodified model, with all its weights, ran on sequences of these lengths without any padding."""
    return [cost.whole(lengths) for cost in dense_layer_costs(transformers_model(model))]


def padded_macs(model: nn.Module, batch_size: int, seq_len: int) -> list[int]:
    """MACs of each layer if the unmodified model, with all its weights, ran on a batch padded to `(batch_size, seq_len)`."""
    return dense_macs(model, [seq_len] * batch_size)


@dataclass(frozen=True)
class Cost:
    """MACs of a token-pruned model over a number of sequences, beside those of the unmodified one.

    Args:
        dense: MACs of the unmodified model on the real tokens alone.
        padded: MACs of the unmodified model with every sequence padded to the maximal length.
        spent: MACs of the model itself.
        sequences: how many sequences these are sums over.
        tokens: the mean number of tokens per sequence that enter the model.
        tokens_per_layer: for each layer, the mean number of tokens per sequence that leave it.
    """

    dense: int
    padded: int
    spent: int
    sequences: int
    tokens: float
    tokens_per_layer: tuple[float, ...]

    @property
    def true_length_reduction(self) -> float:
        """How many times fewer MACs than the unmodified model on the real tokens: what pruning itself saves."""
        return self.dense / self.spent

    @property
    def padded_reduction(self) -> float:
        """How many times fewer MACs than the unmodified model on padded sequences: what papers of this field report."""
        return self.padded / self.spent


class CostMeter:
    """Adds up the cost of a packed or token-pruned model over many batches.

    Args:
        model: the model, or what has it in it; what it was cut from is measured now, its layers and selectors at each update.
        max_length: tokens that the unmodified model would pad every sequence to; None = it does not pad.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hf_tokenprune import pack
        >>> model = pack(BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)))
        >>> meter = CostMeter(model, max_length=10)
        >>> _ = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]))
        >>> meter.update()
        >>> meter.cost.true_length_reduction, meter.cost.tokens_per_layer
        (1.0, (5.0, 5.0))
    """

    def __init__(self, model: nn.Module, max_length: int | None = None):
        self.model = model = transformers_model(model)
        self.max_length = max_length
        self._dense_costs = dense_layer_costs(model)
        self._measured = None, None
        self._dense = self._padded = self._spent = self._sequences = 0
        self._entered, self._tokens = 0, []

    def update(self) -> None:
        """Add the model's latest forward.

        Raises:
            UnsupportedModelError: the model is dense.
            UnsupportedInputError: it has not run yet, or has read a sequence of more than `max_length` tokens.
        """
        trace = _trace_of(self.model)
        lengths = trace[0].arrived
        longest = max(lengths, default=0)
        if self.max_length is not None and longest > self.max_length:
            raise UnsupportedInputError(
                f"A sequence has {longest} tokens, more than max_length={self.max_length}. Pass the length that the "
                "unmodified model would pad to."
            )
        padded = lengths if self.max_length is None else [self.max_length] * len(lengths)
        self._dense += sum(cost.whole(lengths) for cost in self._dense_costs)
        self._padded += sum(cost.whole(padded) for cost in self._dense_costs)
        self._spent += sum(_trace_macs(self.model, self._costs(), trace))
        self._sequences += len(lengths)
        self._entered += sum(lengths)
        if len(self._tokens) != len(trace):  # layers were removed in between: tokens per layer are those of the layers left
            self._tokens, self._counted = [0] * len(trace), 0
        self._counted += len(lengths)
        self._tokens = [tokens + sum(layer.survived) for tokens, layer in zip(self._tokens, trace, strict=True)]

    def _costs(self):
        """The layers' costs now. Whoever cuts the model writes it another `config.token_pruning`."""
        settings = self.model.config.token_pruning
        if self._measured[0] is not settings:
            self._measured = settings, layer_costs(self.model)
        return self._measured[1]

    @property
    def started(self) -> bool:
        """Has anything been added?"""
        return self._sequences > 0

    @property
    def cost(self) -> Cost:
        """The `Cost` so far.

        Raises:
            UnsupportedInputError: nothing has been added yet.
        """
        if not self._sequences:
            raise UnsupportedInputError("No forward has been counted yet. Call update() after each forward of the model.")
        tokens = tuple(total / self._counted for total in self._tokens)
        entered = self._entered / self._sequences
        return Cost(self._dense, self._padded, self._spent, self._sequences, entered, tokens)


def _trace_of(model: Any) -> list[LayerTrace]:
    pruner = getattr(model, "token_pruner", None)
    if pruner is None:
        raise UnsupportedModelError(f"{type(model).__name__} is dense, so it keeps no trace. Call pack(model) first.")
    if not pruner.trace:
        raise UnsupportedInputError("The model has not run yet, so there is nothing to count. Call it on a batch first.")
    return pruner.trace


def _trace_macs(model: Any, costs: Sequence[LayerCost], trace: Sequence[LayerTrace]) -> list[int]:
    return [
        cost.macs(entered=layer.entered, queries=layer.queries, survived=layer.survived)
        + model.token_pruner.macs(number, sum(layer.arrived))
        for number, (cost, layer) in enumerate(zip(costs, trace, strict=True))
    ]


def _linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def _linear_macs(module: nn.Module, beside: Sequence[nn.Module] = ()) -> int:
    return sum(part.in_features * part.out_features for _, part in _linears(module) if not any(part is b for b in beside))


def _attention_width(attention: nn.Module) -> int:
    """Heads x head size, from the projection of the queries (or of queries, keys and values at once)."""
    linears = _linears(attention)
    for name, linear in linears:
        if "qkv" in name:
            return linear.out_features // 3
        if name.startswith("q"):
            return linear.out_features
    if linears:
        raise UnsupportedModelError(
            f"The cost of {type(attention).__name__} is not known: none of {[name for name, _ in linears]} looks like the "
            "projection of its queries."
        )
    if next(attention.children(), None) is not None:
        raise UnsupportedModelError(
            f"The cost of {type(attention).__name__} is not known: it holds no torch.nn.Linear (quantised, perhaps). Count before."
        )
    return 0
