"""How a model came about: the Trainer's log, and runs of the benchmark."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigError

SHARES = ("macs_target", "macs_expected", "macs_realised")


def find_log(folder: Path | None, given, runs) -> list[dict]:
    """The entries that tell of the budget, from `given`, else the folder's `trainer_state.json` or that of its last checkpoint, else
    the benchmark result that has the folder's name."""
    if given is None and folder is not None:
        checkpoint = get_last_checkpoint(folder)
        files = [folder / "trainer_state.json", *([Path(checkpoint) / "trainer_state.json"] if checkpoint else [])]
        given = next((_read(file).get("log_history") for file in files if file.is_file()), None)
        if given is None:
            named = (run for name, run in runs if name == folder.resolve().name)
            given = next(named, {}).get("training", {}).get("log")
    entries = given or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("The log of the training is damaged: it should be a list of dictionaries.")
    return [entry for entry in entries if "step" in entry and any(name in entry for name in SHARES)]


def read_runs(files) -> list[tuple[str, dict]]:
    """`(name, result)` of files of `examples/benchmark/run.py`; its searches for a learning rate (`dense-*.json`) are no results."""
    found = []
    for file in map(Path, files):
        run = _read(file)
        if "trials" in run:
            continue
        try:
            numbers = run["score"], run["reduction"]["true_length"]
            names = run["task"], run["method"], run["metric"]
            good = all(isinstance(n, (int, float)) for n in numbers) and all(isinstance(n, str) for n in names)
        except (KeyError, TypeError):
            good = False
        if not good:
            raise ConfigError(
                f"{file} is no benchmark result: it needs task, method, metric, score and reduction.true_length, as "
                "examples/benchmark/run.py writes them."
            )
        found.append((file.stem, run))
    return found


def _read(file):
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is no JSON object.")
    return content
