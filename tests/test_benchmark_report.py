"""The benchmark's report: what is averaged and compared with what, and what is refused."""

import pytest
import torch
from test_benchmark import loaded
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import hf_tokenprune as tp
from hf_tokenprune.surgery import operate


@pytest.fixture(scope="module")
def bench():
    with loaded() as found:
        yield found


def made(task, method, budget, seed, score):
    return {
        "task": task, "method": method, "budget": budget, "seed": seed, "split": "test", "rows": 1725, "metric": "accuracy",
        "train_rows": 2500, "limited": {"train": 2500, "report": None}, "data": "Hub", "dense_model": f"{task}-{seed}",
        "score": score, "scores": {"accuracy": score, "f1": score}, "tokens": 40.0,
        "reduction": {"true_length": 1 / budget, "padded": 3 / budget, "by_weights": 1.1}, "max_length": 128,
        "time": {"ms": {size: {"dense": 9.0, "dense_packed": 6.0, "pruned": 3.0} for size in ("1", "32")}},
    }  # fmt: skip


@pytest.fixture
def runs():
    pruned = [made("mrpc", "top", budget, seed, 0.8 + seed / 100) for budget in (0.5, 0.4) for seed in (0, 1)]
    dense = [made("mrpc", "dense", 1.0, seed, 0.85 + seed / 50) for seed in (0, 1)]
    return [*pruned, *dense, made("mrpc", "topk", 0.5, 0, 0.7)]


def test_overview(bench, runs):
    runs.append(made("mrpc", "dense-longer", 1.0, 1, 0.88))
    assert bench.report.overview(runs).splitlines() == [
        "| task | dense | trained on | target | topk | top |",
        "|---|---|---|---|---|---|",
        "| MRPC (accuracy, test, 2,500 to train on) | 86.0 ± 1.4 | +1.0 | 2.0 x | -15.0 (2.0 x) | -5.5 ± 0.7 (2.0 x) |",
        "|  |  |  | 2.5 x |  | -5.5 ± 0.7 (2.5 x) |",
        "| mean difference from dense, each task at the method's smallest target |  |  |  | -15.0 (2.00 x) | -5.5 (2.00 x) |",
        "| the same, each task at 2.4 or 3.0 x |  |  |  |  | -5.5 (2.50 x) |",
    ]
    table = bench.report.overview(runs, {"structured": "Weights", "top": "Tokens"}).splitlines()
    assert table[0] == "| task | dense | trained on | target | Tokens |"
    assert table[3] == "|  |  |  | 2.5 x | -5.5 ± 0.7 (2.5 x) |"
    text = "a\n<!-- table:benchmark -->\nold\n<!-- end -->\nb"
    assert bench.report.put(text, "benchmark", "\n".join(table)) == text.replace("old", "\n".join(table))


def test_means_over_tasks(bench, runs):
    """At a method's smallest target of each task, and at those near 2.4 or 3; of how many tasks, where these are not all."""
    more = [made("stsb", "dense", 1.0, 0, 0.9), made("stsb", "top", 0.4, 0, 0.931), made("stsb", "top", 0.2, 0, 0.5)]
    smallest, larger = bench.report.overview([*runs, *more]).splitlines()[-2:]
    lost = (-5.5 + 3.1) / 2  # at 2 and 2.5 times fewer MACs
    assert smallest.endswith(f"|  |  |  | -15.0 (2.00 x, 1 of 2 tasks) | {lost:+.1f} (2.25 x) |")
    assert larger.endswith(f"|  |  |  |  | {lost:+.1f} (2.50 x) |")


def test_the_control_is_of_the_same_seeds(bench, runs):
    """Nothing where they share none; seed 0 of `top` has no control here."""
    runs += [made("mrpc", "dense-longer", 1.0, seed, 0.84) for seed in (1, 2)]
    runs += [made("mrpc", "infor-coef", 0.4, seed, score) for seed, score in ((1, 0.82), (2, 0.85))]
    runs += [made("stsb", "dense", 1.0, 0, 0.9), made("stsb", "top", 0.4, 0, 0.931)]
    runs.append(made("mrpc", "topk", 0.5, 1, 0.7))
    for run in runs:
        run["training"] = {"topk": None, "infor-coef": {"epochs": 5.0}}.get(run["method"], {"epochs": 3.0})
    assert bench.report.control(runs).splitlines()[2:] == [
        "| task | target | topk | top | infor-coef |",
        "|---|---|---|---|---|",
        "| MRPC (3 epochs) | 2.0 x | -14.0 | -3.0 |  |",
        "| MRPC (3 epochs) | 2.5 x |  | -3.0 | -0.5 ± 2.1 (5 epochs) |",
    ]
    assert bench.report.control(runs, {"infor-coef": "InforCoef"}).splitlines()[-1].count("|") == 4
    assert "| epochs | seeds |" in bench.report.page("mrpc", bench.report.by_task(runs)["mrpc"])
    assert bench.report.control(runs[:5]) == ""


