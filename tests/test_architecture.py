"""The rooms of the package: imports point one way, the front door is complete, and opening it changes nothing outside."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hf_tokenprune as tp

ROOT = Path(tp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Each room may import itself and the rooms of the lines above it. Leaves may import every room; nobody but training and
# other leaves imports them.
LAYERS = (
    {"modeling"},
    {"errors", "precision", "weights", "writing"},
    {"cost", "depth", "gates", "losses", "schedule", "loading", "processes", "sharding"},
    {"budget", "checkpoints", "structure", "surgery", "teacher", "trainer"},
    {"methods"},
    {"training"},
)
LEAVES = {
    "__main__", "adapter_card", "bench", "cli", "explain", "integrations", "model_card", "publish", "readme", "reporting", "results",
    "run", "sample_text", "subject", "trainer_card",
}  # fmt: skip
MAY_IMPORT_LEAVES = {"training", *LEAVES}
# triton comes with torch where there is a GPU, and kernels.py does without it elsewhere.
SHIPPED_CODE_MAY_IMPORT = {"torch", "transformers", "triton", *sys.stdlib_module_names}
DEPENDENCIES = {*SHIPPED_CODE_MAY_IMPORT, "accelerate", "datasets", "huggingface_hub", "rich", "safetensors", "tqdm"}


def name_of(file):
    """`hf_tokenprune/losses/ranking.py` -> `("losses", "ranking")`; a package is named without `__init__`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {name_of(file): file for file in FILES}


def statements(file):
    """Every import statement of a file, wherever it stands."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def own_imports(file):
    """The modules of this package that a file imports, as in `MODULES`."""
    found = set()
    package = name_of(file) if file.name == "__init__.py" else name_of(file)[:-1]
    for node in statements(file):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == ROOT.name}
            continue
        path = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            path = package[: len(package) - node.level + 1] + path
        elif path[0] == ROOT.name:
            path = path[1:]
        else:
            continue
        for alias in node.names:
            found.add((*path, alias.name) if (*path, alias.name) in MODULES else path)
    return found


def outside_imports(file, nodes=None):
    """The top-level names of other packages that a file imports."""
    found = set()
    for node in statements(file) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - {ROOT.name}


def level_of(room):
    for level, rooms in enumerate(LAYERS):
        if room in rooms:
            return level
    assert room in LEAVES, f"{room} is a new room: give it a place in LAYERS or LEAVES"
    return len(LAYERS)


def short(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file)], ids=short)
def test_imports_point_one_way(file):
    room = name_of(file)[0]
    for target in own_imports(file):
        assert target in MODULES, f"{short(file)} imports {'.'.join(target)}, which does not exist"
        if not target:
            assert room in LEAVES, f"{short(file)} imports the front door, which imports it"
        elif target[0] in LEAVES:
            assert room in MAY_IMPORT_LEAVES, f"{short(file)} imports the leaf {target[0]}"
        elif target[0] != room:
            assert level_of(target[0]) < level_of(room), f"{short(file)} may not know {'.'.join(target)}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: own_imports(file) - {name, ()} for name, file in MODULES.items() if name}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("file", sorted((ROOT / "modeling").iterdir()), ids=lambda file: file.name)
def test_code_that_travels_to_the_hub_stands_on_its_own(file):
    """The Hub's loader copies a file and, recursively, its `from .x import y` siblings; it follows nothing else."""
    if file.name == "__pycache__":
        return
    assert file.suffix == ".py", "the loader does not follow sub-folders"
    assert outside_imports(file) <= SHIPPED_CODE_MAY_IMPORT
    siblings = {path.stem for path in file.parent.glob("*.py")}
    for node in statements(file):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} leaves the folder"
            assert node.module in siblings, f"line {node.lineno}: write `from .x import y`"
        else:
            assert ROOT.name not in ast.unparse(node), f"line {node.lineno} imports the package by name"


@pytest.mark.parametrize("file", FILES, ids=short)
def test_importing_needs_the_declared_dependencies_only(file):
    """Optional packages are imported inside the function that needs them; or by the file that is named after them, which is opened
    by nobody but who has them."""
    tree = ast.parse(file.read_text())
    inside = {node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    at_import = [node for node in ast.walk(tree) if node not in inside]
    optional = {file.stem} if file.parent.name == "integrations" else set()
    assert outside_imports(file, at_import) <= DEPENDENCIES | optional


SNAPSHOT = """
import logging, os, sys, warnings
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, Trainer
from transformers.models.auto import modeling_auto

def state():
    return {
        "attention": sorted(AttentionInterface().valid_keys()),
        "masks": sorted(AttentionMaskInterface().valid_keys()),
        "classes": [sorted(vars(cls).items(), key=str) for cls in (PreTrainedModel, Trainer, torch.nn.Module)],
        "auto": len(modeling_auto.MODEL_MAPPING),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled()),
        "hooks": (sys.excepthook, list(sys.meta_path), list(sys.path)),
    }

for name in ("transformers.trainer", "datasets", "accelerate"):
    __import__(name)
before = state()
import hf_tokenprune
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, changed
assert "token_pruning" not in after["attention"] + after["masks"]
print("unchanged")
"""


def test_importing_changes_nothing_outside():
    run = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert run.stdout.strip() == "unchanged", run.stderr


def test_the_public_names_are_complete_and_sorted():
    assert tp.__all__ == sorted(tp.__all__)
    public = {name for name, value in vars(tp).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert public <= set(tp.__all__)
    for name in tp.__all__:
        assert getattr(tp, name).__doc__, f"{name} has no docstring"


def test_errors_are_ours_and_the_built_in_ones():
    assert tp.errors.__all__ == sorted(tp.errors.__all__)
    source = import_module("hf_tokenprune.modeling.errors")
    raised = {name for name, value in vars(source).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert raised == set(tp.errors.__all__)
    for name in raised - {"TokenPruneError"}:
        error = getattr(tp.errors, name)
        assert issubclass(error, tp.errors.TokenPruneError)
        assert issubclass(error, (ValueError, RuntimeError))


def test_the_changelog_is_about_this_version():
    changelog = (ROOT.parent / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?v?(\d+\.\d+\.\d+\w*)", changelog, flags=re.MULTILINE)
    assert versions, "CHANGELOG.md has no heading `## [x.y.z]`"
    assert versions[0] == tp.__version__
