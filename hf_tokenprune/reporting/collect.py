"""What a report says: everything is measured here, and drawn elsewhere."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cost import Cost, CostMeter, dense_layer_costs, trace_macs
from ..depth import Grid, Token, legend
from ..modeling.architectures import transformers_model
from ..modeling.modeling_token_pruned import pack
from ..modeling.shapes import shape_map
from ..modeling.sizes import sizes_of
from ..subject import check_numbers, contenders, copy_of, cpu_name, open_model, versions
from ..writing import write_output
from .history import find_log, read_runs
from .page import render
from .plots import check_matplotlib, save_plots
from .samples import Images, Texts
from .timing import layer_times


@dataclass(frozen=True)
class Contender:
    """What the layers of one model cost, per sample.

    Args:
        macs: MACs of each layer.
        ms: milliseconds of each layer.
        rest_ms: milliseconds outside of the layers.
        heads, units: attention heads and FFN units of each layer; None of a family of which nothing can be cut.
        hidden: hidden units, or None.
        parameters: how many there are.
    """

    macs: list[float]
    ms: list[float]
    rest_ms: float
    heads: list[int] | None
    units: list[int] | None
    hidden: int | None
    parameters: int

    @property
    def total_ms(self) -> float:
        """Milliseconds of everything."""
        return sum(self.ms) + self.rest_ms


@dataclass(frozen=True)
class Report:
    """What `report` found. A notebook shows it; `save` writes it as one HTML file that needs nothing else.

    Attributes:
        name: the folder, or the model's class.
        model_class: the class of the model.
        samples: for each text a list of `Token`, or for each image a `Grid`.
        legend: what the numbers at the tokens mean.
        pruned: does the model drop tokens?
        model: the `Contender` that the model is.
        dense: the packed dense model, before anything was cut out of it.
        origins: for each layer of the model, which layer of the dense one it was; None if that is not known any more.
        cost: the `Cost` over all samples.
        max_length: the length that padded MACs are counted at, or None for images.
        machine: where and how the milliseconds were measured.
        log: entries of the Trainer's log that tell how training met the budget.
        runs: of the benchmark.
    """

    name: str
    model_class: str
    samples: list[list[Token]] | list[Grid]
    legend: str
    pruned: bool
    model: Contender
    dense: Contender
    origins: list[int] | None
    cost: Cost
    max_length: int | None
    machine: dict[str, Any]
    log: list[dict]
    runs: list[dict]

    @property
    def was_cut(self) -> bool:
        """Have weights been cut out of the model?"""
        return self.model.parameters < self.dense.parameters

    def html(self) -> str:
        """The page."""
        return render(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the page to a file, all or nothing (or to a pipe or device)."""
        write_output(path, self.html())

    def save_plots(self, folder: str | os.PathLike) -> list[Path]:
        """Write each plot as PNG and as SVG to a folder, which is made if need be, and return the files."""
        return save_plots(self, Path(folder))

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its style and the notebook's stay apart."""
        return f'<iframe srcdoc="{html.escape(self.html())}" sandbox style="width:100%;height:42em;border:0"></iframe>'


