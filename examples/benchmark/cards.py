"""Model cards of the models that `run.py` trained, as `hf-tokenprune push` would publish them: `python examples/benchmark/cards.py`.

Writes a folder to model_cards/ for each task, method and budget, of the first seed whose model is there: the card, its plot, and the
config with what was dropped and cut; no weights. A config that lies there already will do where the model itself is gone.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from files import UNPRUNED
from tqdm import tqdm

import hf_tokenprune.modeling
from hf_tokenprune.readme import write_card
from hf_tokenprune.results import read_results
from hf_tokenprune.writing import write_file

BASE, LICENSE = "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"
CODE = Path(hf_tokenprune.modeling.__file__).parent


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark/models"), help="(default %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/benchmark"), help="(default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("model_cards"), help="(default %(default)s)")
    args = parser.parse_args(arguments)
    runs = defaultdict(dict)
    for file in args.results.glob("*.json"):
        run = {} if file.name.startswith("dense-") else json.loads(file.read_text())
        if run.get("method", "dense") not in UNPRUNED:
            runs[run["task"], run["method"], run["budget"]][run["seed"]] = file
    for (task, *_), seeds in (bar := tqdm(sorted(runs.items()), unit="card")):
        for seed, file in sorted(seeds.items()):
            bar.set_description(file.stem)
            configs = [folder / file.stem / "config.json" for folder in (args.models, args.output)]
            config = next((path for path in configs if path.is_file()), None)
            if config:
                write(config, [file, file.with_name(f"{task}-dense-1-{seed}.json")], args.output / file.stem)
                break
        else:
            tqdm.write(f"{file.stem} has no card: its model is not in {args.models}.")


def write(config, results, place):
    """The card of one model, next to its plot and config."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as new:
        for file in (config, *CODE.glob("[!_]*.py")):  # with the code as it is now
            shutil.copy(file, new)
        evaluation = read_results(results, json.loads(config.read_text())["token_pruning"].get("method"))
        repo_id = f"user/{BASE.rpartition('/')[2]}-{place.name}"
        write_card(new, evaluation, base_model=BASE, license=LICENSE, plot=True, repo_id=repo_id)
        for name in ("README.md", "config.json", "tokens_per_layer.png"):
            if (Path(new) / name).exists():
                write_file(place / name, (Path(new) / name).read_bytes())


if __name__ == "__main__":
    main()
