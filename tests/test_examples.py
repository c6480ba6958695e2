"""Every example runs, offline and in seconds, and what it saves opens and drops tokens."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers as hf

import hf_tokenprune as tp
from hf_tokenprune import publish

FOLDER = Path(__file__).resolve().parent.parent / "examples"
pytestmark = [
    pytest.mark.skipif(not FOLDER.exists(), reason="needs the checkout"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),  # the Trainer's default, without a GPU
]

# What an example prints at its end, the class that it saves, and the share of the MACs that it asks for.
EXAMPLES = {
    "classification": (r"accuracy [\d.]+ at ([\d.]+) of", hf.BertForSequenceClassification, 0.5),
    "ner": (r"accuracy [\d.]+ at ([\d.]+) of", hf.BertForTokenClassification, 0.6),
    "qa": (r"exact [\d.]+ at ([\d.]+) of", hf.BertForQuestionAnswering, 0.6),
    "lora": (r"accuracy [\d.]+ at ([\d.]+) of", hf.BertForSequenceClassification, 0.6),
    "vit": (r"accuracy [\d.]+ at ([\d.]+) of", hf.ViTForImageClassification, 0.5),
    "embeddings": (r"[\d.]+ of the positives are nearer", hf.BertModel, None),
    "rerank": (r"tokens dropped: [\d.]+ of the pairs in the right order", hf.BertForSequenceClassification, None),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run an example as a script and return the folder that it saved to."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def script(name, *flags):
        output = tmp_path / name
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(output), *flags])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return output

    yield script
    for module in ("tiny", "tables"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_saves_a_model_that_drops_tokens(run, capsys, name):
    output = run(name, "--epochs", "1")
    ending, kind, budget = EXAMPLES[name]
    said = re.search(ending, capsys.readouterr().out)
    assert said
    if budget is not None:
        assert float(said[1]) == pytest.approx(budget, abs=0.06)
    model = tp.from_pretrained(output)
    assert isinstance(model, kind)
    assert any(0 in site.kept.tolist() for site in model.token_pruner.sites.values())


def test_what_is_published_opens_without_the_package(run, capfd, monkeypatch):
    output = run("publish")
    said = capfd.readouterr().out
    assert re.search(r"TokenPrunedBertForSequenceClassification \[\{'label': 'LABEL_\d', 'score': 0\.\d+\}\]", said)
    assert "modeling_token_pruned.py" in said
    assert "is ready" in said
    pushed = []
    monkeypatch.setattr(publish, "push", lambda *arguments: pushed.append(arguments))
    run("publish", "--folder", str(output), "--push", "me/mine")
    assert pushed == [(str(output), "me/mine")]


def test_every_example_is_in_the_table():
    assert {file.stem for file in FOLDER.glob("*.py") if "import tiny" in file.read_text()} == {*EXAMPLES, "publish"}


def test_an_example_takes_a_model_and_data_of_ones_own(run, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no"]
    model = tmp_path / "model"
    config = hf.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=len(words))
    hf.DistilBertModel(config).save_pretrained(model)
    hf.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(model)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        rows = [{"a": "yes no " * 5, "b": "no " * number, "label": number % 3} for number in range(1, 40)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", str(model), "--data", str(tmp_path / "data"), "--text", "a", "b", "--test", "validation")
    opened = tp.from_pretrained(run("classification", *flags))
    assert isinstance(opened, hf.DistilBertForSequenceClassification)
    assert opened.num_labels == 3
    assert opened.config.dim == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "ner", "qa"])
def test_the_tiny_models_learn(run, capsys, name):
    run(name)
    score = re.search(r"(?:accuracy|exact) ([\d.]+) at", capsys.readouterr().out)[1]
    assert float(score) > 0.9


@pytest.mark.slow
def test_two_processes_share_the_steps(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = [str(FOLDER / "classification.py"), "--epochs", "1", "--output", str(tmp_path / "out")]
    own = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *script], capture_output=True, text=True, env={**os.environ, **own}, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "16/16" in done.stderr  # of 256 samples, 8 at a time in each process
    assert len(re.findall(r"accuracy [\d.]+ at ([\d.]+) of", done.stdout)) == 2
    assert len(tp.from_pretrained(tmp_path / "out").token_pruner.sites) > 0


@pytest.mark.usefixtures("run")
def test_the_demo_reads_a_folder_as_people_have_it(tmp_path):
    """Labels in words, and nothing but texts to train on."""
    rows = "".join(f"text {number},{('bad', 'good')[number % 2]}\n" for number in range(50))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "all.csv").write_text("text,label\n" + rows)
    demo = runpy.run_path(str(FOLDER / "demo.py"))
    args = argparse.Namespace(
        dataset=str(folder), config=None, label="label", eval_split=None, seed=0, train_texts=99, eval_texts=99
    )
    train, evaluation = demo["load"](args)
    assert (len(train), len(evaluation)) == (40, 10)
    assert train.features["label"].names == evaluation.features["label"].names == ["bad", "good"]
    args.eval_split = "dev"
    with pytest.raises(SystemExit, match="no split 'dev' to evaluate on; it has: train"):
        demo["load"](args)


@pytest.mark.usefixtures("run")
def test_the_demo_prints_the_table_of_the_readme(capsys):
    demo = runpy.run_path(str(FOLDER / "demo.py"))
    report = json.loads((FOLDER.parent / "results" / "demo.json").read_text())
    demo["print_table"](report, Path("runs/demo/pruned"))
    printed = capsys.readouterr().out.strip().splitlines()
    readme = (FOLDER.parent / "README.md").read_text()
    table = readme.partition("<!-- table:demo -->\n")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in (table[0], *table[2:])]
    for line, row in zip(printed, rows, strict=False):
        assert re.split(r"  +", line.strip()) == row
    assert "Took 8.1 minutes" in printed[len(rows) + 1]
