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
from hf_tokenprune.writing import write_file


def write_json(path, content):
    """Write JSON to a file, all at once."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    """Write a file all at once, and its folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text)


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
