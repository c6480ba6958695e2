"""PEFT: adapters that drop tokens, alone or with LoRA and others; what their folders hold, and what is left when they are off."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import build, make_inputs, outputs_of
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from training_helpers import (
    Recorder,
    Texts,
    assert_same_state,
    at_home,
    kept_bins,
    no_dropout,
    put_checkpoint,
    spent_share,
    top,
    trained,
    trainer_for,
)

import hf_tokenprune as tp
from hf_tokenprune.checkpoints import _begun_for

HEAD = "ForSequenceClassification"
INPUTS = make_inputs("bert", HEAD)
LORA = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("bert", HEAD, **no_dropout()).save_pretrained(folder)
    return str(folder)


def base(folder):
    return hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def logits(model):
    training = model.training
    found = outputs_of(at_home(model.eval()), INPUTS)["logits"]
    model.train(training)
    return found


def inside(model):
    return model.get_base_model()


def lora(folder, **settings):
    return get_peft_model(base(folder), LoraConfig(**{**LORA, **settings}))


def pruning(**settings):
    return tp.peft.TokenPruneConfig(**{"target_macs": 0.55, "settings": {"rank_bins": 8}, **settings})


@pytest.fixture(scope="module")
def with_lora(base_folder, tmp_path_factory):
    """A Trainer that has trained LoRA and pruning together, and the adapter folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lora")
    look = Recorder(look=lambda model: sum(inside(model).token_pruner.trace[2].survived))
    trainer = trained(folder, model=lora(base_folder), callbacks=[look], logging_steps=1)
    trainer.save_model(str(folder / "adapter"))
    return trainer, folder / "adapter", look.looks


@pytest.fixture(scope="module")
def alone(base_folder, tmp_path_factory):
    """A Trainer that has trained a pruning adapter over a frozen model, and the adapter folder."""
    torch.manual_seed(0)
    folder, config = tmp_path_factory.mktemp("alone"), pruning()
    trainer = trained(folder, config.training_method(), model=get_peft_model(base(base_folder), config), learning_rate=1e-4)
    trainer.save_model(str(folder / "adapter"))
    return trainer, folder / "adapter"


# With LoRA


def test_lora_trains_and_learns_which_tokens_to_drop(with_lora):
    trainer, _, survived = with_lora
    model = trainer.model
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, LoraModel)
    assert survived[-1] < 0.7 * survived[0]
    assert 0.45 < spent_share(inside(model), Texts()) < 0.51
    assert max(entry["distillation"] for entry in trainer.state.log_history if "distillation" in entry) > 0
    weights = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in weights)
    assert not any(name.endswith("word_embeddings.weight") or "base_layer" in name for name in weights)
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_adapter_folder_opens_on_the_base_and_by_auto_class(with_lora, base_folder):
    trainer, folder, _ = with_lora
    expected = logits(trainer.model)
    for model in (
        PeftModel.from_pretrained(base(base_folder), folder),
        AutoPeftModelForSequenceClassification.from_pretrained(folder),
    ):
        assert torch.equal(logits(model), expected)
        assert kept_bins(inside(model)) == kept_bins(inside(trainer.model))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "TOKEN_PRUNE_LORA"
    assert not (folder / "_teacher").exists()
    assert sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors") < 100_000


def test_the_card_of_an_adapter_is_the_trainers(with_lora, caplog):
    """PEFT writes its template, of which nobody has filled in anything, with the adapter."""
    trainer, _, _ = with_lora
    trainer.save_model()
    file = Path(trainer.args.output_dir) / "README.md"
    assert "More Information Needed" in file.read_text()
    trainer.create_model_card()
    assert "Training hyperparameters" in file.read_text()
    assert "written by hand" not in caplog.text
    trainer.save_model()
    assert "Training hyperparameters" in file.read_text()
    file.write_text("Mine.\n")
    trainer.create_model_card()
    assert file.read_text() == "Mine.\n"


