"""Results that are there completely or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import datasets

import hf_tokenprune as tp
from hf_tokenprune import subject
from hf_tokenprune.writing import write_file

UNPRUNED = ("dense", "dense-longer")  # methods from which nothing goes, so that they have no budget


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


def fingerprint(folder):
    """What tells the weights in a folder from all others."""
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()[:12]


def versions():
    """Of the software that could change the numbers; `revision`: the last commit that touched the package, if git knows."""
    known = {**subject.versions(), "datasets": datasets.__version__}
    folder = Path(tp.__file__).parent
    asked = ["git", "-C", str(folder), "log", "-1", "--format=%h", "--", "."]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        said = ""
    return {**known, **({"revision": said} if said else {})}
