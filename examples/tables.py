"""Fill the tables of README.md from the measured numbers in results/*.json and the table of tests: `python examples/tables.py`."""

import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def markdown(rows):
    """A Markdown table from rows of cells, the first being the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def demo(report):
    """The table that `examples/demo.py` prints."""
    one, many = report["bench"]["results"]
    macs, accuracy = many["macs"], report["accuracy"]
    names = ("dense", "packed_dense", "pruned")
    rows = [["", "dense, as transformers runs it", "dense, packed", "pruned"]]
    rows.append(["accuracy, %", *(f"{100 * accuracy[key]:.2f}" for key in ("dense", "dense", "pruned"))])
    rows.append(["MACs per text, millions", *(f"{macs[name] / 1e6:.0f}" for name in names)])
    rows.append(["reduction, true length", *(f"{macs['dense'] / macs[name]:.2f} x" for name in names)])
    rows.append(["reduction, padded", *(f"{macs['dense_padded'] / macs[name]:.2f} x" for name in names)])
    for size, entry in ((1, one), (32, many)):
        ms = {"dense": entry["ms"]["hf_padded"], **{name: entry["ms"][name] for name in names[1:]}}
        rows.append([f"ms per text, batch {size}", *(f"{ms[name]:.2f}" for name in names)])
        rows.append([f"speed-up, batch {size}", *(f"{ms['dense'] / ms[name]:.2f} x" for name in names)])
    return markdown(rows)


def speed(report):
    """What `examples/speed.py` measured, importance being learned as it is by default."""
    rows = [
        [
            "model, head",
            "padded / real tokens",
            "packed against transformers",
            "MACs saved by dropping",
            "time saved by dropping",
            "the same at batch 1",
        ]
    ]
    for row in (row for row in report["inference"] if row["importance"] == "learned"):
        rows.append(
            [
                f"{row['shape']}, {row['head']} classification",
                f"{row['padded_over_real']:.2f}",
                f"{row['packing_speedup']:.2f} x",
                f"{row['macs_saved_by_dropping']:.2f} x",
                f"{row['dropping_speedup']:.2f} x",
                f"{row['batch_1_dropping_speedup']:.2f} x",
            ]
        )
    return markdown(rows)


def speed_gpu(report, slower):
    """What `examples/speed_gpu.py` measured; on a slower host, too."""
    head = ["model, sites", "padded / real tokens", "packed against transformers", "MACs saved by dropping"]
    rows = [[*head, "time saved by dropping", "on a host half as fast"]]
    again = {(row["shape"], row["head"], row["sites"]): f"{row['dropping_speedup']:.2f} x" for row in slower["rows"]}
    for row in report["rows"]:
        saved = [f"{row[name]:.2f} x" for name in ("packing_speedup", "macs_saved_by_dropping", "dropping_speedup")]
        what = f"{row['shape']}, {row['sites']} sites" + (", a label per token" if row["head"] == "token" else "")
        key = row["shape"], row["head"], row["sites"]
        rows.append([what, f"{row['padded_over_real']:.2f}", *saved, again.get(key, "")])
    return markdown(rows)


def cutting(report):
    """What `examples/speed.py --parts cutting` measured."""
    rows = [["model", "MACs saved by cutting", "batch 32, against packed dense", "batch 1, against transformers"]]
    for row in report["cutting"]:
        saved, faster, alone = row["macs_saved_by_cutting"], row["cutting_speedup"], row["batch_1_over_hf"]
        rows.append([row["shape"], f"{saved:.2f} x", f"{faster:.2f} x", f"{alone:.2f} x"])
    return markdown(rows)


def ddp(report):
    """What `examples/throughput.py` measured, in a sentence."""
    found = []
    for name, row in report["results"].items():
        low, high = report["lengths"][name]
        lengths = f"{low} tokens each" if low == high else f"{low} to {high} tokens"
        found.append(f"{row['with_over_without']:.2f} times on texts of {lengths}")
    return f"the steps per second that they make without it: {', '.join(found)}."


HEADS = {  # columns of README's table, by the endings of class names
    "base": ("Model", "VisionModel"),
    "sequence": ("ForSequenceClassification",),
    "tokens": ("ForTokenClassification",),
    "question": ("ForQuestionAnswering",),
    "masked LM": ("ForMaskedLM",),
    "choice": ("ForMultipleChoice",),
    "next sentence": ("ForNextSentencePrediction",),
    "image": ("ForImageClassification", "ForImageClassificationWithTeacher"),
}


def families():
    """Families and heads that the tests hold every promise to; a row for those that are alike."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    alike = {}
    for row in FAMILIES.values():
        marks = ["✓" if set(row.heads) & set(endings) else "" for endings in HEADS.values()]
        cut = ("all" if row.hidden else "all but hidden units") if row.weights else "none"
        alike.setdefault((*marks, cut), []).append(f"{row.stem} (`{row.config.model_type}`)")
    rows = [["families", *HEADS, "weights that can be cut"]]
    rows += [[", ".join(names), *marks] for marks, names in alike.items()]
    return markdown(rows)


def methods():
    """Every method by its class, its name for the command line, what it says of itself, and its papers."""
    from hf_tokenprune.methods import METHODS

    rows = [["method", "`--method`", "what it does", "paper"]]
    for kind in METHODS:
        says = " ".join(inspect.getdoc(kind).split("\n\n")[0].split())
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in kind.papers)
        rows.append([f"`{kind.__name__}`", f"`{kind.option}`", says.rstrip("."), papers])
    return markdown(rows)


def benchmark():
    """The overview of `examples/benchmark`."""
    sys.path.insert(0, str(ROOT / "examples" / "benchmark"))
    import report

    return report.overview(report.load(ROOT / "results" / "benchmark"), report.MAIN)


def read(name):
    """The measured numbers of that name."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


TABLES = {
    "demo": lambda: demo(read("demo")),
    "speed": lambda: speed(read("speed")),
    "speed-gpu": lambda: speed_gpu(read("speed-gpu"), read("speed-gpu-slow-host")),
    "ddp": lambda: ddp(read("ddp")),
    "cutting": lambda: cutting(read("speed")),
    "benchmark": benchmark,
    "methods": methods,
    "families": families,
}


def put(text, name, table):
    """A text with its block `<!-- table:NAME -->` made anew, where it has one."""
    return re.sub(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)


def fill(text):
    """README's text with every table made anew from what lies in results/."""
    for name, table in TABLES.items():
        text = put(text, name, table())
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
