"""Scripts that tests run in a process of their own: offline, with caches of their own and, if wanted, without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hf_tokenprune as tp

# What a script that may not import this package begins with. It writes down what happened in `reports`.
HEAD = """
import json, sys, traceback
sys.modules["hf_tokenprune"] = None
import torch, transformers
from transformers import AutoConfig, pipeline
from transformers.utils import logging

root = sys.argv[1]
reports = {}
said = []
handler = __import__("logging").Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.get_logger("transformers").addHandler(handler)

def report(name):
    def run(function):
        try:
            reports[name] = function()
        except Exception as error:
            reports[name] = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    return run

def auto_class(folder):
    names = AutoConfig.from_pretrained(folder).auto_map
    return getattr(transformers, next(iter(names)))

def load(folder, **kwargs):
    return auto_class(folder).from_pretrained(folder, trust_remote_code=True, **kwargs)

def logits(model, inputs):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}

def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
"""


def run_offline(root, script, *options):
    """Run a script, given the folder `root`, and return the reports that it leaves there."""
    (root / "script.py").write_text(script)
    path = os.pathsep.join(filter(None, [str(Path(tp.__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    home = {"HF_HOME": str(root / "home"), "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **home, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *options, str(root / "script.py"), str(root)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((root / "reports.json").read_text())


def run_without_package(root, script):
    """Run a script that goes on from `HEAD`, in which a warning is an error."""
    return run_offline(root, HEAD + script, "-W", "error")
