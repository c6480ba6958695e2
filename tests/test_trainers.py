"""Trainers other than `transformers.Trainer`, unmodified, with one callback; what they save opens without this package.

The heads of `transformers.Trainer` are a table in `test_training.py`.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers as hf
from datasets import Dataset
from families import build
from huggingface_hub import ModelCard
from peft import LoraConfig
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training_helpers import PullMethod, Recorder, at_home, logged, no_dropout, top

import hf_tokenprune as tp
from hf_tokenprune.bench import bench
from hf_tokenprune.publish import push

WORDS = [f"w{number}" for number in range(100)]
TEXTS = [" ".join(WORDS[(7 * row + 3 * place) % 100] for place in range(4 + row % 17)) for row in range(24)]
COLUMNS = {"anchor": TEXTS, "positive": TEXTS[1:] + TEXTS[:1], "negative": TEXTS[5:] + TEXTS[:5]}
TRIPLETS = Dataset.from_dict(COLUMNS)
SCORED = Dataset.from_dict({**dict(list(COLUMNS.items())[:2]), "label": [float(row % 2) for row in range(24)]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_models(tmp_path_factory)


def save_models(tmp_path_factory):
    """Saved tiny BERTs by head, each with a tokenizer."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=60, **names)
    found = {}
    for head in ("Model", "ForSequenceClassification", "ForMaskedLM"):
        folder = found[head] = str(tmp_path_factory.mktemp(head))
        build("bert", head, num_labels=1, **no_dropout()).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


def embedder(folders):
    return SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "mean"), Normalize()], device="cpu")


def reranker(folders):
    return CrossEncoder(folders["ForSequenceClassification"], device="cpu")


def sparse(folders):
    return SparseEncoder(
        modules=[Transformer(folders["ForMaskedLM"], transformer_task="fill-mask"), SpladePooling()], device="cpu"
    )


def splade(model):
    return SpladeLoss(model, SparseMultipleNegativesRankingLoss(model), document_regularizer_weight=1e-3)


# how to make it, its Trainer, arguments, loss, data, forwards per step in which the auxiliary loss rides
ROWS = {
    "embedder": (embedder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, MultipleNegativesRankingLoss, TRIPLETS),
    "embedder, pairs": (embedder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, CoSENTLoss, SCORED),
    "embedder, cached": (
        embedder, SentenceTransformerTrainer, SentenceTransformerTrainingArguments,
        lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), TRIPLETS,
    ),
    "reranker": (reranker, CrossEncoderTrainer, CrossEncoderTrainingArguments, BinaryCrossEntropyLoss, SCORED),
    "sparse": (sparse, SparseEncoderTrainer, SparseEncoderTrainingArguments, splade, TRIPLETS),
}  # fmt: skip
PUBLISHED = ("embedder", "reranker", "sparse")


def encode(model, texts=tuple(TEXTS[:9])):
    """Whatever a model says of some texts."""
    if isinstance(model, CrossEncoder):
        return torch.tensor(model.predict([(text, texts[0]) for text in texts], show_progress_bar=False))
    found = model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return found.to_dense() if found.is_sparse else found


def trainer_for(row, folders, folder, method=None, callbacks=(), model=None, **arguments):
    make, trainer, arguments_class, loss, data = ROWS[row]
    settings = {
        "per_device_train_batch_size": 6, "max_steps": 9, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, **arguments,
    }  # fmt: skip
    model = make(folders) if model is None else model
    made = trainer(
        model=model, args=arguments_class(str(folder), **settings), train_dataset=data, eval_dataset=data, loss=loss(model),
        callbacks=[*callbacks, tp.TokenPruneCallback(top(target_macs=0.6) if method is None else method)],
    )  # fmt: skip
    made.remove_callback(hf.PrinterCallback)
    return made


def inside(model):
    """The transformers model in it."""
    return model.transformers_model


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """By row, a Trainer that has trained, the folder it saved, and what each step's last forward did."""
    runs = {}

    def run(row):
        if row not in runs:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("run")
            look = Recorder(look=lambda model: [sum(layer.survived) for layer in inside(model).token_pruner.trace])
            trainer = trainer_for(row, folders, folder, callbacks=[look])
            trainer.train()
            trainer.save_model(str(folder / "saved"))
            runs[row] = trainer, folder / "saved", look.looks
        return runs[row]

    return run


