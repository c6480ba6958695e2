"""Which weights lie in a folder."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

MODULES = "[0-9]*_*/*.safetensors"  # of sentence-transformers, such as 2_Dense/model.safetensors


def number_of_model(folder):
    """A number that tells the weights in a folder, and the selection in its config.json, from any others; None as in `number_of`."""
    selection = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("token_pruning")
    return number_of(folder, "" if selection is None else json.dumps(selection, sort_keys=True))


def number_of(folder, settings=""):
    """A number that tells the weights in a folder from any others, whatever files they are in; None if none can be read.

    The state of a training does not count: a model that is opened has none.

    Args:
        folder: where the safetensors files are.
        settings: words that count, too.
    """
    folder, digest, where = Path(folder), hashlib.sha256(settings.encode()), {}
    with contextlib.ExitStack() as files:
        for file in (*folder.glob("*.safetensors"), *folder.glob(MODULES)):
            try:
                tensors = files.enter_context(safe_open(file, "pt"))
            except SafetensorError:
                return None
            place = file.parent.relative_to(folder).name
            where.update({(place, name): tensors for name in tensors.keys()})  # noqa: SIM118
        for place, name in sorted(where):
            if ".training_state." not in name:
                tensor = where[place, name].get_tensor(name)
                digest.update(f"{place} {name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return int.from_bytes(digest.digest()[:7], "big") if where else None
