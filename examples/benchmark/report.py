"""Tables and plots from the JSON files of `run.py`: `python examples/benchmark/report.py`.

Writes a page with a plot per task to model_cards/, and one over all tasks; and the main methods' part of that to README.md, where it
has `<!-- table:benchmark -->` or `<!-- table:control -->` and `<!-- end -->`.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from files import UNPRUNED, write_text

from hf_tokenprune.results import BUSY

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tables import markdown, put

NAMES = {"map": "MAP", "mrr": "MRR", "f1": "F1", "exact_match": "exact match", "pearson": "Pearson", "spearman": "Spearman"}
TITLES = {
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "wikiqa": "WikiQA",
    "sst2": "SST-2",
    "20newsgroups": "20 Newsgroups",
    "squad": "SQuAD v1.1",
}

MAIN = {"top": "ToP", "structured": "StructuredPruning", "structured+top": "Compose", "infor-coef": "InforCoef"}
TOKENS = ("topk", "topk-trained", "top-paper", "top-ranking", "top-attention", "top-lagrangian", "top-alone", "top")
PRUNED = (*TOKENS, "structured", "structured+top", "infor-coef")
BOTH = ("structured+top", "infor-coef")  # these drop tokens and cut weights
COLOURS = dict(zip(MAIN, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))  # baselines and variants are grey
MARKERS = dict(zip(PRUNED, "^vsPXd*oooo", strict=True))
ORDER = (*UNPRUNED, *PRUNED)
MEANS = (  # over tasks: at a method's first target that lies between two
    ("mean difference from dense, each task at the method's smallest target", 1, float("inf")),
    ("the same, each task at 2.4 or 3.0 x", 2.3, 3.1),
)
SAME = ("data", "split", "rows", "limited")


def load(folder):
    """All runs in a folder. Seeds of one method must have been run with the same settings on the same data: they are averaged; and
    each beside the dense model that it began from."""
    runs = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json")) if not file.name.startswith("dense-")]
    known, dense = {}, {(run["task"], run["seed"]): run.get("dense_model") for run in runs if run["method"] == "dense"}
    for run in runs:
        name = f"{run['task']}, {run['method']} {run['budget']:g}"
        training = {**(run.get("training") or {}), "seconds": None, "log": None}
        alike = settings({**(run.get("settings") or {}), "training": training, "train_rows": run.get("train_rows")})
        for what, value in [*alike, *((what, run.get(what)) for what in SAME)]:
            first = known.setdefault((run["task"], run["method"], run["budget"], what), (value, run["seed"]))
            if value != first[0]:
                raise SystemExit(
                    f"{name}: {what} is {first[0]!r} in seed {first[1]} and {value!r} in seed {run['seed']}. Such scores cannot be "
                    f"averaged: remove the runs of one kind from {folder}."
                )
        if (run["task"], run["seed"]) not in dense:
            raise SystemExit(
                f"{name}, seed {run['seed']}: {folder} has no run of the dense model of that seed: --methods dense."
            )
        began, now = run.get("dense_model"), dense[run["task"], run["seed"]]
        if began and began != now:  # runs of before models were told apart are taken at their word
            raise SystemExit(
                f"{name}, seed {run['seed']}: it began from the dense model {began}, and the dense run of that seed in {folder} is "
                f"of {now or 'one that it does not name'}. Remove one of them."
            )
    return runs


def settings(given, path=""):
    """Names and values of all settings that are known; what was left open (None) may have become anything."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from settings(value, f"{path}{name}.")
        elif value is not None and name != "teacher":
            yield path + name, value


