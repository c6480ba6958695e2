"""Hidden units that something around a base model reads are not cut: what is around it has sizes of its own."""

import pytest
import torch
import transformers as hf
from families import build
from sentence_transformers import (
    SentenceTransformer,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from test_trainers import embedder, encode, inside, reranker, save_models, sparse, trainer_for
from training_helpers import Texts, collate
from weights_helpers import face

import hf_tokenprune as tp


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory)


THIRDS = tp.Schedule(dense=1, anneal=1, settle=1)
CUTTING = {
    "weights": lambda parts: tp.StructuredPruning(target_macs=0.15, parts=parts, schedule=THIRDS),
    "both": lambda parts: tp.Compose(
        tp.StructuredPruning(parts=parts), tp.ToP(rank_bins=8, rank_topk=4), target_macs=0.15, schedule=THIRDS
    ),
    "stages": lambda parts: tp.InforCoef(
        static_macs=0.15, target_macs=0.1, parts=parts, schedule=tp.Schedule(dense=1, static=1, anneal=1, settle=1)
    ),
}


def with_dense(folders):
    return SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "mean"), Dense(32, 8)], device="cpu")


class Judge(torch.nn.Module):
    """What a user writes around a base model."""

    def __init__(self, folder):
        super().__init__()
        self.encoder, self.head = hf.AutoModel.from_pretrained(folder), torch.nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0])
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("name", CUTTING)
@pytest.mark.parametrize("make", [embedder, with_dense])
def test_hidden_units_that_pooling_reads_stay(folders, tmp_path, make, name):
    trainer = trainer_for("embedder", folders, tmp_path, CUTTING[name](None), model=make(folders))
    trainer.train()
    model = trainer.model
    shapes = inside(model).config.token_pruning["shapes"]
    assert shapes["hidden"] == 32
    assert shapes["layers"] != [{"layer": i, "heads": 4, "units": 48} for i in range(4)]
    assert encode(model).shape[1] == model.get_embedding_dimension()


def test_hidden_units_that_a_module_of_ones_own_reads_stay(folders, tmp_path):
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=9, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    callbacks = [tp.TokenPruneCallback(CUTTING["weights"](None))]
    trainer = hf.Trainer(
        Judge(folders["Model"]), arguments, train_dataset=Texts(24), data_collator=collate, callbacks=callbacks
    )
    trainer.train()
    shapes = trainer.model.encoder.config.token_pruning["shapes"]
    assert shapes["hidden"] == 32
    assert shapes["layers"] != [{"layer": i, "heads": 4, "units": 48} for i in range(4)]


@pytest.mark.parametrize("name", CUTTING)
@pytest.mark.parametrize("make", [embedder, with_dense, lambda folders: Judge(folders["Model"])])
def test_hidden_units_that_others_read_are_not_cut_if_asked_for(folders, make, name):
    model = make(folders)
    before = [face(part) for part in model.modules() if isinstance(part, hf.PreTrainedModel)]
    with pytest.raises(tp.errors.UnsupportedModelError, match=f"'hidden'.*{type(model).__name__}.*parts="):
        tp.TokenPruneCallback(CUTTING[name](("hidden", "units"))).attach(model)
    assert [face(part) for part in model.modules() if isinstance(part, hf.PreTrainedModel)] == before


@pytest.mark.parametrize(("make", "parts", "cut"), [
    (reranker, None, True), (sparse, None, True), (lambda _: build("bert", "Model"), None, False),
    (lambda _: build("bert", "Model"), ("hidden", "units"), True),
])  # fmt: skip
def test_hidden_units_that_a_head_of_its_own_reads_may_go(folders, make, parts, cut):
    """And those of a base model, if asked for: who trains it without a head reads them himself."""
    model = tp.TokenPruneCallback(CUTTING["weights"](parts)).attach(make(folders))
    inner = next(part for part in model.modules() if isinstance(part, hf.PreTrainedModel))
    assert ("hidden" in inner.token_pruner.structure.layout.parts) == cut
