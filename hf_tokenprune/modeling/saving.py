"""Save a model over another one so that a full disk does not leave a mixture of both. (A kill may, between two renamings.)"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from torch import distributed

ASIDE = "_saving"  # neither published nor opened
INDEX = ".safetensors.index.json"
NUMBER = r"(-\d{5}-of-\d{5})?"  # of a file, where weights are in several
SHARD = re.compile(rf"(.+?){NUMBER}\.safetensors")


@contextlib.contextmanager
def all_or_nothing(folder):
    """Write to a folder inside a folder; what was written there takes its place in the outer one once all of it is on the disk.

    Weights of a model saved there before that are no longer part of it go then. If writing fails, the outer folder is as it was.

    Args:
        folder: where to save; it is made if need be.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with all_or_nothing(folder) as inner:
        ...         _ = (inner / "config.json").write_text("{}")
        ...     os.listdir(folder)
        ['config.json']
    """
    folder = Path(folder)
    # All processes of a run may save here, each from a folder of its own.
    together = distributed.is_available() and distributed.is_initialized()
    number, count = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    inner = folder / f"{ASIDE}-{number}"
    for left in folder.glob(f"{ASIDE}*"):  # of processes that were killed
        whose = left.name.rpartition("-")[2]
        if left == inner or (number == 0 and not (whose.isdecimal() and int(whose) < count)):
            shutil.rmtree(left, ignore_errors=True)
    inner.mkdir(parents=True)
    try:
        try:
            yield inner
        except Exception as error:
            error.add_note(f"Nothing was saved: {folder} is as it was before.")
            raise
        new = sorted(file.name for file in inner.iterdir())
        for name in new:
            os.replace(inner / name, folder / name)
        stems = {match[1] for match in map(SHARD.fullmatch, new) if match}
        for file in folder.iterdir():
            match = SHARD.fullmatch(file.name)
            if match and match[1] in stems and file.name not in new:
                file.unlink(missing_ok=True)
        for stem in stems:  # an index of weights that were in several files
            if f"{stem}{INDEX}" not in new:
                (folder / f"{stem}{INDEX}").unlink(missing_ok=True)
    finally:
        shutil.rmtree(inner, ignore_errors=True)
