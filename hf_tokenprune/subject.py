"""What is measured, looked at and drawn: a saved model, its twins, the texts that it reads, and a clock."""

import copy
import glob
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import is_flash_attn_2_available

from .errors import ConfigError, TokenPruneError, UnsupportedModelError
from .loading import from_pretrained
from .modeling.architectures import find_encoder
from .modeling.configs import dense_config
from .modeling.modeling_token_pruned import detach, is_token_pruned, pack
from .modeling.shapes import shape_map

FILE_TYPES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
DEFAULT_LENGTH = 128


# Texts.


def read_texts(path: str | os.PathLike, columns: Sequence[str] = (), *, limit: int | None = None) -> list:
    """Texts from a parquet, CSV or JSON-lines file, a missing value as ""; or the lines of a .txt file that are not empty.

    Args:
        path: the file; its ending says what it is.
        columns: one column with texts, or two that make a pair; none of a .txt file.
        limit: take only the first so many rows.

    Returns:
        A list of strings, or of pairs of strings.

    Raises:
        ConfigError: the file, its type or a column is not there, or does not hold text.
    """
    import datasets

    path = Path(path)
    if path.suffix not in (".txt", *FILE_TYPES):
        raise ConfigError(f"{path} is of an unknown type. Known endings: .txt, {', '.join(FILE_TYPES)}.")
    if not path.is_file():
        raise ConfigError(f"There is no file {path}.")
    if path.suffix == ".txt":
        return _read_lines(path, columns, limit)
    if len(columns) > 2:
        raise ConfigError(f"{len(columns)} columns were named; name one, or two for pairs.")
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.load_dataset(
                FILE_TYPES[path.suffix],
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as {FILE_TYPES[path.suffix]}: {error.__cause__ or error}") from error
        if not columns:
            raise ConfigError(
                f"Name the column of {path} that holds the texts, or two for pairs: {', '.join(rows.column_names)}."
            )
        for column in columns:
            if column not in rows.column_names:
                raise ConfigError(f"{path} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
            if getattr(rows.features[column], "dtype", None) not in ("string", "large_string"):
                raise ConfigError(f"Column {column!r} of {path} holds {rows.features[column]}, not text.")
        rows = rows.select(range(len(rows) if limit is None else min(limit, len(rows))))
        texts = [[text or "" for text in rows[column]] for column in columns]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def _read_lines(path, columns, limit):
    if columns:
        raise ConfigError(f"{path} has no columns, but {', '.join(columns)} was named. A text file holds a text a line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()][:limit]


def tokenise(tokenizer, texts, pairs, max_length):
    """A list of features, one dictionary per text or pair, without padding."""
    columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [list(texts)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]


# Checks.


def check_numbers(**named):
    """Raise `ConfigError` unless each of the named lists holds whole numbers from 1."""
    for name, values in named.items():
        if not values or any(not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in values):
            given = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(f"{name} must be whole numbers from 1, not {given}.")


def are_pairs(texts):
    """Are these pairs of strings, rather than strings? Raises `ConfigError` for anything else."""
    if isinstance(texts, str) or not len(texts):
        raise ConfigError("There are no texts to measure on: pass a list of strings, or of pairs of strings.")
    if all(isinstance(text, str) for text in texts):
        return False
    if all(isinstance(text, (tuple, list)) and [type(part) for part in text] == [str, str] for text in texts):
        return True
    kinds = ", ".join(sorted({type(text).__name__ for text in texts}))
    raise ConfigError(f"texts must be strings or pairs of strings, all of one kind; these are of type {kinds}.")


def check_reads_text(model):
    """Raise `UnsupportedModelError` unless the model reads one sequence of text at a time."""
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} reads {model.main_input_name}, and only models that read text can be measured so far."
        )
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise UnsupportedModelError(f"{type(model).__name__} reads several sequences at a time, which cannot be measured.")


def check_length(max_length, model, tokenizer, pairs):
    """The length that texts are cut to: the given one, if the model can read that, or the default."""
    _, encoder = find_encoder(model)
    longest = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None) or float("inf"))
    if max_length is None:
        return min(DEFAULT_LENGTH, longest)
    shortest = tokenizer.num_special_tokens_to_add(pair=pairs) + 1
    if not shortest <= max_length <= longest:
        raise ConfigError(f"max_length={max_length}, but this model reads {shortest} to {longest} tokens.")
    return max_length


# The model and its twins.


def open_model(folder):
    """The model in a folder. Raises `TokenPruneError`, whatever is wrong with the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}.")
    try:
        return from_pretrained(folder)
    except TokenPruneError:
        raise
    except Exception as error:  # whatever is wrong with the folder: transformers, safetensors and json each raise their own
        raise ConfigError(f"{folder} cannot be opened as a model: {error}") from error


def open_tokenizer(folder):
    """The tokenizer in a folder. Raises `ConfigError` if it has none of its own."""
    advice = f"{folder} has no tokenizer. Save the model's own beside it: tokenizer.save_pretrained({str(folder)!r})."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise ConfigError(f"{advice} ({error})") from error
    # From a folder without its files transformers makes a tokenizer that knows no words.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(folder) / name).exists() for name in names):
        raise ConfigError(advice)
    return check_pads(tokenizer)


def check_pads(tokenizer):
    """Raise `ConfigError` unless texts can be put into batches with this tokenizer, and return it."""
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"This {type(tokenizer).__name__} has no padding token, so that texts of unlike lengths cannot come together. Give it "
            "the one that the model was trained with (tokenizer.pad_token = tokenizer.eos_token, often) and save it beside the model."
        )
    return tokenizer


def copy_of(model, *, share_weights=False):
    """A copy of a model, on the same weights if so wished."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if share_weights else {}
    return copy.deepcopy(model, memo)


def runs_flash_attention(model):
    """Is flash-attn installed, and does this model run with it where it is?"""
    ready = model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16)
    return ready and model._supports_flash_attn and is_flash_attn_2_available()


def contenders(model):
    """What a model is compared with, and the model, by name; see `bench`. All on the same weights, if none were cut."""
    was_cut = shape_map(model) is not None
    if was_cut:
        dense_class = getattr(type(model), "_dense_class", type(model))
        config = dense_config(model)
        config.token_pruning = None
        dense = dense_class._from_config(config, attn_implementation="sdpa", dtype=model.dtype).to(model.device).eval()
    else:
        dense = detach(copy_of(model, share_weights=True))
    if dense.config._attn_implementation != "sdpa" and dense._supports_sdpa:  # MPNet and DeBERTa know one way only
        dense.set_attn_implementation("sdpa")
    models = {"hf_padded": dense, "hf_sorted": dense}
    if runs_flash_attention(dense):
        models["hf_flash"] = copy_of(dense, share_weights=True)
        models["hf_flash"].set_attn_implementation("flash_attention_2")
    models["packed_dense"] = pack(copy_of(dense, share_weights=True))
    if was_cut or (is_token_pruned(model) and len(model.token_pruner.sites)):
        models["pruned"] = model
    return models


# The machine.


def now(model: nn.Module) -> float:
    """Seconds on a clock, once everything that the model's device was asked for is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def cpu_name() -> str:
    """What this machine's CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    """Of Python and of what the numbers depend on."""
    import hf_tokenprune

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_tokenprune": hf_tokenprune.__version__,
    }
