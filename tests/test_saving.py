"""Invariant 6: what is saved is the published form, and opens anywhere: without this package, offline, to the same logits."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, VOCAB, build, make_inputs, outputs_of
from other_process import run_without_package
from safetensors.torch import load_file, save_file
from training_helpers import Texts, at_home, top, trainer_for

import hf_tokenprune as tp
from hf_tokenprune.modeling import modeling_token_pruned, pruning_config
from hf_tokenprune.trainer_card import complete

HEAD = "ForSequenceClassification"
SHIPPED = {file.name: file.read_text() for file in Path(modeling_token_pruned.__file__).parent.glob("[!_]*.py")}


def bins(*kept):
    selector = tp.RankBins(len(kept))
    selector.set_kept(kept)
    return selector


def bins_and_number():
    return {1: bins(1, 1, 0, 1, 0), 2: tp.TopK(2)}


def share_and_bins():
    return {0: tp.TopK(0.6), 2: bins(1, 0, 1)}


TABLE = {
    f"{name} {head}": (name, head, sites, ids)
    for name, head, sites, ids in (
        ("bert", HEAD, bins_and_number, ()),
        ("bert", "ForQuestionAnswering", share_and_bins, (7, 8)),
        ("bert", "ForMultipleChoice", bins_and_number, ()),
        ("bert", "ForTokenClassification", dict, ()),
        ("roberta", "ForMaskedLM", share_and_bins, ()),
        ("xlm-roberta", HEAD, dict, ()),
        ("electra", "Model", bins_and_number, (9,)),
        ("esm", "ForTokenClassification", share_and_bins, ()),
        ("distilbert", HEAD, share_and_bins, ()),
        ("modernbert", "ForMaskedLM", bins_and_number, ()),
        ("eurobert", HEAD, share_and_bins, ()),
        ("albert", HEAD, bins_and_number, ()),
        ("mpnet", "ForTokenClassification", share_and_bins, ()),
        ("deberta-v2", HEAD, share_and_bins, (7,)),
        ("qwen3", HEAD, share_and_bins, ()),
        ("gemma3", "Model", bins_and_number, ()),
        ("vit", "ForImageClassification", bins_and_number, ()),
        ("deit", "ForImageClassification", share_and_bins, ()),
        ("dinov2", "Model", bins_and_number, ()),
        ("siglip", "ForImageClassification", share_and_bins, ()),
    )
}


def make(name, head, sites, ids=()):
    return tp.attach(build(name, head), sites(), protected_token_ids=ids)


def assert_published_form(folder, dense_class, trainer_files=False):
    """Weights as safetensors only, the code in flat files, and a config that leads to it."""
    files = {file.name for file in folder.iterdir()}
    code = {name for name in files if name.endswith(".py")}
    assert code == set(SHIPPED)
    for name in code:
        assert (folder / name).read_text() == SHIPPED[name]
    config = json.loads((folder / "config.json").read_text())
    auto_class, path = dict(config["auto_map"]).popitem()
    assert len(config["auto_map"]) == 1
    module, name = path.split(".")
    assert module == "modeling_token_pruned"
    assert getattr(modeling_token_pruned, name)._dense_class is dense_class
    assert hasattr(hf, auto_class)
    assert config["architectures"] == [dense_class.__name__]
    assert config["model_type"] == dense_class.config_class.model_type
    assert config["token_pruning"]["version"] == pruning_config.FORMAT_VERSION
    expected = {"README.md", "config.json", "model.safetensors", *code}
    if trainer_files:
        expected |= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert files - {"training_args.bin"} == expected


# A process that cannot import this package: the script goes on from `other_process.HEAD`

INSIDE = """
for name, files in json.load(open(f"{root}/table.json")).items():
    @report(name)
    def _():
        inputs, expected, dense = (torch.load(f"{root}/{files}.{part}") for part in ("inputs", "expected", "dense"))
        folder = f"{root}/{files}"
        model = load(folder)
        model.save_pretrained(f"{root}/again/{files}")
        found = {
            "class": type(model).__qualname__, "name": type(model).__name__, "training": model.training,
            "first": same(logits(model, inputs), expected),
            "again": same(logits(load(f"{root}/again/{files}"), inputs), expected),
        }
        plain = auto_class(folder).from_pretrained(folder)
        found["plain class"] = [type(plain).__module__, type(plain).__qualname__]
        dense_logits = logits(plain, inputs)
        found["plain"] = same(dense_logits, dense)
        return found