def by_task(runs):
    """`{task: {(method, budget): runs of all seeds}}`, tasks and methods in their usual order."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["task"]][run["method"], run["budget"]].append(run)
    place = list(TITLES)
    tasks = sorted(found, key=lambda name: (place.index(name) if name in place else len(place), name))
    return {task: dict(sorted(found[task].items(), key=lambda item: (ORDER.index(item[0][0]), -item[0][1]))) for task in tasks}


def mean(runs, *path):
    """The mean over runs of the value at a path of keys."""
    values = []
    for value in runs:
        for key in path:
            value = value[key]
        values.append(value)
    return statistics.fmean(values)


def percent(runs, *path):
    """`82.1`, or `82.1 ± 0.4` (standard deviation) over several seeds."""
    scores = [100 * mean([run], *path) for run in runs]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{spread}"


def what(groups):
    """The data behind the numbers of a task, with every limit."""
    runs = [run for group in groups.values() for run in group]
    first = runs[0]
    rows = f"{first['rows']:,} of {first['split']}" if first["limited"]["report"] else first["split"]
    trained = [run.get("train_rows") or (run.get("training") or {}).get("train_rows") for run in runs]
    trained = " or ".join(f"{number:,}" for number in sorted({number for number in trained if number}))
    return f"{NAMES.get(first['metric'], first['metric'])}, {rows}" + (f", {trained} to train on" if trained else "")


def overview(runs, columns=None):
    """A row per task and budget, a column per method: points against the dense models of the same seeds, and the MACs reduction on
    true lengths that was really reached.

    The last rows are means over tasks, each at a method's smallest target or at one near 2.4 or 3.

    Args:
        runs: what `load` gives.
        columns: `{method: title}`; by default all methods, by their own names.
    """
    columns = {name: name for name in PRUNED} if columns is None else columns
    columns = {name: title for name, title in columns.items() if any(run["method"] == name for run in runs)}
    methods = list(columns)
    rows = [["task", "dense", "trained on", "target", *columns.values()]]
    for task, groups in by_task(runs).items():
        dense = groups["dense", 1.0]
        longer = groups.get(("dense-longer", 1.0), [])
        first = [f"{TITLES.get(task, task)} ({what(groups)})", percent(dense, "score"), spread(differences(longer, dense))]
        for budget in sorted({budget for name, budget in groups if name in methods}, reverse=True):
            cells = [cell(groups.get((method, budget)), dense) for method in methods]
            rows.append([*first, f"{1 / budget:.1f} x", *cells])
            first = [""] * 3
    for title, *targets in MEANS:
        rows.append([title, "", "", "", *(over_tasks(runs, name, *targets) for name in methods)])
    return markdown(rows)


def cell(runs, dense):
    """`-0.7 ± 1.4 (2.4 x)`, or `... (2.4 x, 2.3 x by weights)`."""
    if not runs:
        return ""
    both = all(run["method"] in BOTH for run in runs)
    alone = f", {mean(runs, 'reduction', 'by_weights'):.1f} x by weights" if both else ""
    return f"{spread(differences(runs, dense))} ({mean(runs, 'reduction', 'true_length'):.1f} x{alone})"


def differences(runs, others):
    """By how many points runs are above or below others, dense ones mostly, of the same task: seed by seed, where both have it."""
    scores = {other["seed"]: other["score"] for other in others}
    return [100 * (run["score"] - scores[run["seed"]]) for run in runs if run["seed"] in scores]


def spread(points):
    """`-0.7 ± 1.4`: the mean, and the standard deviation where there are several; nothing of nothing."""
    if not points:
        return ""
    return signed(statistics.fmean(points)) + (f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else "")


def over_tasks(runs, method, least, most):
    """`-1.2 (2.53 x, 4 of 6 tasks)`: what a method costs on average at its first target of each task between these two."""
    lost, reductions, tasks = [], [], by_task(runs)
    for groups in tasks.values():
        budgets = [budget for name, budget in groups if name == method and least <= 1 / budget <= most]
        if budgets:
            group = groups[method, max(budgets)]
            lost.append(statistics.fmean(differences(group, groups["dense", 1.0])))
            reductions.append(mean(group, "reduction", "true_length"))
    if not lost:
        return ""
    some = f", {len(lost)} of {len(tasks)} tasks" if len(lost) < len(tasks) else ""
    return f"{signed(statistics.fmean(lost))} ({statistics.fmean(reductions):.2f} x{some})"


def control(runs, columns=None):
    """A row per task and budget, a column per method: how its score differs from the control's, where they share seeds."""
    columns = {name: name for name in PRUNED} if columns is None else columns
    found = defaultdict(dict)
    for task, groups in by_task(runs).items():
        longer = groups.get(("dense-longer", 1.0), [])
        title = f"{TITLES.get(task, task)} ({epochs(longer)} epochs)"
        for (method, budget), group in sorted(groups.items(), key=lambda item: -item[0][1]):
            if method in columns and differences(group, longer):
                found[title, f"{1 / budget:.1f} x"][method] = beyond(group, longer)
    if not found:
        return ""
    columns = {name: title for name, title in columns.items() if any(name in cells for cells in found.values())}
    rows = [[*key, *(cells.get(name, "") for name in columns)] for key, cells in found.items()]
    said = "Points above or below the control: the same seeds' dense models, trained on for the epochs in brackets, nothing pruned."
    return f"{said}\n\n{markdown([['task', 'target', *columns.values()], *rows])}"


