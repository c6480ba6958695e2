"""Publishing, end to end against a Hub on loopback: what is pushed opens where this package is not, also offline afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import build, make_inputs
from hub_server import running_hub
from huggingface_hub import ModelCard
from training_helpers import at_home

import hf_tokenprune as tp
from hf_tokenprune import cli
from hf_tokenprune.modeling import modeling_token_pruned
from hf_tokenprune.publish import push

HEAD = "ForSequenceClassification"
CODE = {file.name for file in Path(modeling_token_pruned.__file__).parent.glob("[!_]*.py")}
BENCH = {
    "class": "BertForSequenceClassification", "cpu": "Some CPU", "gpu": None, "threads": 2, "dtype": "float32", "load_average": 0.1,
    "texts": 64, "tokens_per_text": 20.0, "max_length": 64,
    "results": [
        {
            "batch_size": 8, "ms": {"hf_padded": 8.0, "hf_sorted": 7.0, "packed_dense": 4.0, "pruned": 2.0},
            "reduction": {"true_length": 1.6, "padded": 5.1}, "tokens_per_layer": [20.0, 10.0, 10.0, 1.0],
        }
    ],
}  # fmt: skip

PUSHER = """
import contextlib, io, json, os, shutil, sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the Hub's client waits between attempts
import torch
from families import build
from huggingface_hub import HfApi
from training_helpers import top, trainer_for
import hf_tokenprune as tp
from hf_tokenprune import cli

root, reports = Path(sys.argv[1]), {}

def run(name, token, *argv):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["push", *map(str, argv)])
    reports[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}

saved = root / "saved"
for name, token in (("nobody", None), ("stranger", "stranger"), ("reader", "reader"), ("unlucky", "unlucky"), ("late", "late")):
    run(name, token, saved, f"user/{name}")
run("private", "writer", saved, "user/private", "--private", "--results", root / "bench.json", "--license", "mit")
run("again", "writer", saved, "user/private")
run("branch", "writer", root / "other", "user/private", "--revision", "other")
run("shards", "writer", saved, "user/shards")
api = HfApi(token="writer")
for name in ("model.fp16.safetensors", "model_quantized.bin", "pytorch_model.bin"):
    api.upload_file(repo_id="user/shards", path_in_repo=name, path_or_fileobj=b"a person's")
for name, more in (("dry shards", ["--dry-run"]), ("more shards", [])):
    run(name, "writer", root / "shards", "user/shards", *more)
api.create_repo("user/public")
run("public", "writer", saved, "user/public", "--private")
text = "# Mine\\n\\nWritten by hand.\\n"
api.create_repo("user/edited")
api.upload_file(repo_id="user/edited", path_in_repo="README.md", path_or_fileobj=text.encode())
run("edited", "writer", saved, "user/edited")

mine = shutil.copytree(saved, root / "mine")
for number, words in enumerate(("# Mine\\n\\nGood.\\n", "# Mine\\n\\nBetter.\\n")):
    (mine / "README.md").write_text(words)
    run(f"mine {number}", "writer", mine, "user/mine")
api.upload_file(repo_id="user/mine", path_in_repo="README.md", path_or_fileobj=b"# Mine\\n\\nBest.\\n")
(mine / "README.md").write_text("# Mine\\n\\nBetter.\\n\\nMuch.\\n")
run("mine 2", "writer", mine, "user/mine")

model = tp.from_pretrained(saved)
model.push_to_hub("user/model", token="writer")

# A person edits a card that a Trainer wrote: here, and on the Hub.
trainer = trainer_for(root / "own", top(), max_steps=6)
trainer.train()
trainer.save_model()
trainer.create_model_card()
for name in ("here", "there"):
    folder = shutil.copytree(root / "own", root / name)
    card = folder / "README.md"
    run(name, "writer", folder, f"user/{name}")
    for again, words in enumerate(("\\n\\nWords of a person.\\n", "\\nMore words.\\n")):
        if name == "here":
            card.write_text(card.read_text() + words)
        else:
            path = api.hf_hub_download("user/there", "README.md", force_download=True)
            api.upload_file(repo_id="user/there", path_in_repo="README.md", path_or_fileobj=(open(path).read() + words).encode())
        run(f"{name} {again}", "writer", folder, f"user/{name}", "--results", root / "bench.json")
    reports[f"{name} card"] = card.read_text()

