"""Models of sentence-transformers outside of their Trainers: opened from a folder of transformers' own, saved, copied, pushed."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import sentence_transformers
import torch
from hub_server import run_as_writer, running_hub
from sentence_transformers import CrossEncoder, SentenceTransformer
from test_trainers import PUBLISHED, encode, inside, save_models, trainer_for
from training_helpers import at_home

import hf_tokenprune as tp
from hf_tokenprune.modeling.modeling_token_pruned import is_token_pruned
from hf_tokenprune.readme import is_edited


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory)


@pytest.fixture
def saved(folders, tmp_path):
    """An embedder that was saved with its sites, as its Trainer would."""
    trainer = trainer_for("embedder", folders, tmp_path / "run", max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return tmp_path / "saved"


def says_how(text):
    """Does all code in a card open the model as it is: theirs, ours, and that of this package?"""
    codes = re.findall("^model = .*", text, re.M)
    as_it_is = ["trust_remote_code=True)" in code or "hf_tokenprune.sentence_transformers" in code for code in codes]
    return text.count("hf_tokenprune: begin") == 1 and "Without `trust_remote_code`" in text and as_it_is == [True] * 3


def plain(folders, head, place):
    """What a plain Trainer leaves: no modules.json."""
    model = tp.from_pretrained(folders[head])
    tp.attach(model, {1: tp.TopK(0.5)}).save_pretrained(place)
    for file in Path(folders[head]).glob("token*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


def test_a_folder_of_a_plain_trainer_opens_pruned(folders, tmp_path):
    folder = plain(folders, "ForSequenceClassification", tmp_path / "plain")
    model = tp.sentence_transformers.from_pretrained(str(folder), CrossEncoder, device="cpu")
    assert is_token_pruned(inside(model))
    encode(model)
    assert inside(model).token_pruner.trace[2].survived != inside(model).token_pruner.trace[0].survived
    expected = tp.from_pretrained(folder)
    inputs = {"input_ids": torch.arange(1, 21)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    assert torch.equal(at_home(inside(model))(**inputs).logits, at_home(expected)(**inputs).logits)
    model.save(str(tmp_path / "again"))
    again = tp.sentence_transformers.from_pretrained(str(tmp_path / "again"), CrossEncoder, device="cpu")
    assert torch.equal(encode(at_home(again)), encode(model))
    folder = plain(folders, "Model", tmp_path / "model")
    model = tp.sentence_transformers.from_pretrained(str(folder), device="cpu")
    assert is_token_pruned(inside(model))


def test_a_folder_of_another_head_is_refused(folders, tmp_path):
    folder = plain(folders, "ForSequenceClassification", tmp_path / "plain")
    with pytest.raises(tp.errors.ConfigError, match="BertForSequenceClassification"):
        tp.sentence_transformers.from_pretrained(str(folder), device="cpu")


def test_a_saved_model_says_how_it_is_opened(saved, tmp_path):
    assert says_how((saved / "README.md").read_text()), "of the Trainer's model"
    model = tp.sentence_transformers.from_pretrained(str(saved), device="cpu")
    for number, twin in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        place = tmp_path / str(number)
        twin.save(str(place))
        assert says_how((place / "README.md").read_text())
        assert torch.equal(encode(at_home(twin)), encode(at_home(model)))
    assert "_create_model_card" not in vars(SentenceTransformer)
    (saved / "README.md").write_text("Written by me.\n")
    model = tp.sentence_transformers.from_pretrained(str(saved), device="cpu")
    model.save(str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "README.md").read_text() == "Written by me.\n"
    tp.detach(model)
    model.save(str(tmp_path / "dense"))
    assert (tmp_path / "dense" / "README.md").read_text() == "Written by me.\n"


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_code_of_their_own_cards_opens_the_model_as_it_is(folders, tmp_path, row):
    """Wherever they say that the model is; the text around it stays, and none of it is a person's."""
    trainer = trainer_for(row, folders, tmp_path, max_steps=3)
    trainer.train()
    file = tmp_path / "README.md"
    for again in range(2):
        trainer.save_model()
        assert says_how(file.read_text())
        if again:
            trainer.create_model_card()
            assert says_how(file.read_text())
        assert not is_edited(file.read_text())
    code = next(code for code in re.findall("^model = .*", file.read_text(), re.M))
    names = vars(sentence_transformers).copy()
    exec(re.sub('"[^"]*"', repr(str(tmp_path)), code), names)
    assert is_token_pruned(inside(names["model"]))


def test_their_trainers_card_is_made_once(folders, tmp_path, monkeypatch):
    from hf_tokenprune.integrations import sentence_transformers
    from hf_tokenprune.trainer_card import describe

    trainer = trainer_for("embedder", folders, tmp_path, max_steps=3)
    trainer.train()
    trainer.save_model()
    made = []
    monkeypatch.setattr(
        sentence_transformers, "describe", lambda *args, **kwargs: made.append(args) or describe(*args, **kwargs)
    )
    trainer.create_model_card()
    assert made == []
    assert says_how((tmp_path / "README.md").read_text())
    trainer.model.save(str(tmp_path / "saved"))
    assert len(made) == 1


PUSHER = """
import sys
from huggingface_hub import HfApi
import hf_tokenprune as tp

model = tp.sentence_transformers.from_pretrained(sys.argv[1], device="cpu")
for again in range(2):
    model.push_to_hub("user/first", exist_ok=True)
HfApi().upload_file(repo_id="user/first", path_in_repo="README.md", path_or_fileobj=b"Written by me.")
model.push_to_hub("user/first", exist_ok=True)
"""


def test_what_is_pushed_says_how_it_is_opened_and_what_a_person_wrote_stays(saved, tmp_path):
    with running_hub() as hub:
        run_as_writer(hub, PUSHER, saved, home=tmp_path / "home")
        *_, before, edited, last = [files["README.md"].decode() for _, files in hub.repositories["user/first"].branches["main"]]
    assert says_how(before)
    assert 'SentenceTransformer("user/first", trust_remote_code=True)' in before
    assert edited == last == "Written by me."
