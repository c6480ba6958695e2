"""What the folder of an adapter that drops tokens tells whoever opens it: its card, and what refuses it as a model."""

import re

import pytest
import transformers as hf
from families import build
from hub_server import run_as_writer, running_hub
from peft import LoraConfig, PeftModel, get_peft_model
from training_helpers import top, trainer_for

import hf_tokenprune as tp
from hf_tokenprune import cli
from hf_tokenprune.readme import is_edited

HEAD = "ForSequenceClassification"


def pruning_adapter():
    return get_peft_model(build("bert", HEAD), tp.peft.TokenPruneConfig(target_macs=0.55, settings={"rank_bins": 8}))


def plain_adapter():
    return get_peft_model(build("bert", HEAD), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))


def says_how(file):
    text = file.read_text()
    assert not is_edited(text), "by a person"
    return text.count("import hf_tokenprune\n") == text.count("hf_tokenprune: begin") == text.count("merge_and_unload()") == 1


def test_the_card_of_an_adapter_says_what_opens_it(tmp_path):
    card = tmp_path / "README.md"
    for _ in range(2):  # the second time over our own
        pruning_adapter().save_pretrained(tmp_path)
        assert says_how(card)
    build("bert", HEAD).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    (code,) = re.findall(r"```python\n(import hf_tokenprune.*?)```", card.read_text(), re.DOTALL)
    names = {"base": base, "adapter": str(tmp_path)}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert len(names["model"].get_base_model().token_pruner.sites)


def test_a_trainer_keeps_it_in_its_own_card(tmp_path):
    model = plain_adapter()
    trainer = trainer_for(tmp_path, top(), model=model)
    trainer.train()
    card = tmp_path / "README.md"
    for _ in range(2):
        trainer.save_model()
        assert says_how(card)
        trainer.create_model_card()
        assert says_how(card)
        assert "Training hyperparameters" in card.read_text()


def test_words_of_a_person_stay_and_an_adapter_of_peft_gets_none(tmp_path):
    card = tmp_path / "README.md"
    plain_adapter().save_pretrained(tmp_path)
    assert "hf_tokenprune" not in card.read_text()
    pruning_adapter().save_pretrained(tmp_path)
    for before, words in (("# Model Card", "# My Model Card"), ("before:", "before, please:")):
        card.write_text(card.read_text().replace(before, words, 1))
        pruning_adapter().save_pretrained(tmp_path)
        assert words in card.read_text()
        assert is_edited(card.read_text())
    card.write_text("Mine.\n")
    pruning_adapter().save_pretrained(tmp_path)
    assert "Mine." in card.read_text()
    assert "hf_tokenprune" not in card.read_text()


@pytest.mark.parametrize("make", [pruning_adapter, plain_adapter])
def test_an_adapter_where_a_model_belongs_is_told_from_a_folder_without_one(tmp_path, capsys, make):
    make().save_pretrained(tmp_path)
    with pytest.raises(tp.errors.ConfigError, match=r"holds an adapter.*merge_and_unload\(\)"):
        tp.from_pretrained(tmp_path)
    for command in (["push", tmp_path, "user/name"], ["bench", tmp_path], ["explain", tmp_path, "a text"]):
        assert cli.main(list(map(str, command))) == 1
        assert "holds an adapter" in capsys.readouterr().err


PUSHER = """
import hf_tokenprune as tp
from test_adapter_cards import pruning_adapter

pruning_adapter().push_to_hub("user/adapter")
try:
    tp.from_pretrained("user/adapter")
except tp.errors.ConfigError as error:
    assert "holds an adapter" in str(error), error
else:
    raise AssertionError("it was opened")
"""


def test_an_adapter_on_the_hub_is_told_from_a_model_too(tmp_path):
    with running_hub() as hub:
        run_as_writer(hub, PUSHER, home=tmp_path / "home")
