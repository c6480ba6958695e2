"""A real text-classification data set that needs no download: which library does this passage document?

The texts are the docstrings of seven libraries, read from the source files that are installed anyway. They are written by many
hands, range from 20 to 300 words, and mix prose, formulas and code, so that padding and unimportant tokens occur as they do in
practice. The names of the libraries are masked, because a classifier that only looks for "numpy" would teach nothing.

    python examples/docstrings.py         # build it, print what is in it
"""

import ast
import gc
import hashlib
import os
import platform
import random
import re
import sysconfig
import tempfile
import warnings
import zlib
from collections import Counter
from importlib import metadata, util
from itertools import islice
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from tqdm.auto import tqdm

LABELS = ["python", "numpy", "pandas", "sympy", "networkx", "torch", "transformers"]
SPLITS = ["train", "validation", "test"]
MIN_WORDS, MAX_WORDS = 20, 300
CLASS_CAP = 6000  # torch and transformers have several times as much text as the others

# Tests, bundled copies of other projects, and parts of the standard library that are applications or tables.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "_vendored", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS |= {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings"}

# Any word with a library's name in it, the usual import aliases, and the modules that examples import from.
GIVEAWAYS = re.compile(
    r"(?i)(?<=\bfrom )[\w.]+(?= import\b)|\b(?:np|pd|nx|hf)(?![a-z])"
    r"|\b\w*?(?:python|numpy|pandas|sympy|networkx|torch|transformers|hugging[ _-]?face(?:\.co)?)\w*"
)
# Underlined headings and table borders, which are a word piece per character, and orders to the tool that runs the examples.
NOISE = re.compile(r"([-=~*_#.^+])\1{3,}|# *x?doctest:.*")
PLACEHOLDERS = re.compile(r"\{\w*\}")  # of the templates that C functions are documented with


def load(cache_dir=None, limits=None):
    """The data set as a `DatasetDict` with columns `text` and `label`; built on the first call, read from the cache afterwards.

    `limits`, for instance `{"train": 2000}`, keeps the first rows of a split; rows are shuffled, so that is a fair sample.
    """
    root = cache_dir or Path(os.environ.get("HF_TOKENPRUNE_CACHE", "~/.cache/hf_tokenprune")) / "docstrings"
    folder = Path(root).expanduser() / _key()
    if not folder.is_dir():
        gc.disable()  # syntax trees have no cycles, and looking for them doubles the time
        try:
            _write(_build(), folder)
        finally:
            gc.enable()
    splits = {split: datasets.Dataset(pq.read_table(folder / f"{split}.parquet")) for split in SPLITS}
    for split, rows in (limits or {}).items():
        splits[split] = splits[split].select(range(min(rows, len(splits[split]))))
    return datasets.DatasetDict(splits)


def _key():
    """Other versions of the libraries, or of this file, give other texts: each combination has its own folder."""
    parts = [platform.python_version(), Path(__file__).read_text(encoding="utf-8")]
    for label in LABELS[1:]:
        try:
            parts.append(f"{label} {metadata.version(label)}")
        except metadata.PackageNotFoundError:
            raise ImportError(f'The docstring data set reads {label}: pip install "hf_tokenprune[demo]"') from None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _write(dataset, folder):
    """Write to a temporary neighbour and rename, so that an interrupted run never leaves half a data set behind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        finished = Path(scratch) / folder.name
        finished.mkdir()
        for split, rows in dataset.items():
            rows.to_parquet(finished / f"{split}.parquet")
        try:
            os.replace(finished, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise


def _build():
    files = [(label, root, path) for label in LABELS for root in [_root(label)] for path in _sources(root)]
    passages = {label: [] for label in LABELS}
    seen = set()
    for label, root, path in tqdm(files, desc="reading docstrings", unit="file"):
        name = f"{label}/{path.relative_to(root).as_posix()}"
        rng = random.Random(name)
        texts = (text for document in _documents(path) for text in _split(document, rng))
        passages[label] += [(_split_of(name), text) for text in texts if _is_new(text, seen)]

    rows = {split: [] for split in SPLITS}
    rng = random.Random(0)
    for label, found in passages.items():
        for split, text in rng.sample(found, min(len(found), CLASS_CAP)):
            rows[split].append({"text": text, "label": LABELS.index(label)})
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)})
    for split in SPLITS:
        rng.shuffle(rows[split])
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows[split], features=features) for split in SPLITS})


def _root(label):
    """Where the sources of a library are, found without importing it."""
    if label == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    return Path(util.find_spec(label).submodule_search_locations[0])


def _sources(root):
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py") and not name.startswith("test_"))


def _documents(path):
    """The docstrings of a file, and the texts that numpy and torch attach to their C functions by a call."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    statements = [tree]
    for node in statements:
        statements.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            if getattr(called, "attr", getattr(called, "id", "")).startswith(("add_docstr", "add_newdoc")):
                strings = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                yield from (PLACEHOLDERS.sub(" ", string) for string in strings if isinstance(string, str))


def _split(document, rng):
    """Cut a document into passages at its blank lines.

    The longest allowed passage is drawn anew for each (log-uniformly), because a fixed one would make most passages that long.
    """
    document = NOISE.sub(" ", GIVEAWAYS.sub("library", document)).encode(errors="ignore").decode()  # no lone surrogates
    passages, limit = [[]], 0
    for paragraph in re.split(r"\n\s*\n", document):
        words = paragraph.split()
        while words:
            if passages[-1] and len(passages[-1]) + len(words) > limit:
                passages.append([])
            if not passages[-1]:
                limit = round(2 * MIN_WORDS * (MAX_WORDS / 2 / MIN_WORDS) ** rng.random())
            passages[-1] += words[:limit]
            words = words[limit:]
    return [" ".join(passage) for passage in passages if len(passage) >= MIN_WORDS]


def _is_new(text, seen):
    """Whether less than half of the text occurred before, by a quarter of its runs of six words, digits and case ignored.

    Libraries repeat themselves, transformers in every model: copies would make the test split a part of the training split.
    """
    words = re.sub(r"\d+", "0", text.lower()).split()
    runs = {zlib.crc32(" ".join(words[i : i + 6]).encode()) for i in range(len(words) - 5)}
    runs = {run for run in runs if run % 4 == 0} or {min(runs)}
    new = 2 * len(runs & seen) < len(runs)
    seen |= runs
    return new


def _split_of(name):
    """A source file belongs to one split: its passages resemble each other."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return "validation" if bucket < 3 else "test" if bucket < 6 else "train"


def main():
    dataset = load()
    counts = {split: Counter(rows["label"]) for split, rows in dataset.items()}
    table = [["class", *SPLITS]]
    table += [[label, *(str(counts[split][index]) for split in SPLITS)] for index, label in enumerate(LABELS)]
    table += [["all", *(str(len(dataset[split])) for split in SPLITS)]]
    table += [["majority", *(f"{max(counts[split].values()) / len(dataset[split]):.1%}" for split in SPLITS)]]
    print("\n".join("".join(f"{cell:>14}" for cell in row) for row in table))

    lengths = sorted(len(text.split()) for text in dataset["train"]["text"])
    print("\nwords, quartiles:", [lengths[int(share * (len(lengths) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)])
    for index, label in enumerate(LABELS):
        texts = (row["text"] for row in dataset["train"] if row["label"] == index)
        print(f"\n{label}", *islice(texts, 3), sep="\n  * ")


if __name__ == "__main__":
    main()
