"""What was measured of a model, from wherever it was measured, in one form: an evaluation, a dictionary of plain values.

All entries are optional: `task`, `split`, `metric`, `score` and `dense_score`; `reduction` with `true_length` and `padded` (see
`cost.py`); `max_length`, the length that padded MACs are counted at; `tokens` per sample, and `kept`, for each layer the share of
them that leaves it; `weights`, a number for the model as it was measured; `latency` with `machine`, `texts`, `threads`, `dtype`,
`load_average` and `ms`: milliseconds per sample of each contender of `bench`, by batch size.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ConfigError

NO_SCORES = {"loss", "runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time"}
BUSY = 1.5  # cores in use in the minute before a measurement
COUNTS = ("reduction", "max_length", "tokens", "kept")
OURS = ("macs_realised", "tokens_after_")


def read_results(files: Sequence, settings: Mapping | None = None, weights: int | None = None) -> dict:
    """One evaluation from JSON files of `examples/benchmark/run.py` and of `hf-tokenprune bench --json`.

    Args:
        files: the benchmark run of the pruned model, the one of the dense model on the same task, a bench result; any of them.
        settings: of the method that pruned the model; a result of a model with other settings is refused.
        weights: a number for the model, see `weights.number_of_model`; a bench result of another number is refused.

    Raises:
        ConfigError: a file cannot be read, is of neither format, or is about another model.
    """
    dense, pruned, timed = {}, {}, {}
    for file in files:
        result = _read(file)
        try:
            if "score" in result:
                is_dense = result["method"] == "dense"
                found = _of_run(result)
                if not is_dense:
                    _check_settings(file, result["settings"], settings)
            else:
                is_dense, found = False, _of_bench(result)
                if "method" in result:
                    _check_settings(file, result["method"], settings)
                if None not in (weights, result.get("weights")) and result["weights"] != weights:
                    raise ConfigError(f"{file} is of another model: of other weights, or of another selection of tokens.")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{file} is neither a result of examples/benchmark/run.py nor of `hf-tokenprune bench --json` "
                f"({type(error).__name__}: {error})."
            ) from None
        kind = dense if is_dense else pruned if "score" in found else timed
        if kind:
            raise ConfigError(
                f"{file} is the second result of the same kind. Name one run of the model, one of the dense model."
            )
        kind.update(found)
    if dense and pruned and _told(dense) != _told(pruned):
        raise ConfigError("The results of the dense and of the pruned model are on different tasks, splits or metrics.")
    if dense and not pruned:
        pruned = {name: dense[name] for name in ("task", "split", "metric")}
    merged = {**timed, **pruned, **({"latency": timed["latency"]} if timed else {})}
    return {**merged, **({"dense_score": dense["score"]} if dense else {})}


def told_busy(load: float | None) -> str:
    """What is to be said of times that were taken at such a load average, if anything.

    Example:
        >>> told_busy(2.0)
        'In the minute before, 2.0 cores were busy (with training, perhaps): the times may be too long.'
    """
    if load is None or load <= BUSY:
        return ""
    return f"In the minute before, {load:.1f} cores were busy (with training, perhaps): the times may be too long."


def joined(before: Mapping, measured: Mapping) -> dict:
    """An evaluation, and what was measured later. A bench has no score, and counts on texts of its own: where a score is known, what
    was counted with it stays. A score of the dense model stands beside one of the same task, split and metric only.

    Raises:
        ConfigError: the dense model was measured later, on something else than the score is of.

    Example:
        >>> joined({"score": 0.9, "reduction": {"true_length": 2.5}}, {"reduction": {"true_length": 1.9}, "latency": {}})
        {'score': 0.9, 'reduction': {'true_length': 2.5}, 'latency': {}}
    """
    if "score" in before and "dense_score" in measured and "score" not in measured and _told(before) != _told(measured):
        raise ConfigError(
            f"The results are of the dense model, in {_told(measured)}; the score on the model's card is in {_told(before)}. Name a "
            "result of the pruned model on the same, too, or leave the dense model's away."
        )
    if "score" in measured and _told(before) != _told(measured):
        before = {name: value for name, value in before.items() if name != "dense_score"}
    if "score" in before and "reduction" in before and "score" not in measured:
        measured = {name: value for name, value in measured.items() if name not in COUNTS}
    return {**before, **measured}


def evaluation_of_log(
    history: Sequence[Mapping],
    prefix: str = "eval",
    metric: str | None = None,
    dense_until: int = 0,
    unpruned: Mapping | None = None,
) -> dict:
    """An evaluation from the last entry of a Trainer's `state.log_history`.

    Args:
        history: the log; entries before the last serve to find the score of the dense model.
        prefix: what the names of the metrics begin with.
        metric: the score to report; by default, or if this is a loss, the first one that is no loss and no time.
        dense_until: the step at which pruning began, 0 if there was no dense phase.
        unpruned: what was logged of the dense model before this log began.

    Example:
        >>> log = {"eval_loss": 0.4, "eval_accuracy": 0.9, "eval_macs_realised": 0.5, "eval_tokens_after_0": 0.7, "step": 3}
        >>> evaluation_of_log([log])
        {'metric': 'accuracy', 'score': 0.9, 'reduction': {'true_length': 2.0}, 'kept': [0.7]}
    """
    entry = history[-1]
    numbers = {
        name.removeprefix(f"{prefix}_"): value
        for name, value in entry.items()
        if name.startswith(f"{prefix}_") and isinstance(value, (int, float))
    }
    scores = [name for name in numbers if name not in NO_SCORES and not name.startswith(OURS)]
    metric = metric.removeprefix(f"{prefix}_") if metric else None
    if metric not in numbers or (metric in NO_SCORES and scores):
        metric = next(iter(scores), "loss")
    found = {"metric": metric, "score": numbers[metric]} if metric in numbers else {}
    dense = [unpruned or {}, *(e for e in history if 0 < e.get("step", 0) <= dense_until)]
    before = [e[f"{prefix}_{metric}"] for e in dense if f"{prefix}_{metric}" in e]
    if found and before and entry.get("step", 0) > dense_until:
        found["dense_score"] = before[-1]
    if numbers.get("macs_realised"):
        found["reduction"] = {"true_length": 1 / numbers["macs_realised"]}
    kept = {int(name.rpartition("_")[2]): value for name, value in numbers.items() if name.startswith("tokens_after_")}
    if kept:
        found["kept"] = [kept[layer] for layer in sorted(kept)]
    return found


def _told(evaluation):
    """In what its scores are, in words."""
    metric, task, split = (evaluation.get(name) for name in ("metric", "task", "split"))
    return f"{metric} ({task or 'task not known'}, {split or 'split not known'})"


def _read(file):
    def refuse(constant):
        raise ValueError(f"it holds {constant}")

    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise ConfigError(f"The results in {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from None
    if not isinstance(result, dict):
        raise ConfigError(f"{file} holds {type(result).__name__}, not the result of a run.")
    return result


def _check_settings(file, found, wanted):
    if wanted is None:
        return
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{file} is of another model: one that no method has pruned, and this one is by {wanted.get('name')!r}."
        )
    differ = list(_differences(found, wanted))
    if differ:
        raise ConfigError(f"{file} is of another model: {', '.join(f'{n} is {a!r}, not {b!r}' for n, a, b in differ[:3])}.")


def _differences(found, wanted):
    """Where settings are not the same. What was left open (None) has become something in a model."""
    for name in sorted({*found, *wanted}):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b)
        elif a is not None and a != (list(b) if isinstance(b, tuple) else b):
            yield name, a, b


def _of_run(run):
    found = {name: str(run[name]) for name in ("task", "split", "metric")}
    found.update(score=float(run["score"]), **_counts(run, run["tokens"]))
    bench = (run.get("time") or {}).get("bench")
    return {**found, "latency": _latency(bench)} if bench else found


def _of_bench(result):
    return {**_counts({**result, **result["results"][-1]}, result["tokens_per_text"]), "latency": _latency(result)}


def _counts(result, tokens):
    return {
        "reduction": {kind: float(result["reduction"][kind]) for kind in ("true_length", "padded")},
        "max_length": int(result["max_length"]),
        "tokens": float(tokens),
        "kept": [float(left) / float(tokens) for left in result["tokens_per_layer"]],
    }


def _latency(result):
    ms = {
        min(int(entry["batch_size"]), int(result["texts"])): {
            str(name): float(value) for name, value in entry["ms"].items() if value is not None
        }
        for entry in result["results"]
    }
    known = {name: result[name] for name in ("texts", "threads", "dtype")} | {"load_average": result.get("load_average")}
    return {"machine": str(result["gpu"] or result["cpu"]), **known, "ms": ms}
