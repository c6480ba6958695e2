"""How fast a token-pruned model is on this machine, against what it should be compared with.

Four or five contenders, made from one set of weights, take turns on the same texts in one run:

* `hf_padded`: the unmodified transformers model with its SDPA attention, batches in the order given, padded to their longest;
* `hf_sorted`: the same, the texts sorted by length before they are put into batches;
* `hf_flash`: as `hf_padded` with transformers' FlashAttention 2, on a GPU in half precision where flash-attn is installed;
* `packed_dense`: packed, without sites: no work on padding, nothing dropped;
* `pruned`: the model as it is.

Of a model whose weights were cut all but the last are as large as what it was cut from, with random weights: these do not
change the time.
"""

import os
import statistics
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from .cost import CostMeter, padded_macs
from .errors import ConfigError
from .modeling.architectures import transformers_model
from .subject import (
    are_pairs,
    check_length,
    check_numbers,
    check_pads,
    check_reads_text,
    contenders,
    copy_of,
    cpu_name,
    now,
    open_model,
    open_tokenizer,
    tokenise,
    versions,
)
from .weights import number_of_model

CONTENDERS = ("hf_padded", "hf_sorted", "packed_dense", "pruned")  # wherever it runs
DTYPES = ("float32", "bfloat16", "float16")


def bench(
    folder_or_model: str | os.PathLike | nn.Module,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    tokenizer=None,
    batch_sizes: Sequence[int] = (1, 32),
    max_length: int | None = None,
    threads: int | None = None,
    repeats: int = 5,
    dtype: str | None = None,
    device: str | None = None,
) -> dict:
    """Measure a model on texts, interleaved with its unmodified and its packed dense self.

    Texts are tokenised and put into batches before the clock runs. After a pass without clock, every repeat goes through all
    batches; on each one the contenders run one after another, in an order that rotates.

    Args:
        folder_or_model: a folder with a model and its tokenizer, or a text encoder in memory, which is left as it is.
        texts: strings, or pairs of strings for a model that reads pairs.
        tokenizer: the tokenizer of a model in memory.
        batch_sizes: texts per batch, at most as many as there are; each is measured on all texts. A last batch may be smaller.
        max_length: longer texts are cut to so many tokens, and it is the length that padded MACs are counted at. By default
            128, or what the model can read if that is less.
        threads: CPU threads; by default as many as torch uses.
        repeats: how often everything is measured.
        dtype: "float32", "bfloat16" or "float16"; by default the dtype of the weights.
        device: where to run, such as "cpu" or "cuda"; by default where the model is ("cpu" for a folder).

    Returns:
        A dictionary of plain JSON values: the circumstances (`model`, a number for the `weights` in its folder, the settings of the
        `method` that pruned it, `cpu`, `gpu`, `threads`, `dtype`, `versions`, `load_average`: cores kept busy by all programs in the
        minute before) and `results`, an entry per batch size:

        * `ms`: milliseconds per text of each contender, median of the repeats; `ms_each_repeat` lists them all;
        * `macs` per text: `dense` (real tokens only), `dense_padded` (padded to `max_length`), and what each contender spends;
        * `reduction`: `true_length` = `dense`, and `padded` = `dense_padded`, divided by the MACs of the model as it is;
        * `tokens_per_layer`: mean tokens per text that leave each layer.

        A model that drops no tokens and was never cut is not measured as `pruned`: that is None, and the reductions are those of
        `packed_dense`.

    Raises:
        ConfigError: an argument makes no sense, or the folder lacks the model or the tokenizer.
        UnsupportedModelError: the model cannot be packed, or does not read one sequence of text at a time.
    """
    check_numbers(batch_sizes=batch_sizes, repeats=[repeats], threads=[1 if threads is None else threads])
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r}; known: {', '.join(DTYPES)}.")
    if device is not None:
        _check_device(device)
    pairs = are_pairs(texts)
    if isinstance(folder_or_model, nn.Module):
        model, name, weights = copy_of(transformers_model(folder_or_model)), type(folder_or_model).__name__, None
    else:
        model, name = open_model(folder_or_model), str(folder_or_model)
        weights = number_of_model(folder_or_model)
    check_reads_text(model)
    if tokenizer is None:
        if isinstance(folder_or_model, nn.Module):
            raise ConfigError("A model in memory needs its tokenizer: bench(model, texts, tokenizer=tokenizer).")
        tokenizer = open_tokenizer(folder_or_model)
    check_pads(tokenizer)
    model = model.to(device=device, dtype=getattr(torch, dtype) if dtype else None).eval()
    max_length = check_length(max_length, model, tokenizer, pairs)
    models = contenders(model)
    features = tokenise(tokenizer, texts, pairs, max_length)
    batch_sizes = list(dict.fromkeys(min(size, len(texts)) for size in batch_sizes))

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        plans = [_batches(features, size, tokenizer, model.device) for size in batch_sizes]
        bar = tqdm(total=(repeats + 1) * sum(len(plan["hf_padded"]) for plan in plans), unit="batch", disable=None)
        with bar, torch.inference_mode():
            results = [
                {"batch_size": size, **_measure(models, plan, max_length, repeats, len(texts), bar)}
                for size, plan in zip(batch_sizes, plans, strict=True)
            ]
    finally:
        torch.set_num_threads(threads_before)
    return {
        "model": name,
        "class": type(model).__name__,
        "weights": weights,
        "method": (getattr(model.config, "token_pruning", None) or {}).get("method"),
        "layers": len(results[0]["tokens_per_layer"]),
        "parameters": sum(p.numel() for p in models["hf_padded"].parameters()),
        "parameters_left": sum(
            p.numel() for name, p in model.named_parameters() if not name.startswith("token_pruner.training_")
        ),
        "texts": len(texts),
        "tokens_per_text": statistics.fmean(len(feature["input_ids"]) for feature in features),
        "max_length": max_length,
        "repeats": repeats,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "threads": threads or threads_before,
        "load_average": load,
        "versions": versions(),
        "results": results,
    }