def beyond(runs, longer):
    """`-0.5 ± 0.2`, or `... (5 epochs)`: by how much runs differ from those of the control; and their epochs, if other."""
    trained = f" ({epochs(runs)} epochs)" if epochs(runs) not in ("", epochs(longer)) else ""
    return f"{spread(differences(runs, longer))}{trained}"


def epochs(runs):
    """How long runs were trained, `3`; nothing where they were not."""
    number = (runs[0].get("training") or {}).get("epochs") if runs else None
    return f"{number:g}" if number else ""


def signed(points):
    """`+0.3`, `-1.2`, or `0.0`."""
    points = round(points, 1)
    return f"{points:+.1f}" if points else "0.0"


COLUMNS = """All are of all-MiniLM-L6-v2 (6 layers, 384 wide). Each method starts from the same dense model, also its teacher:
fine-tuned for 2 to 4 epochs with the learning rate and of the epoch that were best on held-out data (two rates were tried for MRPC
and STS-B, one elsewhere). A method trains on for 2 to 5 more epochs. "dense" is a score, in percent; all else are points above or
below the dense models of the same seeds: the mean of these differences ± their standard deviation over seeds; without it there is
one seed. "trained on" is what more epochs give by themselves: as `structured`, with nothing cut. "target" is the reduction of MACs
asked for; in brackets the one reached, on the real tokens, and "by weights" what it would be if no token were dropped (a dense model
has about 1.1 x once it is packed: where the head reads one token, its last layer computes no more). Blank: not measured. In the last
rows a method that was not measured on all tasks says on how many. The pages of the tasks have the scores themselves.

* `topk` keeps the same share of the tokens in every layer but the first, without training; `topk-trained` trains the weights with
  that selection, taught by the teacher's logits alone (the methods are taught by its hidden states, too).
* `top` is ToP as it is by default: importance is learned, from a token and its neighbours. `top-alone` learns it from each token
  alone. `top-attention` takes the attention that tokens receive, as the paper does; `top-ranking` distils its ranking besides;
  `top-lagrangian` is the default with the paper's way to hold the budget; `top-paper` is the paper's in all that ToP lets one choose.
* `structured` is StructuredPruning, `structured+top` Compose of both, `infor-coef` InforCoef.

Seeds 5 to 7 were run on a GPU, the others mostly on CPUs; machines round differently, so the dense model of a seed is not the same
on all. Runs of seeds 5 to 7 name the dense model that they began from; of the others some, older ones, do not, and stand beside the
dense run of their seed. Measured with older code: `top` on 20 Newsgroups and `top-alone`, before importance was taught what later
layers hang on and sites shared the budget out by what they are worth; seeds 0 and 1 of SQuAD, before padding left its softmax,
which changed nothing that could be measured ([`results/choices`](../results/choices)). SQuAD is trained on the questions about 44
articles."""


def index(runs):
    """The page over all tasks, as Markdown."""
    pages = [f"* [{TITLES.get(task, task)}]({task}.md)" for task in by_task(runs)]
    return "\n\n".join(["# Results", COLUMNS, overview(runs), control(runs), "\n".join(pages)]) + "\n"