def test_transformers_own_way_to_open_an_adapter_is_refused_with_the_right_one(with_lora, alone, base_folder):
    for folder in (with_lora[1], alone[1]):
        with pytest.raises(tp.errors.ConfigError, match=r"PeftModel\.from_pretrained"):
            hf.AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(tp.errors.ConfigError, match="get_peft_model"):
        base(base_folder).add_adapter(pruning())


def test_where_adapters_are_disabled_the_base_is_as_it_came(with_lora, base_folder):
    _, folder, _ = with_lora
    expected = logits(base(base_folder))
    model = PeftModel.from_pretrained(base(base_folder), folder)
    on = logits(model)
    assert not torch.allclose(on, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
        assert type(inside(model)) is hf.BertForSequenceClassification
    assert torch.equal(logits(model), on)
    dense, plain = model.unload(), base(base_folder)
    assert type(dense) is hf.BertForSequenceClassification
    assert list(dense.state_dict()) == list(plain.state_dict())
    dense.classifier = plain.classifier  # PEFT leaves the head that it has saved with the adapter
    assert torch.equal(logits(dense), expected)


def test_adapters_are_switched_with_their_pruners(with_lora, base_folder, tmp_path):
    _, folder, _ = with_lora
    other = trained(tmp_path, top(sites=(1,), target_macs=0.7), model=lora(base_folder)).model
    other.save_pretrained(str(tmp_path / "other"))
    model = PeftModel.from_pretrained(base(base_folder), folder, adapter_name="a")
    expected = {"a": logits(model), "b": logits(other)}
    model.load_adapter(str(tmp_path / "other"), "b")
    assert torch.equal(logits(model), expected["a"])
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert list(inside(model).token_pruner.sites) == (["1"] if name == "b" else ["1", "2"])
    model.set_adapter("a")
    for merge in (model.merge_adapter, lambda names: model.merge_and_unload(adapter_names=names)):
        merge(["b"])
        assert list(inside(model).token_pruner.sites) == ["1"], "what is merged says who is dropped"
        if merge == model.merge_adapter:
            with model.disable_adapter():
                logits(model)  # PEFT's layers unmerge themselves here
            torch.testing.assert_close(logits(model), expected["a"], atol=1e-4, rtol=0)
            merge(["a"])
            torch.testing.assert_close(logits(model), expected["a"], atol=1e-4, rtol=0)
            model.unmerge_adapter()
            torch.testing.assert_close(logits(model), expected["a"], atol=1e-4, rtol=0)
    model = PeftModel.from_pretrained(base(base_folder), folder, adapter_name="a")
    model.load_adapter(str(tmp_path / "other"), "b")
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(base(base_folder), tmp_path / "both" / "b")
    assert torch.equal(logits(again), expected["b"])
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="b was active"):
        model.delete_adapter("b")
    assert torch.equal(logits(model), expected["a"])


def test_a_sum_of_adapters_drops_what_the_first_of_them_drops(base_folder, tmp_path):
    model = trained(tmp_path / "run", model=lora(base_folder, task_type=None)).model  # PEFT adds up none with a head
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b")
    expected = kept_bins(inside(model))
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "sum", combination_type="linear")
    model.set_adapter("sum")
    assert kept_bins(inside(model)) == expected
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(base_folder), tmp_path / "sum")
    assert torch.equal(logits(again), logits(model))


def test_a_plain_adapter_can_be_loaded_beside_one_that_prunes(with_lora, base_folder, tmp_path):
    """If its config says that it is one of ours."""
    lora(base_folder, init_lora_weights=False).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(base(base_folder), tmp_path))
    model = PeftModel.from_pretrained(base(base_folder), with_lora[1])
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(tmp_path, "plain")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "TOKEN_PRUNE_LORA"}))
    model.load_adapter(tmp_path, "plain")
    model.set_adapter("plain")
    assert torch.equal(logits(model), expected)


