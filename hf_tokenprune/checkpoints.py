"""Checkpoints of a run. A Trainer that is killed while it saves leaves a part of one, and would resume from that."""

import functools
import inspect
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

from .errors import TrainingError
from .modeling.architectures import transformers_model
from .processes import of_all
from .schedule import PHASES, Schedule

logger = logging.get_logger(__name__)

RESUME = "resume_from_checkpoint"
# Settings that fit any checkpoint of the same method, and those of which one thing has to stay: that there is something, or nothing.
MAY_CHANGE = {
    "target_macs", "target_params", "static_macs", "constraint",
    "distill_weight", "layer_weight", "rank_weight", "importance_weight", "entropy_weight", "norm_weight",
}  # fmt: skip
NOT_FROM_NOTHING = {"static_macs", "layer_weight"}
NAMED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")

STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME, without importing the whole Trainer
ASIDE = "_incomplete-"  # neither resumed from, nor counted by save_total_limit, nor pushed


def resume_complete(trainer):
    """Let `trainer.train(resume_from_checkpoint=True)` go on from the last complete checkpoint, whatever is newer.

    Half a checkpoint that is asked for by its path is refused, with the last complete one named.
    """
    if "train" not in vars(trainer):
        trainer.train = functools.wraps(trainer.train)(functools.partial(_train, trainer, trainer.train))


def _train(trainer, train, *args, **kwargs):
    first = bool(args) and next(iter(inspect.signature(train).parameters), None) == RESUME
    asked = args[0] if first else kwargs.get(RESUME)
    if asked is True and not _anything_to_resume(trainer.args):
        args, kwargs = ((None, *args[1:]), kwargs) if first else (args, {**kwargs, RESUME: None})
    elif isinstance(asked, (str, os.PathLike)):
        _check_complete(Path(asked), Path(trainer.args.output_dir))
    folder = get_last_checkpoint(trainer.args.output_dir) if asked is True else asked
    if isinstance(folder, (str, os.PathLike)):
        _check_method(Path(folder), trainer.model)
    return train(*args, **kwargs)


def _check_method(folder, model):
    """A run goes on with the method it began with."""
    config, weights = _files(folder, model)
    try:
        then = (json.loads(config.read_text(encoding="utf-8")).get("token_pruning") or {}).get("method")
        now = transformers_model(model).config.token_pruning["method"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it has no config, or the model no method
        return
    if then is None:
        raise TrainingError(
            f"{folder} is of a run without TokenPruneCallback, and holds no gates to go on with. Begin a new run, in another "
            "output_dir or without resume_from_checkpoint; or load the model from this checkpoint and give it to a new run, with "
            "Schedule(dense=0)."
        )
    changed = list(_changed(then, now))
    late = {name for name, *_ in changed} & _chosen_by(folder, weights, then)
    if late:
        raise TrainingError(
            f"{folder} is of a run that has chosen by {', '.join(sorted(late))} already what goes. Resume it with the budget that it "
            "began with; to prune the model further, begin a new run with it."
        )
    if any(name not in MAY_CHANGE or (name in NOT_FROM_NOTHING and bool(a) != bool(b)) for name, a, b in changed):
        raise TrainingError(
            f"{folder} is of a run with another method than this one: "
            + ", ".join(f"{name} was {before!r} and is {after!r}" for name, before, after in changed)
            + ". Resume with the settings that the run began with, or begin a new run with the saved model."
        )
    if changed:
        what = ", ".join(f"{name} (was {before!r}, is {after!r})" for name, before, after in changed)
        logger.warning(f"The run that is resumed goes on with other settings than it began with: {what}.")


def _files(folder, model):
    """Where in a checkpoint of a model, or of its active adapter, its config and its weights are."""
    if not hasattr(model, "peft_config"):
        return folder / "config.json", folder / "model.safetensors"
    name = model.active_adapters[0]
    place = folder if name == "default" else folder / name
    return place / "adapter_config.json", place / "adapter_model.safetensors"


def _chosen_by(folder, weights, method):
    """The budgets by which a checkpoint's run has chosen already what goes."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    logged = [entry["pruning_phase"] for entry in state["log_history"] if "pruning_phase" in entry]
    planned = Schedule(**method["schedule"]).at(state["global_step"], _begun_for(weights) or state["max_steps"])
    phase = max([PHASES.index(planned.phase), *logged[-1:]])
    done = {"static_macs": "static", "target_macs": "anneal", "target_params": "anneal"}
    return {budget for budget, last in done.items() if phase > PHASES.index(last)}


def _begun_for(weights):
    """The number of steps that a checkpoint's run was begun for, None if that cannot be told."""
    try:
        with safe_open(weights, "pt") as tensors:
            name = next(name for name in tensors.keys() if name.endswith("training_state.total"))  # noqa: SIM118
            return int(tensors.get_tensor(name)) or None
    except (OSError, SafetensorError, StopIteration):  # in several files
        return None


def _changed(then, now):
    """`(name, before, after)` of settings that are not the same; a teacher may have moved."""
    for name, value in now.items():
        if name == "teacher" or name not in then or then[name] == value:
            continue
        if isinstance(value, dict) and isinstance(then[name], dict) and name != "schedule":
            yield from _changed(then[name], value)
        else:
            yield name, then[name], value


def _anything_to_resume(args):
    """Set aside half checkpoints. False if there was nothing else to go on from."""
    aside = set_aside_incomplete(args.output_dir) if args.should_save else []
    aside = [folder.name for folders in of_all(aside) for folder in folders]  # all processes wait here for those that rename
    if not aside:
        return True
    last = get_last_checkpoint(args.output_dir)
    logger.warning(
        f"The run in {args.output_dir} was interrupted while it saved a checkpoint. What there is of it has been renamed to "
        f"{', '.join(aside)} and may be deleted. Training "
        + (f"goes on from {Path(last).name}." if last else "begins anew: there is no complete checkpoint.")
    )
    return last is not None


def _check_complete(folder, output_dir):
    numbered = _numbered(output_dir)
    if folder.resolve() not in [path.resolve() for path in numbered] or is_complete(folder):
        return
    instead = next((path.name for path in numbered if is_complete(path)), "none")
    raise TrainingError(
        f"{folder} is half a checkpoint: the run was interrupted while it saved it. The last complete one is: {instead}. Resume from "
        "that, or with resume_from_checkpoint=True, which finds it."
    )


def _numbered(output_dir):
    """The checkpoints in a run's folder, newest first."""
    found = [(NAMED.fullmatch(path.name), path) for path in Path(output_dir).glob("*") if path.is_dir()]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True)]


def is_complete(folder):
    """Has the Trainer written all of this checkpoint? It writes its own state last, and what lies there can be read."""
    folder = Path(folder)
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for ending in ("*.pt", "*.pth") for file in folder.glob(ending))


def set_aside_incomplete(output_dir):
    """Rename what is newer than the newest complete checkpoint, so that `resume_from_checkpoint=True` and `get_last_checkpoint`
    find that one.

    Args:
        output_dir: the run's folder; it need not exist.

    Returns:
        The new paths, newest first.

    Example:
        >>> set_aside_incomplete("no/such/folder")
        []
    """
    moved = []
    for folder in _numbered(output_dir):
        if is_complete(folder):
            break
        aside = folder.with_name(ASIDE + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        moved.append(aside)
    return moved
