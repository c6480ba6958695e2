"""README's tables are the measured numbers in results/, and its Python runs."""

import re
import sys
from pathlib import Path

import datasets
import pytest
from families import build
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast, Trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield pytest.importorskip("tables", reason="needs the checkout")
    sys.modules.pop("tables", None)


def test_tables_are_made_from_the_results(tables):
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme
    assert readme.count("<!-- table:") == len(tables.TABLES)


MS = {"hf_padded": 12.0, "hf_sorted": 9.0, "packed_dense": 6.0, "pruned": 3.0}


def measured(**other):
    """What `bench` says, on one machine or another."""
    macs = {"dense": 6e6, "dense_padded": 12e6, "hf_padded": 9e6, "hf_sorted": 8e6, "packed_dense": 5e6, "pruned": 2e6}
    return {
        "cpu": "A", "gpu": None, "threads": 2, "dtype": "float32", "texts": 64, "load_average": 1.0, "versions": {"torch": "2"},
        "results": [
            {"batch_size": 1, "ms": {**MS, "hf_sorted": 12.0}, "macs": macs}, {"batch_size": 32, "ms": MS, "macs": macs}
        ], **other,
    }  # fmt: skip


def test_the_demo_may_time_few_texts(tables):
    """Then there is no batch of 32, or of more than one."""
    report = {"accuracy": {"dense": 0.8, "pruned": 0.8}, "bench": measured()}
    report["bench"]["results"][1]["batch_size"] = 16
    assert "ms per text, batch 16" in [row[0] for row in tables.demo_rows(report)]
    del report["bench"]["results"][1]
    assert len(tables.demo_rows(report)) == 7


def test_a_table_of_times_says_where_they_were_measured(tables):
    ratios = ("padded_over_real", "packing_speedup", "macs_saved_by_dropping", "dropping_speedup", "batch_1_dropping_speedup")
    row = {"shape": "6x384", "head": "sequence", "sites": 4, "importance": "learned", **dict.fromkeys(ratios, 2.0)}
    cut = {"shape": "6x384", "macs_saved_by_cutting": 2.5, "cutting_speedup": 2.3, "batch_1_over_hf": 2.0}
    benches = [measured(), measured(cpu="B", load_average=2.5, threads=1)]
    other = {**row, "importance": "attention", "bench": measured(cpu="C")}
    report = {"inference": [*({**row, "bench": bench} for bench in benches), other], "cutting": [{**cut, "bench": benches[1]}]}
    said = "A or B, 2 threads or 1 thread, float32, 64 texts, load 1.0 to 2.5; torch 2."
    assert said in tables.speed(report).splitlines()[-1]
    assert "B, 1 thread, float32, 64 texts, load 2.5; torch 2." in tables.cutting(report).splitlines()[-1]
    rows = [{**row, "bench": measured(gpu="G", dtype="bfloat16", ms=MS)}]
    slow = [{**row, "bench": measured(gpu="G", dtype="bfloat16", ms=MS, cpu="slow")}]
    table = tables.speed_gpu({"rows": rows}, {"rows": slow}).splitlines()
    assert "the attention received" in table[-1]
    assert "G (host: A), 2 threads, bfloat16, 64 texts" in table[-1]
    assert "The last column: G (host: slow), 2 threads" in table[-1]


def test_packing_is_held_against_sorted_texts_too(tables):
    ratios = ("padded_over_real", "packing_speedup", "macs_saved_by_dropping", "dropping_speedup", "batch_1_dropping_speedup")
    row = {"shape": "6x384", "head": "sequence", "sites": 4, "importance": "learned", **dict.fromkeys(ratios, 2.0)}
    gpu = {"rows": [{**row, "bench": measured(ms=MS)}]}
    for head, _, cells, *_ in (
        tables.speed({"inference": [{**row, "bench": measured()}]}).splitlines(),
        tables.speed_gpu(gpu, gpu).splitlines(),
    ):
        assert cells.split(" | ")[head.split(" | ").index("against transformers on sorted texts")] == "1.50 x"


def test_a_column_of_the_demo_is_of_one_way_to_run(tables):
    """The MACs of the dense model as transformers runs it are those of the padded run whose milliseconds stand below."""
    report = {"accuracy": {"dense": 0.8, "pruned": 0.7}, "bench": measured()}
    assert tables.demo_rows(report) == [
        ["", "dense, as transformers runs it", "the same on sorted texts", "dense, packed", "pruned"],
        ["accuracy, %", "80.00", "80.00", "80.00", "70.00"],
        ["MACs per text, batch 32, millions", "9", "8", "5", "2"],
        ["reduction, true length", "0.67 x", "0.75 x", "1.20 x", "3.00 x"],
        ["reduction, padded", "1.33 x", "1.50 x", "2.40 x", "6.00 x"],
        ["ms per text, batch 1", "12.00", "12.00", "6.00", "3.00"],
        ["speed-up, batch 1", "1.00 x", "1.00 x", "2.00 x", "4.00 x"],
        ["ms per text, batch 32", "12.00", "9.00", "6.00", "3.00"],
        ["speed-up, batch 32", "1.00 x", "1.33 x", "2.00 x", "4.00 x"],
    ]
    assert "A, 2 threads, float32, 64 texts" in tables.demo(report).splitlines()[-1]


@pytest.mark.skipif(not (ROOT / "model_cards").exists(), reason="needs the checkout")
def test_every_card_is_of_a_result():
    results = {file.stem for file in (ROOT / "results" / "benchmark").glob("*.json")}
    assert {folder.name for folder in (ROOT / "model_cards").iterdir() if folder.is_dir()} <= results


@pytest.fixture
def session(tmp_path, monkeypatch):
    """What the reader of README has at hand, but small: the Hub has a tiny model and few texts, and is pushed to by saving."""
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, model_max_length=32)
    rows = [{"text": "a " * (1 + number % 17), "label": number % 2} for number in range(32)]
    data = datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:8]))
    load = AutoModelForSequenceClassification.from_pretrained

    def from_pretrained(name, **kwargs):
        return build("bert", "ForSequenceClassification") if name == "bert-base-uncased" else load(name, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.setattr(datasets, "load_dataset", lambda _: data)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda trainer: trainer.save_model())
    return {"texts": ["a a", "a a a"]}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of a Trainer with default arguments on a CPU
def test_code_blocks_run(session):
    """One after another, as a reader would type them; but each finds the model as it was at first."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) > 3
    assert len([line for line in blocks[0].splitlines() if line]) <= 15, "from nothing to a published folder"
    for block in blocks:
        session["model"] = build("bert", "ForSequenceClassification")
        exec(compile(block, block, "exec"), session)
    assert isinstance(session["adapted"], session["tp"].peft.PeftModel)
    assert session["model"].config.token_pruning["method"]["name"] == "structured"
