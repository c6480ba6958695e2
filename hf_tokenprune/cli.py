"""The command line: it parses, calls the functions of this package, prints, and writes files."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .bench import DTYPES, bench
from .errors import ConfigError, TokenPruneError
from .explain import explain
from .publish import push
from .reporting import report
from .results import told_busy
from .run import METHODS, make_method, run_script, settings
from .sample_text import TEXTS
from .subject import read_texts
from .writing import write_output

DESCRIPTION = "Faster transformer encoders: tokens dropped layer by layer, weights cut out."
BENCH = """\
Measure a model on this machine, on real text. Contenders made from the same weights take turns on every batch:

  hf_padded     the unmodified transformers model (SDPA), each batch padded to its longest text
  hf_sorted     the same, texts sorted by length before they are put into batches
  hf_flash      as hf_padded with FlashAttention 2 (on a GPU in half precision, where flash-attn is installed)
  packed_dense  packed by this package, nothing dropped; the baseline that pruning has to beat
  pruned        the model as it was saved (not for a model that drops no tokens and was never cut)

Of a model whose weights were cut all but the last are as large as what it was cut from.

Times are milliseconds per text, tokenisation aside, and medians of the repeats."""
PUSH = """\
Upload a saved token-pruned model to the Hub in one commit: weights, tokenizer, the code that opens them, and a model card.
Optimizer states and pickles of a checkpoint stay at home. A README.md that you wrote is published as it is."""
EXAMPLES = """\
examples:
  hf-tokenprune bench pruned
  hf-tokenprune bench pruned --texts stsb/validation.parquet --columns sentence1 sentence2 --json bench.json
"""
REPORT = """\
Write one HTML page about a model: every token of some texts in the colour of how deep it lived, tokens, MACs and milliseconds of
each layer, which weights were cut, and how the gates moved in training, where the folder or its checkpoints hold a
trainer_state.json. The page needs no network and no scripts."""
RUN = """\
Run a training script as it is, and prune the model that it trains: every transformers.Trainer that the script makes, of any
subclass, gets the callback for a method. What follows SCRIPT is the script's own. Options left out are the method's defaults;
help(hf_tokenprune.ToP), of StructuredPruning, InforCoef and Compose explains them."""
RUN_EXAMPLES = """\
examples:
  hf-tokenprune run --method top --target-macs 0.4 -- run_glue.py --model_name_or_path bert-base-uncased --do_train ...
  torchrun --nproc_per_node 2 -m hf_tokenprune run --target-macs 0.4 -- train.py
  accelerate launch -m hf_tokenprune run --target-macs 0.4 --schedule dense=0,anneal=1,settle=1 -- train.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own) and return the exit status: 0, or 1 after a line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.command.error(f"unknown: {shlex.join(unknown)}")
    try:
        arguments.run(arguments, shlex.join(["hf-tokenprune", *argv]))
    except (TokenPruneError, OSError) as error:
        print(f"hf-tokenprune: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is what --help is for."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} ({self.prog} --help shows what is known)\n")


def _count(text):
    """A whole number from 1."""
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 999999999, not {text[:20]!r}")
    return int(text)


def _add_texts(add):
    add("--texts", metavar="FILE", help="a .txt file, a text a line, or .parquet, .csv, .jsonl (default: built-in sample text)")
    add("--columns", metavar="NAME", nargs="+", default=[], help="its column with texts, or two columns for pairs")
    add("--max-length", metavar="N", type=_count, help="cut texts to N tokens (default: 128, or what the model can read)")


def _texts(arguments):
    if arguments.texts:
        return read_texts(arguments.texts, arguments.columns, limit=arguments.limit)
    if arguments.columns:
        raise ConfigError("--columns names columns of --texts, which is missing.")
    return list(TEXTS[: arguments.limit])