@report("pipeline")
def _():
    said.clear()
    pipe = pipeline("text-classification", model=f"{root}/pipeline", trust_remote_code=True)
    answers = pipe(["w5 w6 w7 w8", "w9 w10"], batch_size=2)
    trace = [layer.survived for layer in pipe.model.token_pruner.trace]
    return {"said": list(said), "answers": answers, "class": type(pipe.model).__qualname__, "trace": trace}

for name in json.load(open(f"{root}/damaged.json")):
    @report(name)
    def _():
        model = load(f"{root}/{name}")
        model(input_ids=torch.tensor([[3, 4, 5, 6]]))
        return "it ran"

@report("checkpoint")
def _():
    said.clear()
    model = load(f"{root}/checkpoint")
    inputs, expected = (torch.load(f"{root}/checkpoint.{part}") for part in ("inputs", "expected"))
    return {"said": list(said), "same": same(logits(model, inputs), expected), "keys": list(model.state_dict())}

@report("imports")
def _():
    return [name for name in sys.modules if name.split(".")[0] == "hf_tokenprune"]

@report("both")
def _():
    remote = load(f"{root}/remote")
    del sys.modules["hf_tokenprune"]
    import hf_tokenprune as tp
    installed = tp.from_pretrained(f"{root}/installed")
    inputs, *expected = (torch.load(f"{root}/{name}") for name in ("both.inputs", "remote.expected", "installed.expected"))
    turns = []
    for _ in range(3):
        turns += [same(logits(model, inputs), right) for model, right in zip((remote, installed), expected)]
    second = load(f"{root}/remote")
    turns += [same(logits(model, inputs), right) for model, right in zip((second, installed, remote), (*expected, expected[0]))]
    mixed = type(remote).__module__ != type(installed).__module__
    counted = sum(tp.cost.trace_macs(remote)) < sum(tp.cost.dense_macs(remote, remote.token_pruner.trace[0].entered))
    packed = tp.pack(remote) is remote
    dense = tp.detach(remote)
    turns.append(same(logits(installed, inputs), expected[1]))
    return {"turns": turns, "mixed": mixed, "counted": counted, "packed": packed, "dense": type(dense).__module__}

json.dump(reports, open(f"{root}/reports.json", "w"))
"""
DAMAGED = {  # what happens to a saved folder -> the error that names it
    "newer": ("version", 99, "ConfigError", "Upgrade"),
    "unknown_kind": ("selector kind", "nobody_knows", "ConfigError", "nobody_knows"),
    "beyond": ("site layer", 40, "ConfigError", "site at layer 40"),
    "no_kept": ("kept", None, "ConfigError", "kept"),
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Every folder saved here, opened there: what the other process reports."""
    root = tmp_path_factory.mktemp("outside")
    table = {name: f"row{number}" for number, name in enumerate(TABLE)}
    for name, files in table.items():
        model, inputs = make(*TABLE[name]), make_inputs(*TABLE[name][:2])
        model.save_pretrained(root / files)
        torch.save(inputs, root / f"{files}.inputs")
        torch.save(outputs_as_given(model, inputs), root / f"{files}.expected")
        torch.save(outputs_as_given(tp.detach(model), inputs), root / f"{files}.dense")
    (root / "table.json").write_text(json.dumps(table))
    save_with_tokenizer(root / "pipeline")
    for name, damage in DAMAGED.items():
        damaged_folder(root / name, *damage[:2])
    (root / "damaged.json").write_text(json.dumps(list(DAMAGED)))
    inputs = make_inputs("bert", HEAD)
    trainer = trainer_for(root / "run", top(), max_steps=6)
    trainer.train()
    trainer.save_model(str(root / "checkpoint"))
    torch.save(inputs, root / "checkpoint.inputs")
    torch.save(outputs_as_given(at_home(trainer.model.eval()), inputs), root / "checkpoint.expected")
    torch.save(inputs, root / "both.inputs")
    for name, sites in (("remote", bins_and_number), ("installed", share_and_bins)):
        model = make("bert", HEAD, sites)
        model.save_pretrained(root / name)
        torch.save(outputs_as_given(model, inputs), root / f"{name}.expected")
    return run_without_package(root, INSIDE)


