"""The benchmark: its scores against counts by hand, that it can be stopped and started, and one run end to end on made-up data."""

import contextlib
import json
import random
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmark"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the checkout")
MODULES = ("cards", "dense", "files", "methods", "metrics", "report", "run", "tasks", "demo", "tables")
WORDS = ["good", "bad", *(f"w{number}" for number in range(20))]


class Benchmark:
    """The modules of the benchmark, by name."""

    def __getattr__(self, name):
        return import_module(name)


@contextlib.contextmanager
def loaded():
    """While this lasts, the benchmark's modules can be imported."""
    paths = list(sys.path)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    yield Benchmark()
    sys.path[:] = paths
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def bench():
    with loaded() as found:
        yield found


# Scores.


def test_classification_scores(bench):
    assert bench.metrics.accuracy([1, 0, 1, 1], [1, 1, 1, 0]) == 0.5
    assert bench.metrics.f1([1, 0, 1, 1], [1, 1, 1, 0]) == pytest.approx(2 / 3)  # precision and recall 2/3
    assert bench.metrics.f1([0, 0], [0, 0]) == 0.0


def test_correlations(bench):
    assert bench.metrics.pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert bench.metrics.pearson([1, 1], [1, 2]) == 0.0
    assert bench.metrics.spearman([1, 2, 30], [5, 6, 7]) == pytest.approx(1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: sum of products of deviations 4.5, of squares 4.5 and 5.
    assert bench.metrics.spearman([1, 2, 2, 9], [1, 3, 2, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_ranking_scores(bench):
    scores = [0.9, 0.8, 0.1, 0.2, 0.7, 0.3]
    labels = [0, 1, 1, 1, 0, 0]
    groups = ["a", "a", "a", "b", "b", "c"]
    # a: right answers at 2 and 3, (1/2 + 2/3) / 2; b: at 2; c has none and does not count.
    found = bench.metrics.ranking(scores, labels, groups)
    assert found == pytest.approx(((7 / 12 + 1 / 2) / 2, (1 / 2 + 1 / 2) / 2))


def test_answer_scores(bench):
    assert bench.metrics.normalise("  The cat's, a   Hat! ") == "cats hat"
    assert bench.metrics.exact_match("the Cat", ["dog", "cat."]) == 1.0
    assert bench.metrics.exact_match("cats", ["cat"]) == 0.0
    # "big red dog" and "red dog ran": two of three words either way.
    assert bench.metrics.word_f1("a big red dog", ["cat", "red dog ran"]) == pytest.approx(2 / 3)
    assert bench.metrics.word_f1("the", ["an"]) == 1.0
    assert bench.metrics.word_f1("", ["cat"]) == 0.0


# Tasks.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny BERT and its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = BertConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    BertModel(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


def text(generator, count):
    return " ".join(generator.choices(WORDS[2:], k=count))


def data_for(name, rows, generator):
    """Made-up rows of a task, as in its files."""
    found = []
    for number in range(rows):
        label = number % 2
        first = f"{WORDS[label]} {text(generator, 6)}"
        pair = {"sentence1": first, "sentence2": text(generator, 4)}
        context = text(generator, 30)
        kinds = {
            "sst2": {"sentence": first, "label": label},
            "mrpc": {**pair, "label": label},
            "stsb": {**pair, "label": 5.0 * label},
            "20newsgroups": {"text": first, "label": number % 20},
            "wikiqa": {"question_id": f"Q{number // 4}", "question": first, "answer": text(generator, 5), "label": label},
            "squad": {
                "title": f"T{number // 3}",
                "question": first,
                "context": context,
                "answers": {"text": [context.split()[3]], "answer_start": [len(" ".join(context.split()[:3])) + 1]},
            },
        }
        found.append({**kinds[name], "idx": number})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)
    for name in ("sst2", "mrpc", "stsb", "20newsgroups", "wikiqa", "squad"):
        (folder / name).mkdir()
        for split, rows in (("train_subset" if name == "squad" else "train", 40), ("validation", 16), ("test", 16)):
            Dataset.from_list(data_for(name, rows, generator)).to_parquet(str(folder / name / f"{split}.parquet"))
    return folder


@pytest.mark.parametrize("name", ["mrpc", "stsb", "wikiqa", "sst2", "20newsgroups", "squad"])
def test_tasks_score_their_models(bench, base, data, name):
    task = bench.tasks.TASKS[name]
    tokenizer = BertTokenizerFast.from_pretrained(base)
    splits = task.load(data)
    for column in ("question_id", "title") if name in ("wikiqa", "squad") else ("idx",):
        if not task.held_out and column in splits["train"][0]:
            assert not {row[column] for row in splits["train"]} & {row[column] for row in splits["held_out"]}
    assert task.load(data) == splits
    encoded = task.encode(tokenizer, splits["report"])
    outputs = bench.tasks.predict(task.model(base), encoded, tokenizer, batch_size=3)
    again = bench.tasks.predict(task.model(base), encoded, tokenizer, batch_size=16)
    assert [output.shape for output in outputs] == [output.shape for output in again]
    scores = task.score(encoded, outputs)
    assert task.metric in scores
    assert all(-1 <= value <= 1 for value in scores.values())


def test_limits(bench, data):
    task = bench.tasks.TASKS["mrpc"]
    assert [len(rows) for rows in task.load(data, 9, 5).values()] == [9, 5, 1]
    assert task.load(data, 9, 5)["train"] == task.load(data, 9, 5)["train"]
    questions = bench.tasks.TASKS["wikiqa"].load(data, 5, 0)["train"]
    assert len(questions) == 8  # whole questions of four answers
    assert len(bench.tasks.TASKS["squad"].load(data, 0, 0)["report"]) == 16


def test_the_hub_is_read_where_there_is_no_folder(bench, monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return Dataset.from_list([{"sentence1": "good", "sentence2": "bad", "score": 2.5}])

    monkeypatch.setattr(bench.tasks, "load_dataset", load_dataset)
    rows = bench.tasks.TASKS["stsb"].load()["report"]
    assert rows == [{"sentence1": "good", "sentence2": "bad", "label": 2.5}]
    assert asked[0] == ("mteb/stsbenchmark-sts", "train")


def test_only_questions_that_can_be_ranked_count(bench):
    rows = [{"question_id": q, "label": label} for q, label in (("a", 0), ("a", 1), ("b", 0), ("c", 1))]
    assert [row["question_id"] for row in bench.tasks.TASKS["wikiqa"].choose(rows)] == ["a", "a"]


def test_right_spans_score_one_whichever_window_holds_them(bench, base):
    """Logits that point at the answer give its text back; of a long context most windows do not hold it."""
    context = " ".join(WORDS[2 + i % 20] for i in range(900))
    start = len(" ".join(context.split()[:400])) + 1
    answer = " ".join(context.split()[400:403])
    rows = [{"question": "good", "context": context, "answers": {"text": [answer], "answer_start": [start]}}]
    task = bench.tasks.TASKS["squad"]
    encoded = task.encode(BertTokenizerFast.from_pretrained(base), rows)
    holding = [feature for feature in encoded.features if feature["start_positions"]]
    assert 0 < len(holding) < len(encoded.features)
    outputs = []
    for feature in encoded.features:
        logits = np.zeros((len(feature["input_ids"]), 2), dtype=np.float32)
        if feature["start_positions"]:
            logits[feature["start_positions"], 0] = logits[feature["end_positions"], 1] = 9.0
        outputs.append(logits)
    assert task.score(encoded, outputs) == {"exact_match": 1.0, "f1": 1.0}
    wrong = [logits[::-1].copy() for logits in outputs]
    assert task.score(encoded, wrong)["exact_match"] == 0.0


def test_a_missing_file_is_named(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"sst2.train_subset\.parquet"):
        bench.tasks.TASKS["sst2"].load(tmp_path)


# Files.


def test_an_interrupted_write_leaves_nothing(bench, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    file = tmp_path / "run.json"
    bench.files.write_json(file, {"score": 1})
    with monkeypatch.context() as patch:
        patch.setattr(bench.files.os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            bench.files.write_json(file, {"score": 2})
        with pytest.raises(KeyboardInterrupt), bench.files.new_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("")
    with pytest.raises(KeyboardInterrupt), bench.files.new_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert json.loads(file.read_text()) == {"score": 1}


# Runs.


@pytest.fixture(scope="module")
def finished(bench, base, data, tmp_path_factory):
    """`(folder, arguments)` of a benchmark that has run."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = [
        "--tasks",
        "sst2",
        "--methods",
        "dense",
        "dense-longer",
        "topk",
        "topk-trained",
        "top",
        "--budgets",
        "0.6",
        "0.01",
    ]
    arguments += ["--data-dir", data, "--model", base, "--output", folder / "runs", "--results", folder / "results"]
    arguments = [str(argument) for argument in [*arguments, "--bench-texts", "32", "--bench-repeats", "1", "--epochs", "2"]]
    bench.run.main(arguments)
    return folder, arguments


def test_a_run_says_everything_about_itself(bench, finished):
    folder, arguments = finished
    names = sorted(path.name for path in (folder / "results").iterdir())
    runs = [f"sst2-{method}-0.6-0.json" for method in ("top", "topk", "topk-trained")]  # 0.01 is out of reach
    assert names == ["dense-sst2.json", "sst2-dense-1-0.json", "sst2-dense-longer-1-0.json", *runs]
    for run in bench.report.load(folder / "results"):
        assert run["split"] == "validation"
        assert run["rows"] == 16
        assert run["score"] == run["scores"]["accuracy"]
        assert run["reduction"]["padded"] > run["reduction"]["true_length"] >= 1
        assert len(run["tokens_per_layer"]) == 4
        assert set(run["time"]["ms"]) == {"1", "16"}, "there are 16 texts"
        assert run["command"].endswith(arguments[-1])
        assert run["versions"]["torch"] == torch.__version__
        assert run["train_rows"] > 20
        assert len(run["dense_model"]) == 12
        if run["method"] == "dense-longer":
            assert run["tokens_per_layer"] == pytest.approx([run["tokens"]] * 3 + [1])
            assert run["training"]["epochs"] == 2
        elif run["method"] != "dense":
            assert run["macs"]["spent"] / run["macs"]["dense"] == pytest.approx(0.6, abs=0.05)
            assert run["settings"]["target_macs"] == 0.6
            assert bool(run["training"]) == (run["method"] != "topk")
    tuning = json.loads((folder / "results" / "dense-sst2.json").read_text())
    assert len(tuning["trials"]) == len(bench.tasks.TASKS["sst2"].learning_rates)
    assert all(len(trial["held_out"]) == trial["epochs"] for trial in tuning["trials"])
    assert not list((folder / "runs").glob("work-*"))


def test_every_row_has_a_card_of_what_was_measured(bench, finished, tmp_path):
    folder, _ = finished
    bench.cards.main(
        ["--models", str(folder / "runs" / "models"), "--results", str(folder / "results"), "--output", str(tmp_path)]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"sst2-{name}-0.6-0" for name in ("top", "topk", "topk-trained")
    ]
    for path in tmp_path.iterdir():
        run = json.loads((folder / "results" / f"{path.name}.json").read_text())
        dense = json.loads((folder / "results" / "sst2-dense-1-0.json").read_text())
        text = (path / "README.md").read_text()
        assert f"| accuracy (sst2, validation) | {dense['score']:.4f} | {run['score']:.4f} |" in text
        assert json.loads((path / "config.json").read_text())["token_pruning"]["sites"]
        assert not list(path.glob("*.safetensors"))
    cards = {path: path.read_text() for path in tmp_path.glob("*/README.md")}
    (tmp_path / "sst2-topk-0.6-0" / "config.json").unlink()
    bench.cards.main(["--models", "nowhere", "--results", str(folder / "results"), "--output", str(tmp_path)])
    assert {path: path.read_text() for path in cards} == cards, "configs that lie there will do"
    assert not (tmp_path / "sst2-topk-0.6-0" / "config.json").exists()


def test_one_card_stands_for_all_seeds(bench, finished, tmp_path):
    """The first one's whose model is there."""
    shutil.copytree(finished[0], tmp_path / "all")
    results, models = tmp_path / "all" / "results", tmp_path / "all" / "runs" / "models"
    for method, budget in (("dense", "1"), ("topk", "0.6"), ("top", "0.6")):
        run = json.loads((results / f"sst2-{method}-{budget}-0.json").read_text())
        bench.files.write_json(results / f"sst2-{method}-{budget}-1.json", {**run, "seed": 1})
    shutil.move(models / "sst2-topk-0.6-0", models / "sst2-topk-0.6-1")
    shutil.copytree(models / "sst2-top-0.6-0", models / "sst2-top-0.6-1")
    bench.cards.main(["--models", str(models), "--results", str(results), "--output", str(tmp_path / "cards")])
    names = ["sst2-top-0.6-0", "sst2-topk-0.6-1", "sst2-topk-trained-0.6-0"]
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == names


def test_what_is_there_is_not_run_again(bench, finished, monkeypatch):
    folder, arguments = finished

    def times():
        return {path.name: path.stat().st_mtime_ns for path in (folder / "results").iterdir()}

    before = times()
    monkeypatch.setattr(bench.run, "run", lambda *_: pytest.fail("ran again"))
    arguments = [argument for argument in arguments if argument != "0.01"]
    bench.run.main(arguments)
    assert times() == before


def test_an_interrupted_run_starts_where_it_was(bench, finished, monkeypatch):
    folder, arguments = finished
    lost = folder / "results" / "sst2-topk-0.6-0.json"
    content = json.loads(lost.read_text())
    lost.unlink()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bench.run, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.run.main(arguments)
    assert not lost.exists()
    trained = []
    monkeypatch.setattr(bench.dense.Trainer, "train", lambda *_: trained.append(1))
    bench.run.main(arguments)
    assert not trained  # the dense model was there, topk needs none
    assert json.loads(lost.read_text())["scores"] == content["scores"]


def test_a_dense_model_of_other_data_is_not_taken(bench, finished):
    """That of a trial run on a few rows, for instance."""
    _, arguments = finished
    with pytest.raises(SystemExit, match=r"train_rows is \d+, not 20"):
        bench.run.main([*arguments, "--methods", "top", "--budgets", "0.7", "--train-limit", "20"])


def test_choosing_settings_stays_away_from_the_reported_split(bench, finished):
    folder, arguments = finished
    before = set((folder / "results").iterdir())
    arguments = [*arguments, "--held-out", "--methods", "top", "--budgets", "0.6", "--learning-rate", "1e-3", "--epochs", "1"]
    bench.run.main(arguments)
    assert set((folder / "results").iterdir()) == before
    (file,) = (folder / "runs" / "held-out").iterdir()
    assert file.name == "sst2-top-0.6-0-0.001-1.json"
    assert json.loads(file.read_text())["split"] == "a tenth of train"