def _parser():
    parser = _Parser(prog="hf-tokenprune", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_bench(commands)
    _add_report(commands)
    _add_explain(commands)
    _add_run(commands)
    _add_push(commands)
    return parser


def _add_bench(commands):
    command = commands.add_parser(
        "bench",
        help="measure a model's speed and MACs against its unmodified self",
        description=BENCH,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("folder", metavar="FOLDER", help="a saved model (token-pruned or plain transformers) with its tokenizer")
    _add_texts(add)
    add("--limit", metavar="N", type=_count, default=256, help="use the first N texts (default: %(default)s)")
    sizes = "texts per batch, at most as many as there are (default: 1 32)"
    add("--batch-sizes", metavar="N", type=_count, nargs="+", default=[1, 32], help=sizes)
    add("--threads", metavar="N", type=_count, help="CPU threads (default: what torch uses)")
    add("--repeats", metavar="N", type=_count, default=5, help="measurements of each batch (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="number format (default: that of the saved weights)")
    add("--device", default="cpu", help="where to run: cpu, cuda, ... (default: %(default)s)")
    add("--json", metavar="FILE", help="also write everything that was measured to this file")
    command.set_defaults(run=_bench, command=command)


def _bench(arguments, command):
    if arguments.json:
        _check_writable(Path(arguments.json))
    texts = _texts(arguments)
    result = bench(
        arguments.folder,
        texts,
        batch_sizes=arguments.batch_sizes,
        max_length=arguments.max_length,
        threads=arguments.threads,
        repeats=arguments.repeats,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    result["command"] = command
    print(format_bench(result))
    if arguments.json:
        _write_json(result, Path(arguments.json))


def format_bench(result: dict) -> str:
    """What `bench` returned, as text for a terminal."""
    width = 13
    names = [name for name, ms in result["results"][0]["ms"].items() if ms is not None]
    ours = names[-1]
    last = result["results"][-1]
    lines = [
        f"{result['model']}: {result['class']}, {result['layers']} layers, {result['dtype']}",
        f"{result['gpu'] or result['cpu']}, {result['threads']} threads; medians of {result['repeats']} repeats",
        f"{result['texts']} texts of {result['tokens_per_text']:.1f} tokens on average, cut at {result['max_length']}",
        "",
        "ms per text".ljust(18) + "".join(name.rjust(width) for name in names),
    ]
    for entry in result["results"]:
        lines.append(f"batch size {entry['batch_size']}".ljust(18) + "".join(f"{entry['ms'][n]:{width}.2f}" for n in names))
    lines += ["", f"time / {ours}".ljust(18)]
    for entry in result["results"]:
        gains = (f"{entry['ms'][n] / entry['ms'][ours]:{width - 1}.2f}x" for n in names[:-1])
        lines.append(f"batch size {entry['batch_size']}".ljust(18) + "".join(gains))
    lines += [
        "",
        f"MACs of {ours}: {last['reduction']['true_length']:.2f}x fewer than dense on the real tokens, "
        f"{last['reduction']['padded']:.2f}x fewer than dense padded to {result['max_length']}",
        "tokens that leave each layer: " + " ".join(f"{tokens:.1f}" for tokens in last["tokens_per_layer"]),
    ]
    if busy := told_busy(result["load_average"]):
        lines.append(busy)
    return "\n".join(lines)


def _add_report(commands):
    command = commands.add_parser(
        "report",
        help="write a page that shows how deep tokens live and what each layer costs",
        description=REPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("folder", metavar="FOLDER", help="a saved model with its tokenizer or image processor")
    _add_texts(add)
    add("--images", metavar="FILE", nargs="+", help="image files, for a model that reads pixels")
    add("--limit", metavar="N", type=_count, default=100, help="use the first N texts or images (default: %(default)s)")
    add("--repeats", metavar="N", type=_count, default=3, help="measurements of the layers (default: %(default)s)")
    add("--runs", metavar="JSON", nargs="+", default=[], help="runs of examples/benchmark, to plot score against MACs")
    add("--plots", metavar="FOLDER", help="also write each plot as PNG and SVG to this folder")
    add("-o", "--output", metavar="FILE", default="report.html", help="the page (default: %(default)s)")
    command.set_defaults(run=_report, command=command)


def _report(arguments, command):
    if arguments.images and (arguments.texts or arguments.columns):
        raise ConfigError("--images cannot be given together with --texts or --columns: a model reads one of them.")
    _check_writable(Path(arguments.output))
    if arguments.plots:
        _check_folder(Path(arguments.plots))
    if arguments.images:
        samples = [_read_image(file) for file in arguments.images[: arguments.limit]]
    else:
        samples = _texts(arguments)
    found = report(arguments.folder, samples, max_length=arguments.max_length, repeats=arguments.repeats, runs=arguments.runs)
    found.save(arguments.output)
    if arguments.plots:
        found.save_plots(arguments.plots)
    print(
        f"{arguments.output}: {len(found.samples)} {'images' if arguments.images else 'texts'}, {len(found.model.macs)} layers"
    )


def _read_image(file):
    from PIL import Image

    with Image.open(file) as image:  # an OSError says what is wrong
        return image.convert("RGB")


def _add_explain(commands):
    command = commands.add_parser(
        "explain",
        help="print a text with each token in the colour of how deep it lived",
        description="Print a text, each token with the layer in which it was dropped, in colour where the terminal has any.",
    )
    add = command.add_argument
    add("folder", metavar="FOLDER", help="a saved model with its tokenizer")
    add("text", metavar="TEXT", nargs="+", help="a text, or two for a model that reads pairs")
    add("--max-length", metavar="N", type=_count, help="cut the text to N tokens (default: 128, or what the model can read)")
    command.set_defaults(run=_explain, command=command)


def _explain(arguments, command):
    from rich.console import Console

    if len(arguments.text) > 2:
        raise ConfigError(f"{len(arguments.text)} texts were given; give one, or two for a model that reads pairs. Quote them.")
    text = arguments.text[0] if len(arguments.text) == 1 else tuple(arguments.text)
    console = Console(highlight=False)
    ascii_only = not console.encoding.startswith("utf")
    console.print(explain(arguments.folder, text, max_length=arguments.max_length, ascii_only=ascii_only))


def _add_run(commands):
    command = commands.add_parser(
        "run",
        help="run a training script unchanged, and prune the model that it trains",
        usage="hf-tokenprune run [--method METHOD] [OPTIONS] [--] SCRIPT [ARGUMENTS ...]",
        description=RUN,
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the script's options are not ours
    )
    add = command.add_argument
    add("--method", default="top", help=f"{', '.join(METHODS)} (default: %(default)s)")
    for name, text in settings().items():
        add(f"--{name.replace('_', '-')}", metavar="VALUE", default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    add("script", metavar="SCRIPT", nargs=argparse.REMAINDER, help="a Python file, and its own arguments")
    command.set_defaults(run=_run, command=command)


def _run(arguments, command):
    given = {name: getattr(arguments, name) for name in settings() if hasattr(arguments, name)}
    script, *own = arguments.script[arguments.script[:1] == ["--"] :] or [None]
    if script is None:
        raise ConfigError("There is no script to run: hf-tokenprune run --target-macs 0.4 -- SCRIPT, for instance.")
    run_script(script, own, make_method(arguments.method, given))


def _add_push(commands):
    command = commands.add_parser("push", help="publish a saved model on the Hub, with its model card", description=PUSH)
    add = command.add_argument
    add("folder", metavar="FOLDER", help="a saved token-pruned model")
    add("repo_id", metavar="USER/NAME", help="the repository, which is made if there is none")
    add("--private", action="store_true", default=None, help="make it private; a public one that exists is refused")
    add("--revision", metavar="BRANCH", help="commit to this branch, which is made if there is none (default: main)")
    add("--results", metavar="FILE", nargs="+", default=[], help="JSON of `bench --json` or of a benchmark run, for the card")
    add("--license", metavar="NAME", help="licence of the weights, as the Hub names it (default: what README.md says)")
    add("--dry-run", action="store_true", help="only show the files and the card")
    command.set_defaults(run=_push, command=command)


def _push(arguments, command):
    names = ("private", "revision", "results", "license", "dry_run")
    found = push(arguments.folder, arguments.repo_id, **{name: getattr(arguments, name) for name in names})
    if found.url is None:
        print(f"{found.card}\n\nWould be published as {found.repo_id}, in one commit:")
    for name, size in found.files.items():
        print(f"{size:12,}  {name}")
    print(f"{sum(found.files.values()):12,}  bytes in all")
    for name in found.deleted or ():
        print(f"deleted there: {name}, which would be opened instead")
    if found.deleted is None:
        print("What lies there could not be seen; weights in other files, if any, would be deleted there.")
    if found.card_is_theirs:
        print("README.md was written by hand, so it is published as it is. Let it say: trust_remote_code=True.")
    if found.url is not None:
        print(found.url)


def _check_writable(path):
    """Raise `ConfigError` before the work is done if its result could not be written."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder, or its folder does not exist.")
    special = path.exists() and not path.is_file()  # a pipe or device, written to as it is
    if not os.access(path if special else path.resolve().parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: you may not write there.")


def _check_folder(path):
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {there} is no folder, or one that you may not write to.")


def _write_json(result, path):
    write_output(path, json.dumps(result, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