def outputs_as_given(model, inputs):
    with torch.no_grad():
        return {key: value for key, value in model(**inputs).items() if isinstance(value, torch.Tensor)}


def save_with_tokenizer(folder):
    model = make("bert", HEAD, bins_and_number)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, VOCAB))]
    hf.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)


def without_kept(folder, chosen):
    """Take the `kept` tensors that are chosen by their name out of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    left = {key: tensor for key, tensor in tensors.items() if not (key.endswith(".kept") and chosen(key))}
    assert len(left) < len(tensors)
    save_file(left, folder / "model.safetensors", {"format": "pt"})


def damaged_folder(folder, what, value):
    make("bert", HEAD, bins_and_number).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if what == "kept":
        without_kept(folder, lambda _: True)
    elif what == "selector kind":
        config["token_pruning"]["sites"][0]["selector"]["kind"] = value
    elif what == "site layer":
        config["token_pruning"]["sites"][0]["layer"] = value
    else:
        config["token_pruning"][what] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_a_saved_model_opens_without_this_package_to_the_same_logits(outside, name):
    found = outside[name]
    dense_class = type(build(*TABLE[name][:2]))
    assert found.pop("plain class") == [dense_class.__module__, dense_class.__qualname__]
    assert found == {
        "class": f"TokenPruned{dense_class.__name__}", "name": dense_class.__name__, "training": False,
        "first": True, "again": True, "plain": True,
    }  # fmt: skip


def test_the_other_process_had_nothing_of_this_package(outside):
    assert outside["imports"] == ["hf_tokenprune"], "the None that keeps it out"


def test_a_pipeline_runs_it_and_finds_nothing_to_complain_about(outside):
    found = outside["pipeline"]
    assert found.get("class") == "TokenPrunedBertForSequenceClassification", found
    assert found["said"] == []
    assert [set(answer) for answer in found["answers"]] == [{"label", "score"}] * 2
    entered, *_, last = found["trace"]
    assert sorted(entered) == [4, 6]
    assert last == [1, 1]
    assert sum(found["trace"][2]) < sum(entered)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused_by_the_code_inside_it(outside, name):
    _, _, error, message = DAMAGED[name]
    assert isinstance(outside[name], dict), outside[name]
    assert outside[name]["error"] == error, outside[name]
    assert message in outside[name]["message"]


def test_a_trained_checkpoint_opens_in_silence_and_without_its_training_state(outside):
    found = outside["checkpoint"]
    assert found.get("same") is True, found
    assert found["said"] == []
    assert not [key for key in found["keys"] if "training_state" in key]


def test_both_copies_of_the_code_work_side_by_side(outside):
    found = outside["both"]
    assert found.get("mixed") is True, found
    assert found["turns"] == [True] * 10
    assert found["counted"] is True
    assert found["packed"] is True
    assert found["dense"].startswith("transformers.models.")


# In this process


def test_checkpoints_and_saved_models_are_the_published_form(tmp_path):
    trainer = trainer_for(tmp_path / "run", top(), max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "by trainer"))
    trainer.model.save_pretrained(tmp_path / "by model")
    for step in (2, 4, 6):
        assert_published_form(tmp_path / "run" / f"checkpoint-{step}", hf.BertForSequenceClassification, trainer_files=True)
    for folder in ("by trainer", "by model", "run/_teacher"):
        assert_published_form(tmp_path / folder, hf.BertForSequenceClassification)


@pytest.mark.parametrize("name", TABLE)
def test_saved_models_are_the_published_form_and_open_with_this_package(tmp_path, name):
    model, inputs = make(*TABLE[name]), make_inputs(*TABLE[name][:2])
    dense_class = type(build(*TABLE[name][:2]))
    model.save_pretrained(tmp_path / "once")
    assert_published_form(tmp_path / "once", dense_class)
    expected = outputs_of(model, inputs)
    opened = tp.from_pretrained(tmp_path / "once")
    opened.save_pretrained(tmp_path / "twice")
    assert_published_form(tmp_path / "twice", dense_class)
    for again in (opened, tp.from_pretrained(tmp_path / "twice")):
        assert type(again) is type(model)
        assert not again.training
        assert again.config.token_pruning == model.config.token_pruning
        for key, value in outputs_of(at_home(again), inputs).items():
            assert torch.equal(value, expected[key]), key


def test_opening_executes_nothing_from_the_folder(tmp_path):
    make("bert", HEAD, bins_and_number).save_pretrained(tmp_path)
    for name in SHIPPED:
        (tmp_path / name).write_text("raise SystemExit('executed')")
    before = set(sys.modules)
    model = tp.from_pretrained(tmp_path)
    assert type(model).__module__ == "hf_tokenprune.modeling.modeling_token_pruned"
    assert not [name for name in set(sys.modules) - before if "transformers_modules" in name]


def test_trusting_remote_code_is_refused(tmp_path):
    make("bert", HEAD, bins_and_number).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="never executes code"):
        tp.from_pretrained(tmp_path, trust_remote_code=True)
    tp.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(tp.errors.ConfigError, match=f"{tmp_path} holds no model"):
        tp.from_pretrained(tmp_path)


def test_a_dense_folder_opens_dense(tmp_path):
    dense, inputs = build("bert", HEAD), make_inputs("bert", HEAD)
    dense.save_pretrained(tmp_path)
    opened = tp.from_pretrained(tmp_path)
    assert type(opened) is hf.BertForSequenceClassification
    assert torch.equal(outputs_of(at_home(opened), inputs)["logits"], outputs_of(dense, inputs)["logits"])


def test_a_detached_model_saves_as_a_dense_one(tmp_path):
    tp.detach(make("bert", HEAD, bins_and_number)).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"auto_map", "token_pruning"} & config.keys()
    assert type(tp.from_pretrained(tmp_path)) is hf.BertForSequenceClassification


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model, inputs = make("bert", HEAD, bins_and_number), make_inputs("bert", HEAD)
    before = outputs_of(model, inputs)["logits"]
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(model, inputs)["logits"], before)
    assert type(tp.detach(model)) is hf.BertForSequenceClassification
    assert not hasattr(model.config, "auto_map")


@pytest.mark.parametrize("way", ["shards", "bfloat16", "device map", "own attention", "state dict"])
def test_other_ways_to_save_and_open_keep_the_selection(tmp_path, way):
    model, inputs = make("bert", HEAD, bins_and_number), make_inputs("bert", HEAD)
    expected = outputs_of(model, inputs)["logits"]
    given = {
        "bfloat16": {"dtype": torch.bfloat16},
        "device map": {"device_map": {"": "cpu"}},
        "own attention": {"attn_implementation": "eager"},
    }
    if way == "shards":
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif way == "state dict":
        model.save_pretrained(tmp_path, state_dict={key: value.clone() for key, value in model.state_dict().items()})
    else:
        model.save_pretrained(tmp_path)
    opened = tp.from_pretrained(tmp_path, **given.get(way, {}))
    for layer, site in model.token_pruner.sites.items():
        if isinstance(site, tp.RankBins):
            assert torch.equal(opened.token_pruner.sites[layer].kept, site.kept)
            assert opened.token_pruner.sites[layer].kept.dtype == torch.int8
    found = outputs_of(at_home(opened), inputs)["logits"]
    if way == "bfloat16":
        assert found.dtype == torch.bfloat16
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("first", "second"), [("50GB", "40KB"), ("40KB", "50GB"), ("40KB", "80KB")])
def test_a_model_saved_over_another_is_the_one_that_opens(tmp_path, first, second):
    make("bert", HEAD, dict).save_pretrained(tmp_path, max_shard_size=first)
    (tmp_path / "notes.txt").write_text("mine")
    for left in ("_saving-0", "_saving-1"):  # by processes that were killed
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_text("half")
    model, inputs = make("bert", HEAD, bins_and_number), make_inputs("bert", HEAD)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    model.save_pretrained(tmp_path, max_shard_size=second)
    model.save_pretrained(tmp_path / "alone", max_shard_size=second)
    assert torch.equal(outputs_of(at_home(tp.from_pretrained(tmp_path)), inputs)["logits"], outputs_of(model, inputs)["logits"])
    weights = [sorted(file.name for file in folder.glob("*.safetensors*")) for folder in (tmp_path, tmp_path / "alone")]
    assert weights[0] == weights[1]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("_saving*"))


def test_a_model_in_lower_precision_saves_and_opens(tmp_path):
    model, inputs = make("bert", HEAD, bins_and_number).to(torch.bfloat16), make_inputs("bert", HEAD)
    model.save_pretrained(tmp_path)
    opened = tp.from_pretrained(tmp_path)
    assert opened.dtype == torch.bfloat16
    assert torch.equal(outputs_of(at_home(opened), inputs)["logits"], outputs_of(model, inputs)["logits"])


class MyOwn(hf.BertForSequenceClassification):
    """A class that no AutoModel knows."""


def test_a_class_of_the_users_own_cannot_be_published(tmp_path):
    model = tp.attach(MyOwn(FAMILIES["bert"].config), bins_and_number())
    with pytest.raises(tp.errors.UnsupportedModelError, match=r"MyOwn.*detach"):
        model.save_pretrained(tmp_path / "pruned")
    assert not list(tmp_path.iterdir())
    tp.detach(model).save_pretrained(tmp_path / "dense")
    with pytest.raises(tp.errors.UnsupportedModelError, match="MyOwn"):
        tp.from_pretrained(tmp_path / "dense")


def test_a_class_of_the_users_own_is_refused_before_a_run_and_not_in_it(tmp_path):
    """The run would write its teacher and its checkpoints, hours later."""
    with pytest.raises(tp.errors.UnsupportedModelError, match="MyOwn"):
        trainer_for(tmp_path, top(), model=MyOwn(copy.deepcopy(FAMILIES["bert"].config)), save_strategy="steps", save_steps=2)


def test_a_dense_run_of_the_trainer_still_saves_a_dense_folder(tmp_path):
    trainer = trainer_for(tmp_path / "run", max_steps=1, data=Texts(8))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert type(tp.from_pretrained(tmp_path / "saved")) is hf.BertForSequenceClassification
    assert not list((tmp_path / "saved").glob("*.py"))


def test_an_auto_map_of_another_repository_is_not_saved(tmp_path):
    """It would lead to files that do not lie in the folder."""
    model, own = make("bert", HEAD, bins_and_number), {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    model.config.auto_map = dict(own)
    model.save_pretrained(tmp_path)
    assert_published_form(tmp_path, hf.BertForSequenceClassification)
    assert model.config.auto_map == own
    complete(model, tmp_path)
    assert_published_form(tmp_path, hf.BertForSequenceClassification)


def test_settings_of_the_config_may_be_given_when_opening(tmp_path):
    make("bert", HEAD, bins_and_number).save_pretrained(tmp_path)
    model = tp.from_pretrained(tmp_path, output_hidden_states=True, id2label={0: "a", 1: "b", 2: "c"}, dtype=torch.bfloat16)
    assert len(model(**make_inputs("bert", HEAD)).hidden_states) == 5
    assert (model.config.id2label[1], model.dtype) == ("b", torch.bfloat16)
    config = hf.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    config.id2label = {0: "x", 1: "y", 2: "z"}
    assert tp.from_pretrained(tmp_path, config=config).config.id2label[1] == "y"