def test_an_adapter_beside_one_that_learns_to_prune_stays_an_ordinary_one(base_folder, tmp_path):
    model = lora(base_folder)
    model.add_adapter("plain", LoraConfig(**LORA))
    trained(tmp_path / "run", model=model)
    model.save_pretrained(tmp_path / "saved")
    model.merge_adapter(["plain"])
    assert not hasattr(inside(model), "token_pruner")
    model.unmerge_adapter()
    assert len(inside(model).token_pruner.sites) == 2
    model.set_adapter("plain")
    expected = logits(model)
    assert type(inside(model)) is hf.BertForSequenceClassification
    config = json.loads((tmp_path / "saved" / "plain" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "token_pruning" not in config
    alone = PeftModel.from_pretrained(base(base_folder), tmp_path / "saved" / "plain")
    assert type(alone.base_model) is LoraModel
    assert torch.equal(logits(alone), expected)


FRESH = """
import json, sys
sys.modules["hf_tokenprune"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data = tensor.data.clone()
inputs = {name: torch.tensor(value) for name, value in json.loads(sys.argv[2]).items()}
with torch.no_grad():
    print("LOGITS", json.dumps(model(**inputs).logits.tolist()), type(model).__qualname__)
"""


def test_merged_it_is_an_ordinary_published_folder(with_lora, base_folder, tmp_path):
    trainer, folder, _ = with_lora
    model = PeftModel.from_pretrained(base(base_folder), folder).merge_and_unload()
    torch.testing.assert_close(logits(model), logits(trainer.model), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_token_pruned.py").exists()
    inputs = json.dumps({name: value.tolist() for name, value in INPUTS.items()})
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path), inputs], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said, name = run.stdout.split("LOGITS ")[1].rsplit(maxsplit=1)
    torch.testing.assert_close(torch.tensor(json.loads(said)), logits(model), atol=1e-6, rtol=0)
    assert name == "TokenPrunedBertForSequenceClassification"


def test_what_was_merged_can_be_cut(with_lora, base_folder, tmp_path):
    model = PeftModel.from_pretrained(base(base_folder), with_lora[1]).merge_and_unload()
    method = tp.StructuredPruning(target_macs=0.5, schedule=tp.Schedule(dense=0, anneal=1, settle=0), teacher=None)
    trainer = trained(tmp_path, method, model=tp.detach(model), max_steps=4)
    assert trainer.model.config.token_pruning["shapes"]


CUTTING = {
    "structured": tp.StructuredPruning(target_macs=0.5),
    "compose": tp.Compose(tp.StructuredPruning(), tp.ToP(), target_macs=0.5),
    "infor_coef": tp.InforCoef(static_macs=0.6, target_macs=0.4),
}


@pytest.mark.parametrize("name", CUTTING)
def test_cutting_weights_under_adapters_is_refused_with_the_remedy(base_folder, tmp_path, name):
    model = lora(base_folder)
    with pytest.raises(tp.errors.TrainingError, match="merge_and_unload"):
        trainer_for(tmp_path, CUTTING[name], model=model)
    assert type(inside(model)) is hf.BertForSequenceClassification
    assert type(model.base_model) is LoraModel


OTHERS = {
    "loha": lambda: LoHaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"),
    "ia3": lambda: IA3Config(
        target_modules=["value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
    ),
    "dora on all": lambda: LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="SEQ_CLS"),
    "infor-coef": lambda: LoraConfig(**{**LORA, "target_modules": "all-linear"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_tuner_and_any_method_for_tokens(base_folder, tmp_path, name):
    method = top()
    if name == "infor-coef":
        method = tp.InforCoef(static_macs=None, target_macs=0.6, schedule=tp.Schedule(dense=1, anneal=1, settle=1))
    trainer = trained(tmp_path / "run", method, model=get_peft_model(base(base_folder), OTHERS[name]()))
    trainer.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(base(base_folder), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(trainer.model))
    assert spent_share(inside(model), Texts()) < 0.95
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(trainer.model), atol=1e-5, rtol=0)


def test_adapters_that_are_no_layers_are_refused(base_folder, tmp_path):
    model = get_peft_model(base(base_folder), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    with pytest.raises(tp.errors.TrainingError, match="PROMPT_TUNING"):
        trainer_for(tmp_path, top(), model=model)
    model = base(base_folder)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(tp.errors.TrainingError, match="get_peft_model"):
        trainer_for(tmp_path, top(), model=model)


def test_an_adapter_on_a_base_that_drops_tokens_already(base_folder, tmp_path):
    """The base keeps its own selection; where it is off, it is that of the base, also under an adapter that has another."""
    model = tp.attach(base(base_folder), {1: tp.TopK(0.4), 2: tp.TopK(0.5)})
    expected = logits(model)
    peft_model = get_peft_model(model, LoraConfig(**{**LORA, "init_lora_weights": False}))
    on = logits(peft_model)
    assert not torch.allclose(on, expected, atol=1e-3)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tp.attach(base(base_folder), {1: tp.TopK(0.4), 2: tp.TopK(0.5)}), tmp_path / "adapter")
    assert torch.equal(logits(again), on)
    trained(tmp_path / "run", model=peft_model)
    assert [type(site) for site in inside(peft_model).token_pruner.sites.values()] == [tp.RankBins, tp.RankBins]
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), expected)
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(tp.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("step", [2, 6, 10])
@pytest.mark.parametrize("kind", ["lora", "alone"])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(base_folder, tmp_path, kind, step):
    ways = []
    for folder, resume in (
        (tmp_path / "whole", None),
        (tmp_path / "resumed", str(tmp_path / "resumed" / f"checkpoint-{step}")),
    ):
        torch.manual_seed(0)
        if resume:
            put_checkpoint(tmp_path / "whole", folder, step)
        model = lora(base_folder) if kind == "lora" else get_peft_model(base(base_folder), pruning())
        trainer = trained(folder, top(), resume, model=model, save_strategy="steps", save_steps=1)
        ways.append(copy.deepcopy(trainer.model.state_dict()))
    assert_same_state(*ways)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_run_goes_on_with_the_method_it_began_with(base_folder, tmp_path, name):
    def model():
        return get_peft_model(base(base_folder), LoraConfig(**LORA), adapter_name=name)

    trained(tmp_path, model=model(), save_strategy="steps", save_steps=10, logging_strategy="no")
    for method, message in (
        (top(schedule=tp.Schedule(dense=1, anneal=2, settle=1)), "another method than this one: schedule was"),
        (top(target_macs=0.4), "has chosen by target_macs"),
    ):
        with pytest.raises(tp.errors.TrainingError, match=message):
            trained(tmp_path, method, True, model=model())
    place = tmp_path / "checkpoint-10" / ("" if name == "default" else name)
    assert _begun_for(place / "adapter_model.safetensors") == 12, "not what a resumed run is longer by"


def test_the_teacher_is_the_merged_model_and_no_part_of_checkpoints(base_folder, tmp_path):
    trainer = trained(tmp_path, model=lora(base_folder), save_strategy="steps", save_steps=4)
    teacher = tp.from_pretrained(tmp_path / "_teacher")
    assert not any("lora" in name or "teacher" in name for name in teacher.state_dict())
    dense = PeftModel.from_pretrained(base(base_folder), tmp_path / "checkpoint-4").merge_and_unload()
    torch.testing.assert_close(logits(teacher), logits(tp.pack(tp.detach(dense))), atol=1e-5, rtol=0)
    names = {file.name for file in (tmp_path / "checkpoint-12").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert trainer.model.base_model.model.token_pruner.objective.teacher is None


def test_the_best_adapter_is_loaded_at_the_end(base_folder, tmp_path):
    marks = iter([0, 0, 1, 0])
    trainer = trained(
        tmp_path, model=lora(base_folder), eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3,
        load_best_model_at_end=True, metric_for_best_model="mark", compute_metrics=lambda _: {"mark": next(marks)},
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-9")
    assert torch.equal(logits(PeftModel.from_pretrained(base(base_folder), tmp_path / "checkpoint-9")), logits(trainer.model))


# A pruning adapter


def test_a_pruning_adapter_leaves_the_model_and_trains_gates_alone(alone, base_folder):
    trainer, _ = alone
    model = trainer.model
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning
    assert all("pruner" in name for name in learning)
    assert 0.45 < spent_share(inside(model), Texts()) < 0.56
    expected = base(base_folder)
    for name, parameter in expected.named_parameters():
        assert torch.equal(inside(model).get_parameter(name), parameter)
    assert any(parameter.abs().max() > 0 for parameter in inside(model).token_pruner.training_state.parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(expected))
    assert not torch.allclose(logits(model), logits(expected), atol=1e-4)


def test_a_pruning_adapter_holds_selectors_alone_and_opens_after_an_import(alone, base_folder):
    trainer, folder = alone
    selectors = trainer.model.get_base_model().token_pruner.sites.state_dict()
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("pruning_adapters" in name for name in weights)
    small = 100  # numbers of the training state: gates, lengths
    assert 0 < sum(map(torch.numel, weights.values())) - sum(map(torch.numel, selectors.values())) < small
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is tp.peft.TokenPruneConfig
    assert config.target_macs == 0.55
    model = PeftModel.from_pretrained(base(base_folder), folder)
    assert torch.equal(logits(model), logits(trainer.model))
    auto = AutoPeftModel.from_pretrained(folder)
    assert torch.equal(logits(auto), logits(trainer.model))
    merged = model.merge_and_unload()
    assert tp.detach(merged).__class__ is hf.BertForSequenceClassification


def test_importing_hf_tokenprune_is_enough(alone, base_folder):
    code = (
        "import sys, hf_tokenprune\nfrom transformers import AutoModelForSequenceClassification as A\nfrom peft import PeftModel\n"
        "model = PeftModel.from_pretrained(A.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(model.peft_config['default'].peft_type, len(model.get_base_model().token_pruner.sites))"
    )
    run = subprocess.run([sys.executable, "-c", code, base_folder, str(alone[1])], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "TOKEN_PRUNE 3", run.stderr


def test_without_peft_everything_else_is_there():
    code = (
        "import sys\nsys.modules['peft'] = None\nimport hf_tokenprune as tp\nassert tp.pack\n"
        "try:\n    tp.peft\nexcept ImportError:\n    print('ok')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "ok", run.stderr


WRONG = {
    "method": {"method": "cofi"},
    "target_macs": {"target_macs": 1.5},
    "settings": {"settings": {"bins": 3}},
    "annealing": {"settings": {"schedule": {"annealing": 1}}},
    "cut weights": {"method": "infor_coef", "settings": {"static_macs": 0.7, "schedule": {"static": 1}}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_of_a_pruning_adapter_is_refused_by_name(name):
    with pytest.raises(tp.errors.ConfigError, match=name):
        pruning(**WRONG[name])


def test_a_damaged_or_foreign_adapter_is_refused(alone, base_folder, tmp_path):
    folder = shutil.copytree(alone[1], tmp_path / "damaged")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["token_pruning"]["sites"][0]["layer"] = 17
    file.write_text(json.dumps(config))
    with pytest.raises(tp.errors.ConfigError, match="site at layer 17"):
        PeftModel.from_pretrained(base(base_folder), folder)
    config["token_pruning"] = {"version": 99}
    file.write_text(json.dumps(config))
    with pytest.raises(tp.errors.ConfigError, match="format 99"):
        PeftModel.from_pretrained(base(base_folder), folder)
