"""The plots of a report, drawn by matplotlib: in the page as SVG that follows its colours, and as files of their own."""

import io
import re
from collections import defaultdict
from html import escape
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConfigError
from .history import SHARES
from .shades import shades

INK = "#010203"  # what the page replaces by its own colour of text
MODEL, DENSE = "#d9660a", "#8a8f98"
LINES = ("#d9660a", "#2f7fc1", "#3a9e5c", "#9467bd", "#c2477f", "#8c6d31", "#17a2b8")
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from outside
}
SIZE = (4.5, 2.9)


def check_matplotlib() -> None:
    """Raise `ConfigError` if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError('A report draws with matplotlib: pip install "hf_tokenprune[plots]"')


def plots(report) -> dict[str, tuple[str, object]]:
    """What there is to draw: `{name: (what it shows, a function that draws it on a matplotlib figure)}`."""
    found = {
        "tokens": ("Tokens that leave each layer, per sample", _tokens),
        "macs": ("MACs of each layer, per sample", _macs),
        "milliseconds": ("Milliseconds of each layer, per sample", _milliseconds),
    }
    if report.was_cut:
        found["weights"] = ("Attention heads and FFN units left in each layer", _weights)
    if any(name in entry for entry in report.log for name in SHARES):
        found["budget"] = ("MACs over training, as a share of the dense model's", _budget)
    if any(name.startswith("tokens_after_") for entry in report.log for name in entry):
        found["training"] = ("Tokens that leave each layer over training, as a share", _training)
    for task in dict.fromkeys(run["task"] for run in report.runs):
        found[f"score-{task}"] = (
            f"{task}: score against MACs reduction",
            lambda report, axes, task=task: _score(report, axes, task),
        )
    return found


def inline(report) -> dict[str, tuple[str, str]]:
    """`{name: (what it shows, <svg>)}`, in the colours of the page that it is put in."""
    found = {}
    for name, (title, draw) in plots(report).items():
        text = _drawn(report, draw, INK, name, format="svg", transparent=True).decode()
        text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
        text = re.sub(r'<g id="[^"]*">', "<g>", text)  # these would not be unique on the page; nobody refers to them
        text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text))
        text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
        found[name] = (title, text.replace(INK, "currentColor"))
    return found


def save_plots(report, folder: Path) -> list[Path]:
    """Write each plot as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (title, draw) in plots(report).items():
        stem = re.sub(r"[^\w.+-]", "_", name)
        for kind in ("png", "svg"):
            files.append(folder / f"{stem}.{kind}")
            files[-1].write_bytes(_drawn(report, draw, "#222222", name, title=title, format=kind, dpi=150))
    return files


def _drawn(report, draw, ink, salt, title=None, **saved):
    import matplotlib
    from matplotlib.figure import Figure

    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), ink)
    with matplotlib.rc_context({**STYLE, **inks, "svg.hashsalt": salt}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(report, axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside upper center", ncols=4)
        axes.grid(alpha=0.12)
        axes.set_axisbelow(True)
        if title is not None:
            axes.set_title(title, fontsize="medium")
        file = io.BytesIO()
        figure.savefig(file, **saved)
    return file.getvalue()


def _whole(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _bars(axes, report, of, unit):
    """The dense model's and the model's layers side by side; layers without an origin stand in their own order."""
    dense, mine = of(report.dense), of(report.model)
    places = report.origins or range(len(mine))
    if report.pruned or report.was_cut:
        axes.bar([place - 0.2 for place in range(len(dense))], dense, 0.4, color=DENSE, label="dense, packed")
        axes.bar([place + 0.2 for place in places], mine, 0.4, color=MODEL, hatch="//", edgecolor="white", label="this model")
    else:
        axes.bar(range(len(mine)), mine, 0.6, color=MODEL)
    axes.set(xlabel="layer", ylabel=unit)
    _whole(axes.xaxis)


def _tokens(report, axes):
    left = [report.cost.tokens, *report.cost.tokens_per_layer]
    colours = [background for background, _ in shades(len(left))][1:]
    names = range(len(left) - 1)
    axes.bar(names, left[1:], 0.7, color=colours, edgecolor=DENSE, linewidth=0.5)
    axes.axhline(left[0], color=DENSE, linestyle="--", linewidth=1)
    axes.annotate(
        f"{left[0]:.1f} in the texts" if report.max_length else f"{left[0]:.0f} in the images",
        (len(names) - 0.6, left[0]),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
    )
    for place, value in zip(names, left[1:], strict=True):
        axes.annotate(f"{value:.1f}", (place, value), ha="center", va="bottom")
    axes.set(xlabel="layer", ylabel="tokens", ylim=(0, 1.15 * left[0]))
    _whole(axes.xaxis)


def _macs(report, axes):
    _bars(axes, report, lambda contender: [macs / 1e6 for macs in contender.macs], "million MACs")


def _milliseconds(report, axes):
    _bars(axes, report, lambda contender: contender.ms, "ms")


def _weights(report, axes):
    places = report.origins or range(len(report.model.heads))
    for shift, name, colour, hatch in ((-0.2, "heads", LINES[1], ""), (0.2, "units", LINES[2], "..")):
        before = getattr(report.dense, name)
        share = [100 * n / before[p] for p, n in zip(places, getattr(report.model, name), strict=True)]
        label = {"heads": "attention heads", "units": "FFN units"}[name]
        axes.bar([place + shift for place in places], share, 0.4, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.axhline(
        100 * report.model.hidden / report.dense.hidden, color=DENSE, linestyle="--", linewidth=1, label="hidden units"
    )
    axes.set(xlabel="layer", ylabel="left, %", ylim=(0, 119))
    _whole(axes.xaxis)


def _budget(report, axes):
    looks = {
        "macs_target": (DENSE, "--", "target"),
        "macs_expected": (LINES[1], ":", "of the gates"),
        "macs_realised": (MODEL, "-", "spent"),
    }
    for name, (colour, style, label) in looks.items():
        points = [(entry["step"], entry[name]) for entry in report.log if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set(xlabel="step", ylabel="share of dense MACs", ylim=(0, None))


def _training(report, axes):
    names = sorted(
        {name for entry in report.log for name in entry if name.startswith("tokens_after_")},
        key=lambda n: int(n.rpartition("_")[2]),
    )
    for number, name in enumerate(names):
        points = [(entry["step"], entry[name]) for entry in report.log if name in entry]
        look = {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
        axes.plot(
            *zip(*points, strict=True),
            linewidth=1.4,
            markersize=3,
            markevery=0.1,
            label=f"layer {name.rpartition('_')[2]}",
            **look,
        )
    axes.set(xlabel="step", ylabel="share of the tokens", ylim=(0, 1.05))


def _score(report, axes, task):
    lines = defaultdict(list)
    runs = [run for run in report.runs if run["task"] == task]
    for run in runs:
        lines[run["method"]].append((run["reduction"]["true_length"], 100 * run["score"]))
    number = 0
    for method, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        if method == "dense":
            axes.axhline(sum(y) / len(y), color=DENSE, linestyle="--", linewidth=1, label="dense")
            continue
        axes.plot(
            x,
            y,
            color=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            label=method,
        )
        number += 1
    axes.set(xlabel="MACs reduction, true length (x)", ylabel=f"{runs[0]['metric']} x 100")
    axes.set_xlim(1, 1.15 * max(x for points in lines.values() for x, _ in points))
