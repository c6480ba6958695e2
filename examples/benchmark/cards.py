"""Model cards of the models that `run.py` trained, as `hf-tokenprune push` would publish them: `python examples/benchmark/cards.py`.

Writes a folder per model to model_cards/: the card, its plot, and the config with what was dropped and cut; no weights.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tqdm import tqdm

import hf_tokenprune as tp
from hf_tokenprune.readme import write_card
from hf_tokenprune.results import read_results
from hf_tokenprune.writing import write_file

BASE, LICENSE = "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark/models"), help="(default %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/benchmark"), help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("model_cards"), help="(default %(default)s)")
    args = parser.parse_args(arguments)
    found = [args.results / f"{folder.name}.json" for folder in sorted(args.models.glob("*"))]
    for result in (bar := tqdm([result for result in found if result.is_file()], unit="card")):
        bar.set_description(result.stem)
        run = json.loads(result.read_text())
        if run["settings"] is not None:  # the dense models are not pruned
            write(
                args.models / result.stem, [result, result.with_name(f"{run['task']}-dense-1-{run['seed']}.json")], args.output
            )


def write(folder, results, output):
    """The card of one model, next to its plot and config."""
    place = output / folder.name
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as new:
        tp.from_pretrained(folder).save_pretrained(new)  # with the code as it is now
        repo_id = f"user/{BASE.rpartition('/')[2]}-{folder.name}"
        write_card(new, read_results(results), base_model=BASE, license=LICENSE, plot=True, repo_id=repo_id)
        for name in ("README.md", "config.json", "tokens_per_layer.png"):
            if (Path(new) / name).exists():
                write_file(place / name, (Path(new) / name).read_bytes())


if __name__ == "__main__":
    main()
