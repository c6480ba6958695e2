"""How fast a token-pruned model is on this machine, against what it should be compared with.

Four contenders, made from one set of weights, take turns on the same texts in one run:

* `hf_padded`: the unmodified transformers model with its SDPA attention, batches in the order given, padded to their longest;
* `hf_sorted`: the same, the texts sorted by length before they are put into batches;
* `packed_dense`: packed, without sites: no work on padding, nothing dropped;
* `pruned`: the model as it is.

Of a model whose weights were cut the first three are as large as what it was cut from, with random weights: these do not
change the time.
"""

import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, DataCollatorWithPadding

from .cost import CostMeter, padded_macs
from .errors import ConfigError, TokenPruneError, UnsupportedModelError
from .loading import from_pretrained
from .modeling.architectures import find_encoder
from .modeling.modeling_token_pruned import detach, is_token_pruned, pack
from .modeling.shapes import dense_config, shape_map

CONTENDERS = ("hf_padded", "hf_sorted", "packed_dense", "pruned")
DTYPES = ("float32", "bfloat16", "float16")
FILE_TYPES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
DEFAULT_LENGTH = 128


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
        batch_sizes: texts per batch; each is measured on all texts. A last batch may be smaller.
        max_length: longer texts are cut to so many tokens, and it is the length that padded MACs are counted at. By default
            128, or what the model can read if that is less.
        threads: CPU threads; by default as many as torch uses.
        repeats: how often everything is measured.
        dtype: "float32", "bfloat16" or "float16"; by default the dtype of the weights.
        device: where to run, such as "cpu" or "cuda"; by default where the model is ("cpu" for a folder).

    Returns:
        A dictionary of plain JSON values: the circumstances (`model`, `cpu`, `gpu`, `threads`, `dtype`, `versions`,
        `load_average`: cores kept busy by all programs in the minute before) and `results`, an entry per batch size:

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
    _check_numbers(batch_sizes=batch_sizes, repeats=[repeats], threads=[1 if threads is None else threads])
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype={dtype!r}; known: {', '.join(DTYPES)}.")
    if device is not None:
        _check_device(device)
    pairs = _are_pairs(texts)
    if isinstance(folder_or_model, nn.Module):
        model, name = _copy(folder_or_model), type(folder_or_model).__name__
    else:
        model, name = _open(folder_or_model), str(folder_or_model)
    _check_reads_text(model)
    if tokenizer is None:
        if isinstance(folder_or_model, nn.Module):
            raise ConfigError("A model in memory needs its tokenizer: bench(model, texts, tokenizer=tokenizer).")
        tokenizer = _open_tokenizer(folder_or_model)
    model = model.to(device=device, dtype=getattr(torch, dtype) if dtype else None).eval()
    max_length = _check_length(max_length, model, tokenizer, pairs)
    models = _contenders(model)
    features = _tokenise(tokenizer, texts, pairs, max_length)

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
        "versions": _versions(),
        "results": results,
    }


