"""Model cards of the models that `run.py` trained, as `hf-tokenprune push` would publish them: `python examples/benchmark/cards.py`.

Writes a folder per model to model_cards/: the card, its plot, and the config with what was dropped and cut; no weights. A config that
lies there already will do where the model itself is gone.
"""

import argparse
import json
import shutil
import tempfile
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
    results = [file for file in sorted(args.results.glob("*.json")) if not file.name.startswith("dense-")]
    for result in (bar := tqdm(results, unit="card")):
        bar.set_description(result.stem)
        run = json.loads(result.read_text())
        if run["method"] in UNPRUNED:
            continue
        configs = [folder / result.stem / "config.json" for folder in (args.models, args.output)]
        config = next((file for file in configs if file.is_file()), None)
        if config is None:
            tqdm.write(f"{result.stem} has no card: its model is not in {args.models}.")
            continue
        write(config, [result, result.with_name(f"{run['task']}-dense-1-{run['seed']}.json")], args.output / result.stem)


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
