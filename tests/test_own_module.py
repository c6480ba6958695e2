"""A module of the user's own around an encoder: the Trainer writes its bare weights, and the encoder lies beside them."""

from pathlib import Path

import pytest
import torch
from families import build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_trainers import embedder, save_models
from torch import nn
from training_helpers import Texts, assert_same_state, at_home, collate, no_dropout, spent_share, top, trainer_for
from transformers import AutoModel, Trainer
from weights_helpers import both, weights

import hf_tokenprune as tp
from hf_tokenprune.checkpoints import STATE, is_complete

METHODS = {"tokens": top, "weights": weights, "both": both}
SAVING = {"save_strategy": "steps", "save_steps": 4}


class Judge(nn.Module):
    """What a user writes around a base model."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = build("bert", "Model", **no_dropout()), nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def opened(folder, encoder):
    """As the callback's docstring says."""
    module = Judge()
    module.encoder = encoder
    left = module.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not left.missing_keys
    assert all(name.startswith("encoder.token_pruner.training_state.") for name in left.unexpected_keys)
    return at_home(module).eval()


def said(module):
    inputs = collate([Texts(8)[row] for row in range(8)])
    with torch.no_grad():
        return module(inputs["input_ids"], inputs["attention_mask"])["logits"]


@pytest.mark.parametrize("name", METHODS)
def test_every_folder_has_what_opens_it(tmp_path, name):
    trainer = trainer_for(tmp_path, METHODS[name](), model=Judge(), **SAVING)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    trainer.save_model()
    expected = said(at_home(trainer.model).eval())
    for folder in (tmp_path / "checkpoint-12", tmp_path / "saved", tmp_path):
        assert torch.equal(said(opened(folder, tp.from_pretrained(folder / "encoder"))), expected)
    by_its_code = AutoModel.from_pretrained(tmp_path / "encoder", trust_remote_code=True)
    assert torch.equal(said(opened(tmp_path, by_its_code)), expected)
    assert opened(tmp_path / "checkpoint-4", tp.from_pretrained(tmp_path / "checkpoint-4" / "encoder"))
    assert spent_share(trainer.model.encoder, Texts(8)) < 0.6
    assert not (tmp_path / "config.json").exists(), "the folder itself is no model that AutoModel knows"


def test_a_run_resumes_with_the_module_as_it_was_made(tmp_path):
    whole = trainer_for(tmp_path, weights(), model=Judge(), **SAVING)
    whole.train()
    again = trainer_for(tmp_path, weights(), model=Judge(), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_same_state(again.model.state_dict(), whole.model.state_dict())


class Looks(Trainer):
    """Sees what is there when the weights are to be written."""

    seen = ()

    def _save(self, output_dir=None, state_dict=None):
        self.seen = (*self.seen, {str(file.relative_to(output_dir)) for file in Path(output_dir).glob("**/*")})
        super()._save(output_dir, state_dict)


def test_no_weights_and_no_complete_checkpoint_without_the_encoder(tmp_path):
    trainer = trainer_for(tmp_path, top(), model=Judge(), trainer=Looks, **SAVING)
    trainer.train()
    assert len(trainer.seen) == 3
    for files in trainer.seen:
        assert {"encoder/config.json", "encoder/model.safetensors"} <= files
        assert not {"model.safetensors", STATE} & files
    assert is_complete(tmp_path / "checkpoint-12")


def test_what_is_pushed_during_training_has_it(tmp_path):
    trainer = trainer_for(tmp_path, top(), model=Judge(), max_steps=6)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert tp.from_pretrained(tmp_path / "encoder").config.token_pruning == trainer.model.encoder.config.token_pruning
    assert not (tmp_path / "config.json").exists()


class Deeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"judge": Judge()})

    def forward(self, **inputs):
        return self.parts["judge"](**inputs)


ALONE = {
    "a model": lambda _: build("bert", "ForSequenceClassification"),
    "compiled": lambda _: torch.compile(build("bert", "ForSequenceClassification")),
    "adapters": lambda _: get_peft_model(build("bert", "ForSequenceClassification"), LoraConfig(target_modules=["query"])),
    "sentence-transformers": lambda factory: embedder(save_models(factory)),
}
AROUND = {
    "encoder": lambda _: Judge(),
    "parts.judge.encoder": lambda _: Deeper(),
    "_compiled": lambda _: torch.compile(Judge()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # of torch.compile
@pytest.mark.parametrize("name", [*ALONE, *AROUND])
def test_the_place_of_the_encoder(tmp_path_factory, name):
    callback = tp.TokenPruneCallback(top())
    callback.attach({**ALONE, **AROUND}[name](tmp_path_factory))
    assert callback.place == (None if name in ALONE else "encoder" if name == "_compiled" else name)
