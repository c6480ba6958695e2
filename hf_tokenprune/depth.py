"""How deep each token lived: through how many layers it came before it was dropped."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import UnsupportedModelError
from .modeling.architectures import find_encoder, transformers_model

BATCH = 32


@dataclass(frozen=True)
class TokenDepths:
    """The depth of each token of a batch. Depth `d` = it left layers 0 to `d - 1` and was dropped in layer `d`.

    Args:
        depths: `(B, S)` whole numbers on the CPU, the number of layers for a token that lived to the end, -1 for padding.
        layers: how many layers the model has.
        last_reads_pooled: the last layer reads all tokens that arrive there, but computes the pooled token alone, since that is
            what the head reads. So the others end at depth `layers - 1`.
    """

    depths: torch.Tensor
    layers: int
    last_reads_pooled: bool

    @property
    def tokens_per_layer(self) -> list[float]:
        """For each layer, the mean number of tokens per sequence that leave it."""
        sequences = self.depths.reshape(-1, self.depths.shape[-1])
        return [(sequences > layer).sum().item() / len(sequences) for layer in range(self.layers)]


def token_depths(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> TokenDepths:
    """Run a token-pruned model and say how deep each token lived.

    The model runs in evaluation mode without gradients, and is left as it was.

    Args:
        model: a model that `attach` or `pack` has been called on, or that was loaded as such; or what has it in it.
        inputs: what the model is called with: `input_ids` and `attention_mask`, or `pixel_values` (whose tokens are the family's
            summary tokens and then the patches, row by row).

    Raises:
        UnsupportedModelError: the model is dense.

    Example:
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> from hf_tokenprune import TopK, attach
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
        >>> model = attach(BertForTokenClassification(config).eval(), {1: TopK(2)})
        >>> found = token_depths(model, {"input_ids": torch.tensor([[101, 7, 8, 9, 102]])})
        >>> sorted(found.depths[0].tolist()), found.tokens_per_layer
        ([1, 1, 3, 3, 3], [5.0, 3.0, 3.0])
    """
    model = transformers_model(model)
    pruner = getattr(model, "token_pruner", None)
    if pruner is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is dense, so every token lives to the end. Call pack(model) or attach(model, ...) first."
        )
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with _watching(model, pruner):
        model(**inputs)
        calls = pruner.last_forward.calls
    first = calls[0].batch
    mask = inputs.get("attention_mask")
    shape = (first.batch_size, first.seq_len) if mask is None else mask.shape
    depths = torch.zeros(shape, dtype=torch.long) if mask is None else mask.long().cpu() - 1
    flat = depths.view(-1)
    for call in calls:
        flat[call.survivors.index.cpu()] = call.layer + 1
    return TokenDepths(depths, len(calls), calls[-1].pooled is not None)


@contextlib.contextmanager
def _watching(model, pruner):
    """Within this context the model is in evaluation mode and remembers its latest forward, which no meter counts."""
    training = [module for module in model.modules() if module.training]
    before = {name: getattr(pruner, name) for name in ("remembers", "last_forward", "meter")}
    pruner.remembers, pruner.meter = True, None
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True
        vars(pruner).update(before)


@dataclass(frozen=True)
class Token:
    """One token of a text, as a person reads it.

    Args:
        text: its part of the text as written, or its name if it is no part of it (`[CLS]`).
        depth: as in `TokenDepths`.
        special: it was added by the tokenizer.
        joined: no space stands between it and the token before.
    """

    text: str
    depth: int
    special: bool = False
    joined: bool = False


def text_depths(
    model: nn.Module, texts: Sequence[Any], tokenizer, max_length: int | None = None
) -> Iterator[tuple[TokenDepths, list[list[Token]]]]:
    """Tokenise texts (strings, or pairs of strings) and yield, batch by batch, their depths and their tokens."""
    for start in range(0, len(texts), BATCH):
        rows = texts[start : start + BATCH]
        columns = [list(rows)] if isinstance(rows[0], str) else [list(column) for column in zip(*rows, strict=True)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        found = token_depths(model, encoded)
        yield found, [_tokens(tokenizer, encoded, row, columns, depths) for row, depths in enumerate(found.depths.tolist())]


@dataclass(frozen=True)
class Grid:
    """The depths of the patches of one image.

    Args:
        rows: depths as in `TokenDepths`, a list per row of patches.
        layers: how many layers the model has.
    """

    rows: list[list[int]]
    layers: int


def image_depths(model: nn.Module, images: Sequence[Any], processor) -> Iterator[tuple[TokenDepths, list[Grid]]]:
    """Process images and yield, batch by batch, their depths as a batch and as grids."""
    family, encoder = find_encoder(model)
    for start in range(0, len(images), BATCH):
        inputs = processor(list(images[start : start + BATCH]), return_tensors="pt")
        found = token_depths(model, inputs)
        patch = encoder.config.patch_size
        across = inputs["pixel_values"].shape[-1] // (patch if isinstance(patch, int) else patch[1])
        before = family.summary_tokens + getattr(encoder.config, "num_register_tokens", 0)
        patches = found.depths[:, before:]
        yield found, [Grid(rows.view(-1, across).tolist(), found.layers) for rows in patches]


def _tokens(tokenizer, encoded, row, columns, depths):
    """The tokens of one text, padding left out."""
    if not encoded.is_fast:  # nobody knows which part of the text a token stands for
        ids = encoded["input_ids"][row].tolist()
        special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        names = tokenizer.convert_ids_to_tokens(ids)
        return [Token(n, d, bool(s)) for n, d, s in zip(names, depths, special, strict=True) if d >= 0]
    encoding, tokens, before = encoded[row], [], None
    for name, place, part, depth in zip(encoding.tokens, encoding.offsets, encoding.sequence_ids, depths, strict=True):
        if depth < 0:
            continue
        if part is None:
            tokens.append(Token(name, depth, special=True))
        elif (part, place) == before:  # one of several tokens for one character
            tokens.append(Token("\N{MIDDLE DOT}", depth, joined=True))
        else:
            piece = columns[part][row][slice(*place)]
            joined = before is not None and before[0] == part and before[1][1] == place[0] and not piece[:1].isspace()
            tokens.append(Token(piece.strip() or name, depth, joined=joined))
        before = (part, place)
    return tokens


def legend(layers: int, last_reads_pooled: bool) -> str:
    """What the number beside a token means, as a sentence for people."""
    text = f"The number is the layer in which a token was dropped; {layers} = it lived to the end of all {layers} layers."
    if last_reads_pooled:
        text += (
            f" The last layer, {layers - 1}, still reads the tokens that reach it ({layers - 1}), but computes only what the head "
            "reads: the first token, or the last of a causal model."
        )
    return text
