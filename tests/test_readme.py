"""README's tables are the measured numbers in results/, and its Python runs."""

import re
import sys
from pathlib import Path

import datasets
import pytest
from families import build
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast, Trainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="needs the checkout")
def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tables

    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme
    assert readme.count("<!-- table:") == len(tables.TABLES)
    sys.modules.pop("tables")


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