arguments = {"push_to_hub": True, "hub_token": "writer", "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 6,
             "eval_strategy": "steps", "eval_steps": 6, "logging_steps": 6,
             "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}}
trainer = trainer_for(root / "trained", top(), hub_model_id="user/trained", **arguments)
trainer.train()
trainer.push_to_hub()
tp.from_pretrained(root / "trained").save_pretrained(root / "of_trainer")
json.dump(reports, open(root / "reports.json", "w"))
"""

READER = """
import json, sys
sys.modules["hf_tokenprune"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

root, found = sys.argv[1], {}
inputs = torch.load(f"{root}/inputs")
for name, expected, kwargs in json.load(open(f"{root}/to_read.json")):
    model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True, **kwargs)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        logits = model(**inputs).logits
    same = torch.equal(logits, torch.load(f"{root}/{expected}"))
    found[f"{name} {kwargs.get('revision', '')[:5]}"] = [type(model).__qualname__, same]
json.dump(found, open(f"{root}/{sys.argv[2]}", "w"))
"""


SET_BY_OTHERS = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_MODULES_CACHE"}


def in_process(script, *argv, hub, home, **environment):
    """Run a script with the Hub of this test and caches of its own."""
    variables = {
        **{name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS},
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(tp.__file__).parent.parent)])
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, argv)], env=variables, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def logits(model, inputs):
    with torch.no_grad():
        return at_home(model)(**inputs).logits


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened when everything was pushed, and when it was read; the Hub as it is afterwards."""
    root = tmp_path_factory.mktemp("hub")
    inputs = make_inputs("bert", HEAD)
    torch.save(inputs, root / "inputs")
    (root / "bench.json").write_text(json.dumps(BENCH))
    for shift, name in enumerate(("saved", "other")):
        model = tp.attach(build("bert", HEAD), {1: tp.TopK(0.5)})
        model.classifier.bias.data += shift
        model.save_pretrained(root / name)
        torch.save(logits(tp.from_pretrained(root / name), inputs), root / f"{name}.logits")
    model.save_pretrained(root / "shards", max_shard_size="40KB")
    (root / "saved" / "optimizer.pt").write_bytes(b"a pickle")
    (root / "saved" / "global_step10").mkdir()  # of DeepSpeed
    for name in ("global_step10/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"):
        (root / "saved" / name).write_bytes(b"a pickle")
    before = {file.name: file.read_bytes() for file in (root / "saved").iterdir() if file.is_file()}
    with running_hub() as hub:
        in_process(PUSHER, root, hub=hub, home=root / "home")
        torch.save(logits(tp.from_pretrained(root / "of_trainer"), inputs), root / "of_trainer.logits")
        first = hub.repositories["user/private"].branches["main"][0][0]
        to_read = [
            ("user/private", "saved.logits", {}), ("user/private", "other.logits", {"revision": "other"}),
            ("user/private", "saved.logits", {"revision": first}), ("user/model", "saved.logits", {}),
            ("user/trained", "of_trainer.logits", {}), ("user/shards", "other.logits", {}),
        ]  # fmt: skip
        (root / "to_read.json").write_text(json.dumps(to_read))
        in_process(READER, root, "online.json", hub=hub, home=root / "reader", HF_TOKEN="writer")
        asked = len(hub.asked)
        in_process(READER, root, "offline.json", hub=hub, home=root / "reader", HF_HUB_OFFLINE="1")
        assert len(hub.asked) == asked
    reports = {name: json.loads((root / f"{name}.json").read_text()) for name in ("reports", "online", "offline")}
    after = {file.name: file.read_bytes() for file in (root / "saved").iterdir() if file.is_file()}
    reports["changed"] = sorted(name for name in after if after[name] != before.get(name))
    return hub, reports


@pytest.mark.parametrize("when", ["online", "offline"])
def test_what_was_pushed_opens_without_this_package(story, when):
    _, reports = story
    assert len(reports[when]) == 6
    assert all(found == ["TokenPrunedBertForSequenceClassification", True] for found in reports[when].values()), reports[when]


def test_one_commit_holds_the_whole_folder(story):
    hub, reports = story
    report = reports["reports"]["private"]
    assert (report["status"], report["err"]) == (0, "")
    repository = hub.repositories["user/private"]
    assert repository.private
    (sha, files), *_ = repository.branches["main"]
    assert sha in report["out"].splitlines()[-1]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "tokens_per_layer.png", *CODE}
    assert reports["changed"] == ["README.md", "_pushed.json", "tokens_per_layer.png"]


def test_the_card_on_the_hub_says_what_was_measured(story):
    hub, _ = story
    text = hub.repositories["user/private"].branches["main"][0][1]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "mit"
    assert {"token-pruning", "custom_code"} <= set(card.data.tags)
    for said in (
        "user/private",
        "1.60 x",
        "5.10 x",
        "Some CPU (2 threads, float32)",
        "| 8 | 8.00 | 7.00 | 4.00 | 2.00 |",
        "50%",
    ):
        assert said in text


