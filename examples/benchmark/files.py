"""Results that are there completely or not at all."""

import json
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
import transformers

import hf_tokenprune as tp


def write_json(path, content):
    """Write JSON to a file, all at once."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    """Write a file all at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def new_folder(path):
    """A folder to fill, which becomes `path` once that has gone well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def versions():
    """Whatever could change the numbers."""
    modules = {"torch": torch, "transformers": transformers, "datasets": datasets, "hf_tokenprune": tp}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}}
