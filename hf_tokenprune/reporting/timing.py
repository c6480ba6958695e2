"""Milliseconds of each layer, by hooks around it."""

import contextlib
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..modeling.architectures import find_encoder, get_layers
from ..subject import now


def layer_times(
    models: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], repeats: int
) -> dict[str, tuple[list[float], float]]:
    """Run models on one batch, one after another, and time their layers.

    After a pass without clock, every repeat runs all models, in an order that rotates.

    Args:
        models: models in evaluation mode, by name.
        inputs: what each of them is called with.
        repeats: how often.

    Returns:
        By name, `(layers, rest)`: milliseconds of each layer, and of all that is not in a layer (embeddings, head); medians of
        the repeats. Packing counts to the first layer, unpacking to the last one.
    """
    names = list(models)
    runs = {name: [] for name in names}
    with torch.inference_mode():
        for repeat in range(-1, repeats):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                run = _run(models[name], inputs)
                if repeat >= 0:
                    runs[name].append(run)
    return {
        name: (_medians([run[0] for run in found]), _medians([[run[1]] for run in found])[0]) for name, found in runs.items()
    }


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def _run(model, inputs):
    """`(milliseconds per layer, milliseconds of the rest)` of one forward."""
    starts, ends = [], []
    with _clocks(model, starts, ends):
        start = now(model)
        model(**inputs)
        end = now(model)
    layers = [1000 * (b - a) for a, b in zip(starts, ends, strict=True)]
    return layers, 1000 * (end - start) - sum(layers)


@contextlib.contextmanager
def _clocks(model, starts, ends):
    """Within this context each call of a layer adds when it began and when it ended."""
    handles = []
    for layer in dict.fromkeys(get_layers(*find_encoder(model))):
        handles.append(layer.register_forward_pre_hook(lambda *_: starts.append(now(model)), prepend=True))
        handles.append(layer.register_forward_hook(lambda *_: ends.append(now(model))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
