"""Fill the tables of README.md from the measured numbers in results/*.json and the table of tests: `python examples/tables.py`."""

import inspect
import json
import re
import sys
from pathlib import Path

from hf_tokenprune.results import told_busy

ROOT = Path(__file__).resolve().parent.parent


def markdown(rows):
    """A Markdown table from rows of cells, the first being the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine(benches):
    """Where these measurements by `bench` were made, as a sentence."""

    def each(say):
        return " or ".join(dict.fromkeys(say(bench) for bench in benches))

    where = each(lambda bench: f"{bench['gpu']} (host: {bench['cpu']})" if bench["gpu"] else bench["cpu"])
    threads = each(lambda bench: f"{bench['threads']} thread{'s' * (bench['threads'] != 1)}")
    dtype, texts = each(lambda bench: bench["dtype"]), each(lambda bench: str(bench["texts"]))
    load = " to ".join(dict.fromkeys(f"{end([bench['load_average'] for bench in benches]):.1f}" for end in (min, max)))
    versions = each(lambda bench: ", ".join(f"{name} {version}" for name, version in bench["versions"].items()))
    busy = told_busy(max(bench["load_average"] or 0 for bench in benches))
    return f"{where}, {threads}, {dtype}, {texts} texts, load {load}; {versions}. {busy}".rstrip()


def demo_rows(report):
    """Cells of the table that `examples/demo.py` prints; each column is of one way to run."""
    results = report["bench"]["results"]
    macs, accuracy, size = results[-1]["macs"], report["accuracy"], results[-1]["batch_size"]
    names = ("hf_padded", "hf_sorted", "packed_dense", "pruned")
    rows = [["", "dense, as transformers runs it", "the same on sorted texts", "dense, packed", "pruned"]]
    rows.append(["accuracy, %", *(f"{100 * accuracy[key]:.2f}" for key in ("dense", "dense", "dense", "pruned"))])
    rows.append([f"MACs per text, batch {size}, millions", *(f"{macs[name] / 1e6:.0f}" for name in names)])
    rows.append(["reduction, true length", *(f"{macs['dense'] / macs[name]:.2f} x" for name in names)])
    rows.append(["reduction, padded", *(f"{macs['dense_padded'] / macs[name]:.2f} x" for name in names)])
    for size, ms in ((entry["batch_size"], entry["ms"]) for entry in results):
        rows.append([f"ms per text, batch {size}", *(f"{ms[name]:.2f}" for name in names)])
        rows.append([f"speed-up, batch {size}", *(f"{ms['hf_padded'] / ms[name]:.2f} x" for name in names)])
    return rows


def demo(report):
    """What `examples/demo.py` prints."""
    return f"{markdown(demo_rows(report))}\n\nMeasured on: {machine([report['bench']])}"


PACKED = ["model", "padded / real tokens", "packed against transformers", "against transformers on sorted texts"]


def packed(what, row, ms):
    """Cells of a row, below `PACKED`."""
    faster = ms["hf_sorted"] / ms["packed_dense"]
    return [what, f"{row['padded_over_real']:.2f}", f"{row['packing_speedup']:.2f} x", f"{faster:.2f} x"]


def speed(report):
    """What `examples/speed.py` measured, importance being learned as it is by default."""
    rows = [[*PACKED, "MACs saved by dropping", "time saved by dropping", "the same at batch 1"]]
    found = [row for row in report["inference"] if row["importance"] == "learned"]
    for row in found:
        what, ms = f"{row['shape']}, {row['head']} classification", row["bench"]["results"][-1]["ms"]
        saved = [f"{row[name]:.2f} x" for name in ("macs_saved_by_dropping", "dropping_speedup", "batch_1_dropping_speedup")]
        rows.append([*packed(what, row, ms), *saved])
    how = "Random weights, a learned importance, shares of tokens set by hand (`KEEPS`)"
    return f"{markdown(rows)}\n\n{how}. Measured on: {machine([row['bench'] for row in found])}"


def speed_gpu(report, slower):
    """What `examples/speed_gpu.py` measured; on a slower host, too."""
    rows = [[*PACKED, "MACs saved by dropping", "time saved by dropping", "on a slower host"]]
    again = {(row["shape"], row["head"], row["sites"]): f"{row['dropping_speedup']:.2f} x" for row in slower["rows"]}
    for row in report["rows"]:
        saved = [f"{row[name]:.2f} x" for name in ("macs_saved_by_dropping", "dropping_speedup")]
        what = f"{row['shape']}, {row['sites']} sites" + (", a label per token" if row["head"] == "token" else "")
        key = row["shape"], row["head"], row["sites"]
        rows.append([*packed(what, row, row["bench"]["ms"]), *saved, again.get(key, "")])
    how = "Random weights, importance is the attention received, shares of tokens set by hand (`SITES`)"
    here, there = (machine([row["bench"] for row in rows["rows"]]) for rows in (report, slower))
    return f"{markdown(rows)}\n\n{how}. Measured on: {here} The last column: {there}"


def cutting(report):
    """What `examples/speed.py --parts cutting` measured."""
    rows = [["model", "MACs saved by cutting", "batch 32, against packed dense", "batch 1, against transformers"]]
    for row in report["cutting"]:
        saved, faster, alone = row["macs_saved_by_cutting"], row["cutting_speedup"], row["batch_1_over_hf"]
        rows.append([row["shape"], f"{saved:.2f} x", f"{faster:.2f} x", f"{alone:.2f} x"])
    return f"{markdown(rows)}\n\nRandom weights. Measured on: {machine([row['bench'] for row in report['cutting']])}"


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


def benchmark(name):
    """A table of `examples/benchmark/report.py`, of the main methods."""
    sys.path.insert(0, str(ROOT / "examples" / "benchmark"))
    import report

    return getattr(report, name)(report.load(ROOT / "results" / "benchmark"), report.MAIN)


def read(name):
    """The measured numbers of that name."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


TABLES = {
    "demo": lambda: demo(read("demo")),
    "speed": lambda: speed(read("speed")),
    "speed-gpu": lambda: speed_gpu(read("speed-gpu"), read("speed-gpu-slow-host")),
    "ddp": lambda: ddp(read("ddp")),
    "cutting": lambda: cutting(read("speed")),
    "benchmark": lambda: benchmark("overview"),
    "control": lambda: benchmark("control"),
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
