"""README's tables are the measured numbers in results/, and its Python runs."""

import re
import sys
from pathlib import Path

import pytest
from families import build
from training_helpers import Texts
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, TrainingArguments

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
    """What the reader of README has at hand, but small; the Hub's model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])})
    load = AutoModelForSequenceClassification.from_pretrained

    def from_pretrained(name, **kwargs):
        return build("bert", "ForSequenceClassification") if name == "bert-base-uncased" else load(name, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    args = TrainingArguments("out", max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"]} for row in Texts(32)]
    return {"args": args, "train": rows, "test": rows[:8], "tokenizer": tokenizer, "texts": ["a a", "a a a"]}


def test_code_blocks_run(session):
    """One after another, as a reader would type them; but each finds the model as it was at first."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) > 3
    for block in blocks:
        session["model"] = build("bert", "ForSequenceClassification")
        exec(compile(block, block, "exec"), session)
    assert isinstance(session["adapted"], session["tp"].peft.PeftModel)
    assert session["model"].config.token_pruning["method"]["name"] == "structured"