def _check_device(device):
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device!r} cannot be used: {error}") from error


# Batches and the clock.


def _batches(features, size, tokenizer, device):
    """By contender, a list of batches of tensors, padded to their longest."""
    collate = DataCollatorWithPadding(tokenizer)

    def batches(rows):
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [{name: tensor.to(device) for name, tensor in collate(group).items()} for group in groups]

    given = batches(features)
    by_length = batches(sorted(features, key=lambda feature: len(feature["input_ids"])))
    return {name: by_length if name == "hf_sorted" else given for name in (*CONTENDERS, "hf_flash")}


def _measure(models, plan, max_length, repeats, texts, bar):
    """Time and MACs of one batch size."""
    meters = {name: CostMeter(model, max_length) for name, model in models.items() if not name.startswith("hf_")}
    for number in range(len(plan["hf_padded"])):  # the pass without clock
        for name, model in models.items():
            model(**plan[name][number])
            if name in meters:
                meters[name].update()
        bar.update()

    seconds = {name: [0.0] * repeats for name in models}
    names = list(models)
    for repeat in range(repeats):
        for number in range(len(plan["hf_padded"])):
            turn = (repeat + number) % len(names)
            for name in names[turn:] + names[:turn]:
                seconds[name][repeat] += _seconds(models[name], plan[name][number])
            bar.update()

    cost = meters["pruned" if "pruned" in meters else "packed_dense"].cost
    macs = {"dense": cost.dense, "dense_padded": cost.padded}
    listed = list(dict.fromkeys([*names, *CONTENDERS]))
    for name in listed:
        if name in meters:
            macs[name] = meters[name].cost.spent
        else:
            shapes = [batch["input_ids"].shape for batch in plan[name]]
            macs[name] = sum(sum(padded_macs(models[name], *shape)) for shape in shapes) if name in models else None
    ms = {name: [1000 * value / texts for value in seconds[name]] for name in names}
    return {
        "ms": {name: statistics.median(ms[name]) if name in ms else None for name in listed},
        "ms_each_repeat": {name: ms.get(name) for name in listed},
        "macs": {name: value if value is None else value / texts for name, value in macs.items()},
        "reduction": {"true_length": cost.true_length_reduction, "padded": cost.padded_reduction},
        "tokens_per_layer": list(cost.tokens_per_layer),
    }


def _seconds(model, batch):
    start = now(model)
    model(**batch)
    return now(model) - start