def report(
    folder_or_model: str | os.PathLike | nn.Module,
    samples: Sequence[Any],
    *,
    tokenizer=None,
    processor=None,
    max_length: int | None = None,
    repeats: int = 3,
    log_history: Sequence[dict] | None = None,
    runs: Sequence[str | os.PathLike] = (),
) -> Report:
    """Look at a model: how deep each token of some texts (or each patch of some images) lives, and what each layer costs.

    The model is left as it is. A dense one is looked at as `pack` would make it, and every token lives to the end.

    Args:
        folder_or_model: a folder with a model and its tokenizer or image processor, or a model in memory.
        samples: strings, pairs of strings, or PIL images for a model that reads pixels.
        tokenizer: the tokenizer of a model in memory that reads text.
        processor: the image processor of a model in memory that reads pixels.
        max_length: longer texts are cut to so many tokens, and padded MACs are counted at it. By default 128, or what the model
            can read if that is less.
        repeats: how often the layers are timed, on the first 32 samples as one batch.
        log_history: `trainer.state.log_history`; by default that of a `trainer_state.json` in the folder or its last checkpoint.
        runs: JSON files that `examples/benchmark/run.py` wrote, for a plot of score against MACs.

    Raises:
        ConfigError: an argument makes no sense, or the folder lacks the model or the tokenizer.
        UnsupportedModelError: the model cannot be packed, or does not read one sequence at a time.

    Example:
        >>> report("pruned", ["The house was sold yesterday."]).save("report.html")  # doctest: +SKIP
    """
    check_matplotlib()
    check_numbers(repeats=[repeats])
    folder = None if isinstance(folder_or_model, nn.Module) else Path(folder_or_model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    known = read_runs(runs)
    model = copy_of(transformers_model(folder_or_model), share_weights=True) if folder is None else open_model(folder)
    log = find_log(folder, log_history, known)
    model = pack(model.eval())
    if model.main_input_name == "pixel_values":
        source = Images(model, samples, folder if processor is None else processor)
    else:
        source = Texts(model, samples, folder if tokenizer is None else tokenizer, max_length)

    meter, seen = CostMeter(model, source.max_length), []
    spent, dense_spent = _Sums(), _Sums()
    dense_costs = dense_layer_costs(model)
    for depths, some in source.depths():
        last_reads_pooled = depths.last_reads_pooled
        meter.update()
        seen += some
        spent.add(trace_macs(model))
        dense_spent.add(_packed_macs(dense_costs, model.token_pruner))

    models = {name: made for name, made in contenders(model).items() if name in ("packed_dense", "pruned")}
    ours, dense = list(models)[-1], "packed_dense"
    times = layer_times(models, source.batch(), repeats)
    timed = len(source.timed)
    layers = len(model.token_pruner.trace)
    return Report(
        name=type(model).__name__ if folder is None else folder.resolve().name,
        model_class=type(model).__name__,
        samples=seen,
        legend=legend(layers, last_reads_pooled),
        pruned=bool(len(model.token_pruner.sites)),
        model=_contender(models[ours], spent.mean(len(seen)), times[ours], timed),
        dense=_contender(models[dense], dense_spent.mean(len(seen)), times[dense], timed),
        origins=_origins(shape_map(model), layers),
        cost=meter.cost,
        max_length=source.max_length,
        machine={
            "processor": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(),
            "load_average": load,
            "dtype": str(model.dtype).removeprefix("torch."),
            "timed": timed,
            "repeats": repeats,
            "versions": versions(),
        },
        log=log,
        runs=[run for _, run in known],
    )


class _Sums:
    """Adds up lists of equal length."""

    def __init__(self):
        self.values = None

    def add(self, values):
        self.values = values if self.values is None else [a + b for a, b in zip(self.values, values, strict=True)]

    def mean(self, count):
        return [value / count for value in self.values]


def _packed_macs(shapes, pruner):
    """MACs of each layer if nothing had been dropped or cut in the latest forward."""
    lengths = pruner.trace[0].arrived
    macs = [shape.whole(lengths) for shape in shapes]
    if pruner.pooled_head:
        ones = [1] * len(lengths)
        queries = ones if pruner.pooled_asks_alone else lengths
        macs[-1] = shapes[-1].macs(entered=lengths, queries=queries, survived=ones)
    return macs


def _contender(model, macs, times, samples):
    hidden, heads, units = (None,) * 3 if model.token_pruner.family.uncut else sizes_of(model)
    layers, rest = times
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("token_pruner."))
    return Contender(macs, [ms / samples for ms in layers], rest / samples, heads, units, hidden, count)


def _origins(shapes, layers):
    """Which layer each one was; a map of a model whose plain config says how many layers are left does not say which."""
    if shapes is None:
        return list(range(layers))
    if "num_hidden_layers" in shapes["dense"]:
        return None
    return [entry["layer"] for entry in shapes["layers"]]