@pytest.mark.parametrize("row", ROWS)
def test_an_unmodified_trainer_prunes_and_logs(trained, row):
    trainer, _, looks = trained(row)
    assert isinstance(inside(trainer.model), hf.PreTrainedModel)
    assert looks[0][2] == looks[0][0], "dense at first"
    assert looks[-1][2] < looks[-1][0], "pruned in the end"
    assert logged(trainer, "pruning_phase")[0] == 0
    assert logged(trainer, "pruning_phase")[-1] == 3
    assert 0.5 < logged(trainer, "macs_realised")[-1] < 0.65
    assert len(logged(trainer, "distillation")) == 6
    assert min(logged(trainer, "distillation")[1:]) > 0
    assert max(logged(trainer, "soft_hard_gap")) > 0
    numbers = [value for entry in trainer.state.log_history for value in entry.values()]
    assert torch.tensor(numbers).isfinite().all()


FRESH = """
import json, sys
sys.modules["hf_tokenprune"] = None
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
found = {}
texts = json.loads(sys.argv[2])
for row, (folder, kind) in json.loads(sys.argv[1]).items():
    model = globals()[kind](folder, trust_remote_code=True, device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    if kind == "CrossEncoder":
        said = torch.tensor(model.predict([(text, texts[0]) for text in texts], show_progress_bar=False))
    else:
        said = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        said = said.to_dense() if said.is_sparse else said
    trace = model.transformers_model.token_pruner.trace
    found[row] = said.tolist(), [sum(layer.survived) for layer in trace], type(model[0]).__name__
print("FOUND", json.dumps(found))
"""


def test_what_is_saved_opens_and_encodes_packed_without_this_package(trained):
    table = {row: (str(trained(row)[1]), type(trained(row)[0].model).__name__) for row in PUBLISHED}
    command = [sys.executable, "-c", FRESH, json.dumps(table), json.dumps(TEXTS[:9])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.split("FOUND ")[1])
    for row in PUBLISHED:
        model = at_home(trained(row)[0].model.eval())
        expected = encode(model)
        said, survived, name = found[row]
        torch.testing.assert_close(torch.tensor(said), expected, atol=1e-6, rtol=0)
        assert survived == [sum(layer.survived) for layer in inside(model).token_pruner.trace]
        assert survived[2] < survived[0] <= 9 * 40
        assert name == "Transformer"


@pytest.mark.parametrize("row", PUBLISHED)
def test_what_is_saved_opens_with_this_package_and_executes_nothing(trained, row):
    trainer, folder, _ = trained(row)
    model = tp.sentence_transformers.from_pretrained(str(folder), model_class=type(trainer.model), device="cpu")
    assert type(model[0]) is Transformer
    assert type(inside(model)).__module__.startswith("hf_tokenprune."), "none of the folder's code"
    assert "training_state" not in " ".join(model.state_dict())
    assert torch.equal(encode(at_home(model)), encode(at_home(trainer.model.eval())))


@pytest.mark.parametrize("row", PUBLISHED)
def test_the_published_card_keeps_theirs_and_says_how_to_open_it(trained, row):
    trainer, folder, _ = trained(row)
    kind, before = type(trainer.model).__name__, ModelCard((folder / "README.md").read_text()).text
    card = ModelCard(push(folder, "user/name", dry_run=True).card)
    assert card.text.startswith(before.partition("<!-- hf_tokenprune")[0])
    assert card.data.library_name == "sentence-transformers"
    theirs, ours = re.findall(r"```python\n(.*?)```", card.text.partition("hf_tokenprune: begin")[2], re.DOTALL)
    assert theirs == f'from sentence_transformers import {kind}\n\nmodel = {kind}("user/name", trust_remote_code=True)\n'
    names = {}
    exec(ours.replace("user/name", str(folder)), names)
    assert type(names["model"]) is type(trainer.model)
    assert torch.equal(encode(at_home(names["model"])), encode(at_home(trainer.model.eval())))


