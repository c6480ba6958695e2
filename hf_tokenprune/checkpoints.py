"""Checkpoints of a run. A Trainer that is killed while it saves leaves a part of one, and would resume from that."""

import functools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME, without importing the whole Trainer
ASIDE = "_incomplete-"  # neither resumed from, nor counted by save_total_limit, nor pushed


def resume_complete(trainer):
    """Let `trainer.train(resume_from_checkpoint=True)` go on from the last complete checkpoint, whatever is newer."""
    if "train" not in vars(trainer):
        trainer.train = functools.partial(_train, trainer.args, trainer.train)


def _train(args, train, resume_from_checkpoint=None, *others, **named):
    if resume_from_checkpoint is True:
        with args.main_process_first(local=False):
            for folder in set_aside_incomplete(args.output_dir) if args.process_index == 0 else ():
                logger.warning(
                    f"The run in {args.output_dir} was interrupted while it saved a checkpoint. What there is of it has been renamed "
                    f"to {folder.name} and may be deleted; training goes on from the last complete one."
                )
        if list(Path(args.output_dir).glob(f"{ASIDE}*")) and get_last_checkpoint(args.output_dir) is None:
            logger.warning(f"There is no complete checkpoint in {args.output_dir}: training begins anew.")
            resume_from_checkpoint = None
    return train(resume_from_checkpoint, *others, **named)


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
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(named.fullmatch(path.name), path) for path in Path(output_dir).glob("*") if path.is_dir()]
    moved = []
    for _, folder in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        if is_complete(folder):
            break
        aside = folder.with_name(ASIDE + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        moved.append(aside)
    return moved