def test_pushing_again_keeps_what_the_card_knows(story):
    """The second time, no results were named."""
    hub, reports = story
    assert reports["reports"]["again"]["status"] == 0
    assert "Some CPU" in hub.files("user/private")["README.md"].decode()
    assert ModelCard(hub.files("user/private")["README.md"].decode()).data.license == "mit"


def test_a_branch_is_made(story):
    hub, reports = story
    assert reports["reports"]["branch"]["status"] == 0
    main, other = (hub.files("user/private", name)["model.safetensors"] for name in ("main", "other"))
    assert main != other


def test_weights_that_would_be_opened_instead_of_the_new_ones_go(story):
    """And no others, which a person may have put there."""
    hub, reports = story
    assert [reports["reports"][name]["status"] for name in ("shards", "dry shards", "more shards")] == [0, 0, 0]
    one, *_, before, many = (set(files) for _, files in hub.repositories["user/shards"].branches["main"])
    assert {name for name in one if "safetensors" in name} == {"model.safetensors"}
    assert before - many == {"model.safetensors", "pytorch_model.bin"}
    assert len({name for name in many if "safetensors" in name}) > 3
    for name in ("dry shards", "more shards"):
        said = [line for line in reports["reports"][name]["out"].splitlines() if line.startswith("deleted there: ")]
        assert [line.split()[2] for line in said] == ["model.safetensors,", "pytorch_model.bin,"]


def test_a_card_that_was_written_on_the_hub_stays(story):
    hub, reports = story
    assert "by hand" in reports["reports"]["edited"]["out"]
    assert hub.files("user/edited")["README.md"] == b"# Mine\n\nWritten by hand.\n"
    assert "model.safetensors" in hub.files("user/edited")


def test_a_card_that_was_written_by_hand_is_edited_here_until_somebody_edits_it_there(story):
    hub, reports = story
    assert [reports["reports"][f"mine {number}"]["status"] for number in range(3)] == [0, 0, 1]
    texts = [files["README.md"] for _, files in hub.repositories["user/mine"].branches["main"] if "README.md" in files]
    assert texts == [b"# Mine\n\nGood.\n", b"# Mine\n\nBetter.\n", b"# Mine\n\nBest.\n"]
    assert not any("_pushed.json" in files for _, files in hub.repositories["user/mine"].branches["main"])


@pytest.mark.parametrize("name", ["here", "there"])
def test_a_trainers_card_that_a_person_has_edited_keeps_the_words(story, name):
    """Wherever it was edited; and what is measured later still gets into our section."""
    hub, reports = story
    assert [reports["reports"][f"{name}{again}"]["status"] for again in ("", " 0", " 1")] == [0, 0, 0]
    online = hub.files(f"user/{name}")["README.md"].decode()
    assert "generated automatically" in online
    assert online.rstrip().endswith("Words of a person.\n\nMore words.")
    assert "Some CPU" in online
    assert reports["reports"][f"{name} card"] == online