def test_what_a_person_wrote_beside_sentence_transformers_stays(trained, tmp_path):
    shutil.copytree(trained("embedder")[1], tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("Written by me.\n")
    published = push(tmp_path / "mine", "user/name", dry_run=True)
    assert (published.card, published.card_is_theirs) == ("Written by me.\n", True)


@pytest.mark.parametrize("row", PUBLISHED)
def test_what_their_trainers_publish_says_how_it_is_opened(folders, tmp_path, caplog, row):
    """`push_to_hub` of a Trainer saves, and then calls `create_model_card`."""
    trainer = trainer_for(row, folders, tmp_path, max_steps=3)
    trainer.train()
    trainer.evaluate()
    for _ in range(2):  # the second time over our own
        trainer.save_model(_internal_call=True)
        trainer.create_model_card()
        text = (tmp_path / "README.md").read_text()
        assert text.count("hf_tokenprune: begin") == 1
        assert "trust_remote_code=True" in text
        assert "MACs reduction, true length" in text
    assert "written by hand" not in caplog.text


def same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), (key, (found[key].double() - value.double()).abs().max())


@pytest.mark.parametrize("row", ["embedder", "embedder, cached", "reranker"])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(folders, tmp_path, row):
    ways = []
    for folder, resume in ((tmp_path / "whole", None), (tmp_path / "resumed", str(tmp_path / "resumed" / "checkpoint-5"))):
        torch.manual_seed(0)
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoint-5", resume)
            shutil.copytree(tmp_path / "whole" / "_teacher", folder / "_teacher")
        trainer = trainer_for(row, folders, folder, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        ways.append(trainer.model.state_dict())
    same_state(*ways)


def test_the_best_model_is_loaded_at_the_end(folders, tmp_path):
    trainer = trainer_for(
        "embedder", folders, tmp_path, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    checkpoint = tp.sentence_transformers.from_pretrained(best, device="cpu")
    assert torch.equal(encode(at_home(checkpoint)), encode(at_home(trainer.model.eval())))


def test_cut_weights_resume_and_open(folders, tmp_path):
    """Surgery in mid-run: a later checkpoint is of a smaller model than the one it is loaded into."""
    method = tp.StructuredPruning(target_macs=0.5, schedule=tp.Schedule(dense=1, anneal=1, settle=1), layer_weight=0)
    ways = []
    for folder, resume in ((tmp_path / "whole", None), (tmp_path / "resumed", str(tmp_path / "resumed" / "checkpoint-7"))):
        torch.manual_seed(0)
        if resume:
            shutil.copytree(tmp_path / "whole" / "checkpoint-7", resume)
            shutil.copytree(tmp_path / "whole" / "_teacher", folder / "_teacher")
        trainer = trainer_for("embedder", folders, folder, method, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        ways.append(trainer.model)
    assert inside(ways[0]).config.token_pruning["shapes"]
    same_state(*(model.state_dict() for model in ways))
    found = tp.sentence_transformers.from_pretrained(str(tmp_path / "whole" / "checkpoint-9"), device="cpu")
    assert torch.equal(encode(at_home(found)), encode(at_home(ways[0].eval())))


class Sizes(hf.TrainerCallback):
    """The gradient of the auxiliary loss in each step."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.found.append(inside(model).token_pruner.training_state.w.grad.item())


# With 24 samples in micro-batches of two, the third step has two of them, not five.
@pytest.mark.parametrize(("accumulation", "size"), [(1, 6), (2, 3), (5, 2)])
@pytest.mark.parametrize("row", ROWS)
def test_the_auxiliary_loss_counts_once_however_many_forwards_a_step_has(folders, tmp_path, row, accumulation, size):
    sizes = Sizes()
    trainer_for(
        row, folders, tmp_path, PullMethod(), callbacks=[sizes], max_steps=3, max_grad_norm=0,
        per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
    ).train()  # fmt: skip
    assert sizes.found == pytest.approx([3, 3, 3])


def test_the_forwards_of_a_step_have_the_same_gates(folders, tmp_path):
    """Also where activation checkpointing computes them once more, after the last of them."""
    method = tp.StructuredPruning(target_macs=0.5, schedule=tp.Schedule(dense=0, anneal=1, settle=0), teacher=None)
    ways = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = trainer_for("embedder", folders, tmp_path, method, max_steps=4)
        if checkpointing:
            inside(trainer.model).activation_checkpointing_enable()
        trainer.train()
        ways.append({key: value for key, value in trainer.model.state_dict().items() if "sizes" not in key})
    same_state(*ways)


def test_a_gradient_cached_loss_repeats_its_forwards_exactly(folders, tmp_path):
    """With dropout, and from the first mini-batch of each step on: nothing else is drawn at random inside of what is repeated."""
    model = embedder(folders)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    method = top(schedule=tp.Schedule(dense=0, anneal=1, settle=0), teacher=None)
    trainer = trainer_for("embedder, cached", folders, tmp_path, method, model=model, max_steps=2, logging_strategy="no")
    found = {False: [], True: []}
    model.register_forward_hook(
        lambda _module, _args, output: found[torch.is_grad_enabled()].append(output["sentence_embedding"].detach())
    )
    trainer.train()
    assert len(found[False]) == len(found[True]) == 2 * 3 * 2  # steps, columns, mini-batches
    for first, again in zip(found[False], found[True], strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("row", ["embedder", "sparse"])
def test_the_teacher_teaches_the_embedding(folders, row):
    """What is compared is what the modules after the transformers model make of its output; without gradients of their own."""
    model = ROWS[row][0](folders)
    callback = tp.TokenPruneCallback(top())
    assert callback.attach(model) is model
    model.eval()
    features = model.preprocess(TEXTS[:5])
    with torch.no_grad():
        expected = model(dict(features))["sentence_embedding"]
        found = callback.objective.readout(inside(model)(**features))
    assert torch.equal(found, expected)
    assert type(model[0]) is not Transformer
    assert type(tp.detach(model)[0]) is Transformer


# Without training

LOADED = {"embedder": embedder, "reranker": reranker, "sparse": sparse}


@pytest.mark.parametrize("kind", LOADED)
def test_pack_attach_and_detach_take_a_loaded_model_and_return_it(folders, kind):
    model = LOADED[kind](folders).eval()
    state, expected = list(model.state_dict()), encode(model)
    assert tp.pack(model) is model
    torch.testing.assert_close(encode(model), expected, atol=1e-5, rtol=0)
    assert inside(model).token_pruner.trace[0].entered == sorted(inside(model).token_pruner.trace[0].entered)
    assert tp.attach(model, {1: tp.TopK(0.3)}) is model
    assert not torch.allclose(encode(model), expected, atol=1e-3)
    assert tp.detach(model) is model
    assert torch.equal(encode(model), expected)
    assert list(model.state_dict()) == state
    assert type(model[0]) is Transformer


def test_dropped_tokens_are_pooled_with_the_state_with_which_they_left(folders):
    """The mean of what `output_hidden_states` says of the layers that each token passed."""
    model = SentenceTransformer(modules=[Transformer(folders["Model"]), Pooling(32, "mean")], device="cpu").eval()
    tp.attach(model, {1: tp.TopK(2)})
    features = model.preprocess(TEXTS[2:4])
    with torch.no_grad():
        found = model(dict(features))["sentence_embedding"]
        states = inside(model)(**features, output_hidden_states=True).hidden_states
    real = features["attention_mask"].bool()
    moved = (states[-1] != states[1]).any(-1) & real
    assert moved.sum(1).tolist() == [3, 3], "the first and two others go through all layers"
    mixed = torch.where(moved[..., None], states[-1], states[1])
    for row in range(2):
        torch.testing.assert_close(found[row], mixed[row][real[row]].mean(0), atol=1e-5, rtol=0)


def test_training_leaves_a_model_that_copies_pickles_and_detaches(trained):
    model = trained("embedder, pairs")[0].model
    expected = encode(at_home(model.eval()))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(encode(twin), expected)
    assert type(twin[0]) is Transformer
    plain = tp.detach(twin)
    assert type(inside(plain)) is hf.BertModel
    assert not torch.allclose(encode(plain), expected, atol=1e-3)


# What cannot be pruned


def test_a_model_that_generates_is_refused_with_the_reason():
    tiny = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 30, "decoder_start_token_id": 0}
    for model in (
        hf.T5ForConditionalGeneration(hf.T5Config(**tiny)),
        hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)),
        hf.EncoderDecoderModel(encoder=build("bert", "Model"), decoder=hf.BertLMHeadModel(hf.BertConfig(**{
            **build("bert", "Model").config.to_dict(), "is_decoder": True, "add_cross_attention": True,
        }))),
    ):  # fmt: skip
        with pytest.raises(tp.errors.UnsupportedModelError, match="generates text"):
            tp.pack(model)


def test_a_seq2seq_trainer_that_generates_is_refused_with_the_reason(tmp_path):
    args = hf.Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, report_to=[], use_cpu=True)
    callback = tp.TokenPruneCallback(top())
    with pytest.raises(tp.errors.TrainingError, match="predict_with_generate"):
        hf.Seq2SeqTrainer(build("bert", "ForSequenceClassification"), args, callbacks=[callback])


def test_adapters_inside_of_a_sentence_transformer_are_refused(folders, tmp_path):
    model = embedder(folders)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(tp.errors.TrainingError, match="saved without a pruner"):
        trainer_for("embedder", folders, tmp_path, model=model)


def test_several_transformers_models_in_one_are_refused():
    both = torch.nn.ModuleList([build("bert", "Model"), build("roberta", "Model")])
    with pytest.raises(tp.errors.UnsupportedModelError, match="BertModel, RobertaModel in it"):
        tp.pack(both)
    with pytest.raises(tp.errors.UnsupportedModelError, match="none in it"):
        tp.pack(torch.nn.Linear(2, 2))


def test_what_looks_at_a_model_finds_it_in_its_wrapper(folders):
    model = tp.pack(embedder(folders))
    inner, texts = inside(model), TEXTS[:3]
    inputs = model.tokenizer(texts, padding=True, return_tensors="pt")
    assert tp.token_depths(model, inputs).depths.equal(tp.token_depths(inner, inputs).depths)
    meter = tp.cost.CostMeter(model)
    model.encode(texts)
    meter.update()
    assert meter.cost.sequences == 3
    assert tp.cost.trace_macs(model) == tp.cost.trace_macs(inner)
    assert bench(model, texts, tokenizer=model.tokenizer, batch_sizes=[2], repeats=1)["class"] == "BertModel"
    found = tp.report(model, texts, tokenizer=model.tokenizer, repeats=1)
    assert (found.name, len(found.samples)) == ("BertModel", 3)


def test_texts_are_no_longer_put_into_one_row_once_a_model_packs_them_itself(folders, monkeypatch):
    """sentence-transformers does so for FlashAttention, and asks once."""
    monkeypatch.setattr(Transformer, "_can_flatten_inputs", lambda self: self.config._attn_implementation != "token_pruning")
    model = embedder(folders)
    model[0].unpad_inputs = None
    assert model[0].can_flatten_inputs
    tp.pack(model)
    assert not model[0].can_flatten_inputs
    tp.detach(model)
    assert model[0].can_flatten_inputs


def test_a_sparse_model_of_the_older_kind_opens_token_pruned(folders, tmp_path):
    """Published SPLADE models name a module class of their own."""
    model = SparseEncoder(modules=[MLMTransformer(folders["ForMaskedLM"]), SpladePooling()], device="cpu")
    tp.attach(model, {1: tp.TopK(0.5)})
    model.save_pretrained(str(tmp_path))
    assert "MLMTransformer" in (tmp_path / "modules.json").read_text()
    found = tp.sentence_transformers.from_pretrained(str(tmp_path), SparseEncoder, device="cpu")
    assert type(found[0]) is MLMTransformer
    assert len(inside(found).token_pruner.sites) == 1
    assert torch.equal(encode(found), encode(model))