def page(task, groups):
    """Everything about one task, as Markdown."""
    first = next(iter(groups.values()))[0]
    others = [name for name in first["scores"] if name != first["metric"]]
    score = NAMES.get(first["metric"], first["metric"])
    head = ["method", "target", score, "against dense", *(NAMES.get(name, name) for name in others)]
    head += ["reduction, true length", "reduction, padded", "speed-up, batch 1", "speed-up, batch 32", "epochs", "seeds"]
    rows, dense = [head], groups["dense", 1.0]
    for (method, budget), runs in groups.items():
        against = "" if method == "dense" else spread(differences(runs, dense))
        cells = [method, f"{1 / budget:.1f} x", percent(runs, "score"), against]
        cells += [percent(runs, "scores", name) for name in others]
        cells += [f"{mean(runs, 'reduction', kind):.2f} x" for kind in ("true_length", "padded")]
        rows.append([*cells, *(speedup(runs, size) for size in ("1", "32")), epochs(runs), str(len(runs))])
    text = [
        f"# {TITLES.get(task, task)}",
        f"{what(groups)[0].upper()}{what(groups)[1:]}. Texts have {first['tokens']:.0f} tokens on average; the padded reduction "
        f"counts the dense model on {first['max_length']}. Speed-ups are against the dense model as transformers runs it, with "
        "padding; they are left out where the machine was busy with other work. `dense` runs packed, and computes the last layer for "
        "one token alone where its head reads no more.",
        f"![Score against reduction]({task}.png)",
        markdown(rows),
    ]
    return "\n\n".join(text) + "\n"


def speedup(runs, size):
    """How many times faster than the dense model, where that was measured on a machine that did little else."""
    times = [run["time"] for run in runs if run.get("time")]
    times = [
        time["ms"][size] for time in times if size in time["ms"] and (time.get("bench", {}).get("load_average") or 0) <= BUSY
    ]
    return f"{statistics.fmean(ms['dense'] / ms['pruned'] for ms in times):.2f} x" if times else ""


def plot(task, groups, file):
    """Score against MACs reduction on true lengths: a line per method, the dense score as a horizontal one.

    Runs are compared with the dense model of their seed, so that methods that have not the same seeds stand beside each other as they
    should. They are moved aside a little."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit('Plots need matplotlib: pip install "hf_tokenprune[plots]"') from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    lines, dense = defaultdict(list), groups["dense", 1.0]
    level = 100 * mean(dense, "score")
    for (method, _), runs in groups.items():
        points = differences(runs, dense)
        deviation = statistics.stdev(points) if len(points) > 1 else 0.0
        lines[method].append((mean(runs, "reduction", "true_length"), level + statistics.fmean(points), deviation))
    for number, (method, points) in enumerate(lines.items()):
        x, y, bars = zip(*sorted(points), strict=True)
        if method in UNPRUNED:
            style = dict(zip(UNPRUNED, ("--", ":"), strict=True))[method]
            axes.axhline(y[0], color="black", linestyle=style, linewidth=1, label=method)
        else:
            aside = [value + 0.02 * (number - len(lines) / 2) for value in x]  # or bars would hide each other
            axes.errorbar(
                aside, y, yerr=bars, label=method, color=COLOURS.get(method, "grey"), marker=MARKERS[method], markersize=5,
                linewidth=1.2, capsize=2, zorder=3 if method in COLOURS else 2,
            )  # fmt: skip
    axes.set(title=f"{TITLES.get(task, task)}", xlabel="MACs reduction, true length (x)", ylabel=what(groups))
    axes.set_xlim(1, 1.2 * max(x for points in lines.values() for x, *_ in points))
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})  # the same numbers make the same file


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/benchmark"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--cards", type=Path, default=Path("model_cards"))
    parser.add_argument("--no-plots", action="store_true")
    args = parser.parse_args(arguments)
    runs = load(args.results)
    if not runs:
        raise SystemExit(f"There are no results in {args.results}; make some with run.py.")
    text = put(args.readme.read_text(), "benchmark", overview(runs, MAIN))
    write_text(args.readme, put(text, "control", control(runs, MAIN)))
    write_text(args.cards / "README.md", index(runs))
    for task, groups in by_task(runs).items():
        write_text(args.cards / f"{task}.md", page(task, groups))
        if not args.no_plots:
            plot(task, groups, args.cards / f"{task}.png")
    print(overview(runs))


if __name__ == "__main__":
    main()