@pytest.mark.parametrize("head", [BertForSequenceClassification, BertForTokenClassification])
def test_what_cut_weights_save_alone_is_what_they_save_where_no_token_is_dropped(bench, head):
    config = BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24, vocab_size=40)
    model = tp.pack(head(config).eval())
    operate(model, hidden=range(12), heads=[range(n) for n in (1, 2, 0, 3)], units=[range(n) for n in (24, 0, 0, 7)])

    def cost(model):
        meter = tp.cost.CostMeter(model, max_length=9)
        for count in (3, 9, 4):
            model(input_ids=torch.ones(1, count, dtype=torch.long))
            meter.update()
        return meter.cost

    alone = cost(model).true_length_reduction
    spent = cost(tp.attach(model, {1: tp.TopK(0.5)}))
    assert bench.run.by_weights(model, spent) == pytest.approx(alone)
    assert 1 < alone < spent.true_length_reduction
    run = made("mrpc", "structured+top", 0.4, 0, 0.8)
    run["reduction"] = {"true_length": 2.5, "by_weights": 2.1}
    dense = [made("mrpc", "dense", 1.0, 0, 0.81)]
    assert bench.report.cell([run], dense) == "-1.0 (2.5 x, 2.1 x by weights)"
    assert bench.report.cell([{**run, "method": "structured"}], dense) == "-1.0 (2.5 x)"


def write(bench, folder, *runs, seeds=(0, 1), known=True):
    """Runs as files, and those of the dense models of these seeds."""
    dense = [made("mrpc", "dense", 1.0, seed, 0.9) for seed in seeds]
    for run in (*runs, *({**run, "dense_model": run["dense_model"] if known else None} for run in dense)):
        bench.files.write_json(folder / f"{run['seed']}-{run['method']}.json", run)


def test_every_run_needs_the_dense_model_that_it_began_from(bench, runs, tmp_path):
    first, second = runs[:2]
    write(bench, tmp_path / "complete", first, second)
    assert len(bench.report.load(tmp_path / "complete")) == 4
    write(bench, tmp_path / "missing", first, second, seeds=(0,))
    with pytest.raises(SystemExit, match=r"seed 1: .* has no run of the dense model"):
        bench.report.load(tmp_path / "missing")
    write(bench, tmp_path / "unknown", first, second, known=False)
    with pytest.raises(SystemExit, match="one that it does not name"):
        bench.report.load(tmp_path / "unknown")
    older = [{**run, "dense_model": None} for run in (first, second)]
    write(bench, tmp_path / "older", *older, known=False)
    assert len(bench.report.load(tmp_path / "older")) == 4


def test_seeds_of_unlike_settings_are_not_averaged(bench, runs, tmp_path):
    first, second = runs[:2]
    first["settings"] = {"name": "top", "teacher": "a", "neighbours": 8, "sites": None, "schedule": {"anneal": 1}}
    for change, said in (
        ({"teacher": "b", "sites": [1]}, None),
        ({"schedule": {"anneal": 2}}, "schedule.anneal is 1 in seed 0 and 2"),
        ({"epochs": 3}, "training.epochs is 2 in seed 0 and 3"),
        ({"rows": 500}, "rows is 1725 in seed 0 and 500"),
        ({"limited": {"train": 2500, "report": 500}}, "limited is .* in seed 1"),
        ({"train_rows": 200}, "train_rows is 2500 in seed 0 and 200"),
        ({"dense_model": "another"}, "began from the dense model another"),
    ):
        first["training"], second["training"] = (
            {"epochs": 2, "seconds": 5.0},
            {"epochs": change.pop("epochs", 2), "seconds": 6.0},
        )
        data = {name: change.pop(name) for name in list(change) if name in second}
        second = {**runs[1], **data, "training": second["training"], "settings": {**first["settings"], **change}}
        write(bench, tmp_path, first, second)
        if said is None:
            assert len(bench.report.load(tmp_path)) == 4
        else:
            with pytest.raises(SystemExit, match=said):
                bench.report.load(tmp_path)


def test_report_writes_pages_and_plots(bench, runs, tmp_path):
    runs.append(made("mrpc", "dense-longer", 1.0, 1, 0.84))
    for number, run in enumerate(runs):
        run["training"] = {"epochs": 2.0} if run["method"] != "dense" else None
        bench.files.write_json(tmp_path / "results" / f"{number}.json", run)
    (tmp_path / "README.md").write_text("<!-- table:benchmark -->\n<!-- end -->\n<!-- table:control -->\n<!-- end -->\n")
    arguments = ["--results", tmp_path / "results", "--readme", tmp_path / "README.md", "--cards", tmp_path / "cards"]
    arguments = [str(argument) for argument in arguments]
    bench.report.main([*arguments, "--no-plots"])
    assert "| 86.0 ± 1.4 | -3.0 | 2.0 x |" in (tmp_path / "README.md").read_text()
    assert "| MRPC (2 epochs) | 2.0 x | -3.0 |" in (tmp_path / "README.md").read_text()
    index = (tmp_path / "cards" / "README.md").read_text()
    assert bench.report.overview(runs) in index
    assert bench.report.control(runs) in index
    page = (tmp_path / "cards" / "mrpc.md").read_text()
    assert "| top | 2.0 x | 80.5 ± 0.7 | -5.5 ± 0.7 | 80.5 ± 0.7 | 2.00 x | 6.00 x | 3.00 x | 3.00 x | 2 | 2 |" in page
    assert page.index("| dense |") < page.index("| topk |") < page.index("| top |")
    pytest.importorskip("matplotlib")
    bench.report.main(arguments)
    image = (tmp_path / "cards" / "mrpc.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    bench.report.main(arguments)
    assert (tmp_path / "cards" / "mrpc.png").read_bytes() == image