def read_texts(path: str | os.PathLike, columns: Sequence[str], *, limit: int | None = None) -> list:
    """Texts from a parquet, CSV or JSON-lines file, a missing value as "".

    Args:
        path: the file; its ending says what it is.
        columns: one column with texts, or two that make a pair.
        limit: take only the first so many rows.

    Returns:
        A list of strings, or of pairs of strings.

    Raises:
        ConfigError: the file, its type or a column is not there, or does not hold text.
    """
    import datasets

    path = Path(path)
    if path.suffix not in FILE_TYPES:
        raise ConfigError(f"{path} is of an unknown type. Known endings: {', '.join(FILE_TYPES)}.")
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if not 1 <= len(columns) <= 2:
        raise ConfigError(f"{len(columns)} columns were named; name one, or two for pairs.")
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                FILE_TYPES[path.suffix], data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
            )
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as {FILE_TYPES[path.suffix]}: {error.__cause__ or error}") from error
        for column in columns:
            if column not in rows.column_names:
                raise ConfigError(f"{path} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
            if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
                raise ConfigError(f"Column {column!r} of {path} holds {rows.features[column]}, not text.")
        rows = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
        texts = [[text or "" for text in rows[column]] for column in columns]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def cpu_name() -> str:
    """What this machine's CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Checks.


def _check_numbers(**named):
    for name, values in named.items():
        if not values or any(not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in values):
            given = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(f"{name} must be whole numbers from 1, not {given}.")


def _check_device(device):
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {device!r} cannot be used: {error}") from error


def _are_pairs(texts):
    if isinstance(texts, str) or not len(texts):
        raise ConfigError("There are no texts to measure on: pass a list of strings, or of pairs of strings.")
    if all(isinstance(text, str) for text in texts):
        return False
    if all(isinstance(text, (tuple, list)) and [type(part) for part in text] == [str, str] for text in texts):
        return True
    raise ConfigError("texts must be strings or pairs of strings, all of one kind.")


def _check_reads_text(model):
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {model.main_input_name}, and only models that read text can be measured so far."
        )
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise UnsupportedModelError(f"{type(model).__name__} reads several sequences at a time, which cannot be measured.")


def _check_length(max_length, model, tokenizer, pairs):
    _, encoder = find_encoder(model)
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None) or float("inf"))
    if max_length is None:
        return min(DEFAULT_LENGTH, longest)
    shortest = tokenizer.num_special_tokens_to_add(pair=pairs) + 1
    if not shortest <= max_length <= longest:
        raise ConfigError(f"max_length={max_length}, but this model reads {shortest} to {longest} tokens.")
    return max_length


# The model and its twins.


def _open(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    try:
        return from_pretrained(folder)
    except TokenPruneError:
        raise
    except Exception as error:  # whatever is wrong with the folder: transformers, safetensors and json each raise their own
        raise ConfigError(f"{folder} cannot be opened as a model: {error}") from error


def _open_tokenizer(folder):
    advice = f"{folder} has no tokenizer. Save the model's own beside it: tokenizer.save_pretrained({str(folder)!r})."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise ConfigError(f"{advice} ({error})") from error
    # From a folder without its files transformers makes a tokenizer that knows no words.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(folder) / name).exists() for name in names):
        raise ConfigError(advice)
    return tokenizer


def _copy(model, *, share_weights=False):
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share_weights else {}
    return copy.deepcopy(model, memo)


def _contenders(model):
    """The models by name, all on the same weights."""
    was_cut = shape_map(model) is not None
    if was_cut:
        dense_class = getattr(type(model), "_dense_class", type(model))
        config = dense_config(model)
        config.token_pruning = None
        dense = dense_class._from_config(config, attn_implementation="sdpa", dtype=model.dtype).to(model.device).eval()
    else:
        dense = detach(_copy(model, share_weights=True))
    if dense.config._attn_implementation != "sdpa" and dense._supports_sdpa:  # MPNet and DeBERTa know one way only
        dense.set_attn_implementation("sdpa")
    models = {"hf_padded": dense, "hf_sorted": dense, "packed_dense": pack(_copy(dense, share_weights=True))}
    if was_cut or (is_token_pruned(model) and len(model.token_pruner.sites)):
        models["pruned"] = model
    return models


# Batches and the clock.


def _tokenise(tokenizer, texts, pairs, max_length):
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


def _batches(features, size, tokenizer, device):
    """By contender, a list of batches of tensors, padded to their longest."""
    collate = DataCollatorWithPadding(tokenizer)

    def batches(rows):
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [{name: tensor.to(device) for name, tensor in collate(group).items()} for group in groups]

    given = batches(features)
    by_length = batches(sorted(features, key=lambda feature: len(feature["input_ids"])))
    return {name: by_length if name == "hf_sorted" else given for name in CONTENDERS}


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
    for name in CONTENDERS:
        if name in meters:
            macs[name] = meters[name].cost.spent
        else:
            shapes = [batch["input_ids"].shape for batch in plan[name]]
            macs[name] = sum(sum(padded_macs(models[name], *shape)) for shape in shapes) if name in models else None
    ms = {name: [1000 * value / texts for value in seconds[name]] for name in names}
    return {
        "ms": {name: statistics.median(ms[name]) if name in ms else None for name in CONTENDERS},
        "ms_each_repeat": {name: ms.get(name) for name in CONTENDERS},
        "macs": {name: value if value is None else value / texts for name, value in macs.items()},
        "reduction": {"true_length": cost.true_length_reduction, "padded": cost.padded_reduction},
        "tokens_per_layer": list(cost.tokens_per_layer),
    }


def _seconds(model, batch):
    on_cpu = model.device.type == "cpu"
    if not on_cpu:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    model(**batch)
    if not on_cpu:
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _versions():
    import hf_tokenprune

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_tokenprune": hf_tokenprune.__version__,
    }