REFUSED = {
    "nobody": "no token",
    "stranger": "does not know this token",
    "reader": "may not write to user/reader",
    "unlucky": "broke off",
    "late": "broke off",
    "public": "exists already and is public",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_failed_push_says_why_in_one_line_and_publishes_nothing(story, name):
    hub, reports = story
    report = reports["reports"][name]
    assert report["status"] == 1
    assert REFUSED[name] in report["err"]
    assert report["err"].startswith("hf-tokenprune: ")
    assert report["err"].count("\n") == 1
    repository = hub.repositories.get(f"user/{name}")
    assert repository is None or repository.branches == {"main": []}


def test_push_to_hub_of_a_model_has_our_card(story):
    hub, _ = story
    [(_, files)] = hub.repositories["user/model"].branches["main"]
    assert set(files) >= {"config.json", "model.safetensors", *CODE}
    text = files["README.md"].decode()
    assert "# model\n" in text
    assert 'from_pretrained("user/model", trust_remote_code=True)' in text
    assert "More Information Needed" not in text


def test_every_commit_of_a_trainer_is_complete_and_described(story):
    hub, _ = story
    commits = hub.repositories["user/trained"].branches["main"]
    assert len(commits) >= 2
    for _, files in commits:
        assert set(files) >= {"README.md", "config.json", "model.safetensors", *CODE}
        assert not any(name.startswith(("_teacher", "checkpoint")) for name in files)
        assert "sha256sum" in files["README.md"].decode()
    text = commits[-1][1]["README.md"].decode()
    card = ModelCard(text)
    assert "The following hyperparameters were used during training" in text  # the Trainer's own part
    assert {"token-pruning", "custom_code", "generated_from_trainer"} <= set(card.data.tags)
    [result] = card.data.eval_results
    assert result.metric_type == "accuracy"
    assert f"{result.metric_value:.4f}" in text


# Without a Hub


@pytest.fixture
def folder(tmp_path):
    tp.attach(build("bert", HEAD), {1: tp.TopK(0.5)}).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_dry_run_shows_files_and_card_and_sends_nothing(folder, capsys):
    """Also where there is no network: tests run offline."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert cli.main(["push", str(folder), "user/name", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "# name" in said
    assert all(name in said for name in before)
    assert "could not be seen" in said
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def spoil_card(folder):
    (folder / "README.md").write_text("---\ntags: [\n---\n# Mine\n")


def make_dense(folder):
    build("bert", HEAD).save_pretrained(folder)


WRONG = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "user/name", "no config.json"),
    "no config": (spoil_config, "user/name", "is damaged"),
    "no YAML": (spoil_card, "user/name", "README.md cannot be read"),
    "dense": (make_dense, "user/name", "no token-pruned model"),
    "no code": (lambda folder: (folder / "modeling_token_pruned.py").unlink(), "user/name", "modeling_token_pruned.py missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "user/name", "model.safetensors missing"),
    "no user": (None, "name", "user/name"),
    "bad name": (None, "user/na me", "no name of a repository"),
    "offline": (None, "user/name", "Nothing was published"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(folder, monkeypatch, capsys, name):
    spoil, repo_id, message = WRONG[name]
    if spoil:
        spoil(folder)
    capsys.readouterr()
    monkeypatch.setenv("HF_TOKEN", "writer")
    assert cli.main(["push", str(folder), repo_id]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_published_model_is_hardly_larger_than_a_dense_one(tmp_path):
    """BERT-base has 440 MB of weights; what we add to a folder is code, a card and a few numbers per site."""
    config = hf.BertConfig()
    with torch.device("meta"):
        dense = sum(p.numel() * 4 for p in hf.BertForSequenceClassification(config).parameters())
    model = tp.attach(build("bert", HEAD), {1: tp.RankBins(50), 2: tp.TopK(0.5)})
    selectors = 4 * sum(t.numel() for t in (*model.token_pruner.parameters(), *model.token_pruner.buffers()))
    model.save_pretrained(tmp_path)
    added = sum(size for name, size in push(tmp_path, "user/name", dry_run=True).files.items() if name != "model.safetensors")
    assert (added + config.num_hidden_layers * selectors) / dense < 0.01


# Adapters

ADAPTER_PUSHER = """
import sys
import torch
import transformers as hf
from families import build
from peft import LoraConfig, get_peft_model
from training_helpers import top, trainer_for
import hf_tokenprune as tp

root = sys.argv[1]
build("bert", "ForSequenceClassification").push_to_hub("user/base", token="writer")
pruning = tp.peft.TokenPruneConfig(target_macs=0.55, settings={"rank_bins": 8})
configs = {
    "lora": (LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"), top()),
    "pruning": (pruning, pruning.training_method()),
}
for name, (config, method) in configs.items():
    model = get_peft_model(hf.AutoModelForSequenceClassification.from_pretrained("user/base", token="writer"), config)
    trainer = trainer_for(f"{root}/{name}", method, model=model, learning_rate=1e-4)
    trainer.train()
    trainer.model.push_to_hub(f"user/{name}", token="writer")
    torch.save(trainer.model.eval()(**torch.load(f"{root}/inputs")).logits, f"{root}/{name}.logits")
"""

ADAPTER_READER = """
import sys
import torch
import hf_tokenprune
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification

root, inputs = sys.argv[1], torch.load(f"{sys.argv[1]}/inputs")
for name in ("lora", "pruning"):
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained("user/base"), f"user/{name}").eval()
    assert torch.equal(model(**inputs).logits, torch.load(f"{root}/{name}.logits")), name
    calls = model.get_base_model().token_pruner.trace
    assert sum(calls[2].survived) < sum(calls[0].arrived), name
model = AutoPeftModelForSequenceClassification.from_pretrained("user/lora").eval()
assert torch.equal(model(**inputs).logits, torch.load(f"{root}/lora.logits"))
"""


def test_adapters_that_prune_open_from_the_hub_and_offline(tmp_path):
    torch.save(make_inputs("bert", HEAD), tmp_path / "inputs")
    with running_hub() as hub:
        in_process(ADAPTER_PUSHER, tmp_path, hub=hub, home=tmp_path / "home")
        in_process(ADAPTER_READER, tmp_path, hub=hub, home=tmp_path / "reader", HF_TOKEN="writer")
        asked = len(hub.asked)
        in_process(ADAPTER_READER, tmp_path, hub=hub, home=tmp_path / "reader", HF_HUB_OFFLINE="1")
        assert len(hub.asked) == asked
        assert sum(map(len, hub.files("user/pruning").values())) < 100_000
