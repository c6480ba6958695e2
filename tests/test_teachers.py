"""Who may be the teacher, and how it judges."""

import functools

import pytest
import torch
from families import build, make_inputs
from torch.nn import functional
from training_helpers import Texts, assert_same_state, logged, no_dropout, spent_share, top, trained, trainer_for
from transformers import BertForSequenceClassification, BertModel, BertTokenizerFast

import hf_tokenprune as tp
from hf_tokenprune.methods.ranking import RankingLoss
from hf_tokenprune.methods.token_bins import SoftBins
from hf_tokenprune.schedule import Moment

HEAD = "ForSequenceClassification"


def trace_of(model):
    """Whatever a teacher could have been changed in."""
    hooks = [(name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    modes = [module.training for module in model.modules()]
    config = (model.config.to_dict(), model.config._attn_implementation)
    return type(model), hooks, flags, modes, config, {key: value.clone() for key, value in model.state_dict().items()}


TEACHERS = ("folder", "pruned folder", "Path", "model", "bigger model", "pruned model", "None")


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_may_be_given(tmp_path, kind):
    teacher = build("bert", HEAD, seed=3, num_hidden_layers=5 if kind == "bigger model" else 4).train()
    if "pruned" in kind:
        tp.attach(teacher, {1: tp.TopK(0.2)})
    given = teacher
    if "folder" in kind or kind == "Path":
        teacher.save_pretrained(tmp_path / "given")
        given = tmp_path / "given" if kind == "Path" else str(tmp_path / "given")
    elif kind == "None":
        given = None
    before = trace_of(teacher)
    trainer = trained(tmp_path / "run", top(teacher=given), max_steps=6)
    assert bool(logged(trainer, "distillation")) == (given is not None)
    assert bool(logged(trainer, "ranking")) == (given is not None)
    assert not (tmp_path / "run" / "_teacher").exists(), "only the run's own teacher has to be kept"
    after = trace_of(teacher)
    assert after[:-1] == before[:-1]
    assert_same_state(after[-1], before[-1])
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_a_teacher_judges_with_every_token(tmp_path):
    """The same weights teach the same, whether they come dense or with sites."""
    losses = []
    for sites in ({}, {1: tp.TopK(0.2)}):
        teacher = tp.attach(build("bert", HEAD, seed=3), sites)
        losses.append(logged(trained(tmp_path, top(teacher=teacher)), "distillation"))
    assert losses[0] == losses[1]
    assert losses[0][0] > 0


def test_after_training_the_teacher_is_let_go(tmp_path):
    trainer = trained(tmp_path)
    assert trainer.model.token_pruner.objective.teacher is None


def test_a_teacher_with_another_head_is_refused_before_any_step(tmp_path):
    trainer = trainer_for(tmp_path, top(teacher=build("bert", "ForTokenClassification")))
    with pytest.raises(tp.errors.TrainingError, match="BertForTokenClassification, the model to be trained a BertForSequence"):
        trainer.train()
    assert trainer.state.global_step == 0


NAMES = ["contradiction", "neutral", "entailment"]


@pytest.mark.parametrize(
    ("labels", "right"),
    [(NAMES[::-1], False), (["LABEL_2", "LABEL_1", "LABEL_0"], True), ([name.upper() for name in NAMES], True)],
)
def test_a_teacher_that_has_the_same_labels_in_another_order_is_refused(tmp_path, labels, right):
    student, teacher = build("bert", HEAD), build("bert", HEAD, seed=3)
    student.config.id2label, teacher.config.id2label = dict(enumerate(NAMES)), dict(enumerate(labels))
    trainer = trainer_for(tmp_path, top(teacher=teacher), model=student, max_steps=3, data=Texts(24))
    if right:
        trainer.train()
        return
    with pytest.raises(tp.errors.TrainingError, match=f"{', '.join(labels)}, in this order.*{', '.join(NAMES)}: each"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_with_another_head_than_its_config_says_is_refused_at_once(tmp_path):
    """It could not be opened again."""
    model = build("bert", HEAD)
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Linear(8, 3))
    with pytest.raises(tp.errors.UnsupportedModelError, match="not as its config says, in classifier"):
        trainer_for(tmp_path, top(), model=model)
    assert type(model) is BertForSequenceClassification


@pytest.mark.filterwarnings("ignore:.*pooler.*")
def test_a_model_without_its_pooler_is_its_own_teacher(tmp_path):
    """Sentence-transformers and embedding scripts load base models so; the config does not say it."""
    model = BertModel(build("bert", "Model", **no_dropout()).config, add_pooling_layer=False)
    loss = {
        "compute_loss_func": lambda outputs, *_, **__: outputs.last_hidden_state[:, 0].square().mean(),
        "label_names": ["labels"],
    }
    trainer = trained(tmp_path, top(rank_weight=0.0), model=model, **loss)
    assert logged(trainer, "distillation")
    trainer.save_model(tmp_path / "saved")
    assert 0.4 < spent_share(tp.from_pretrained(tmp_path / "saved"), Texts()) < 0.51


@pytest.mark.parametrize("more", [(0, 5), (5, 0)])
def test_a_teacher_with_another_number_of_words_is_told(tmp_path, caplog, more):
    """Some pad their tables."""
    words = build("bert", HEAD).config.vocab_size
    student, teacher = (build("bert", HEAD, vocab_size=words + number) for number in more)
    trainer_for(tmp_path, top(teacher=teacher), model=student, max_steps=3, data=Texts(24)).train()
    assert "only if both have the same tokenizer" in caplog.text


def test_a_teacher_that_cannot_read_what_the_tokenizer_makes_is_refused(tmp_path):
    student = build("bert", HEAD)
    teacher = build("bert", HEAD, vocab_size=30)
    trainer = trainer_for(tmp_path, top(teacher=teacher), model=student)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(27))])}
    trainer.callback_handler.processing_class = BertTokenizerFast(vocab=words)
    with pytest.raises(tp.errors.TrainingError, match=r"knows 30 tokens, .* tokenizer makes 32"):
        trainer.train()


# What is compared with the teacher


def distilling(head, method=None):
    """A model in training that drops nothing, and its objective with a teacher."""
    callback = tp.TokenPruneCallback(method or top(layer_weight=0.0))
    model = callback.attach(build("bert", head, **no_dropout())).train()
    callback.objective.teacher = tp.pack(build("bert", head, seed=5)).eval().requires_grad_(False)
    callback.objective.moment = Moment("settle", 0.5)
    return model, callback.objective


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification", "ForMaskedLM", "Model"])
def test_what_is_distilled_is_the_same_however_far_texts_are_padded(head, labelled):
    model, objective = distilling(head)
    found = []
    for more in (0, 25):
        inputs = {name: functional.pad(value, (0, more)) for name, value in make_inputs("bert", head).items()}
        if labelled and head != "Model":
            of_tokens = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)
            inputs["labels"] = torch.arange(5) % 3 if head == HEAD else of_tokens
        model(**inputs)
        found.append(objective.pop_log()["distillation"])
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("head", [HEAD, "ForTokenClassification"])
def test_the_gap_is_how_differently_the_soft_and_the_hard_model_judge(head):
    model, objective = distilling(head)
    pruner, inputs = model.token_pruner, make_inputs("bert", head)
    for site in pruner.sites.values():
        site.set_kept([1, 0] * 4)
    rows = {int(layer): SoftBins(site, torch.tensor([0.9, 0.3] * 4)) for layer, site in pruner.sites.items()}
    forward = functools.partial(type(model).forward, model)
    said = []
    for gates in (rows, {}):
        pruner.soft, pruner.soft_in_eval = gates, True
        with torch.no_grad():
            said.append(model.eval()(**inputs).logits.softmax(-1))
    pruner.soft, pruner.soft_in_eval = rows, False
    assert objective._gap(model.train(), forward, (), inputs) == pytest.approx(
        (said[0] - said[1]).abs().sum(-1).mean().item() / 2, rel=1e-5
    )
    assert model.training
    assert pruner.soft is rows


@pytest.mark.parametrize(("sites", "early"), [((1, 2), [1]), ((0, 1, 2), [0, 1]), ((2,), [2])])
def test_ranks_are_taught_to_early_layers_and_less_and_less(sites, early):
    model, objective = distilling(HEAD, top(sites=sites, rank_weight=0.5, target_macs=0.9))
    helper = next(helper for helper in objective.helpers if isinstance(helper, RankingLoss))
    assert helper.early == early
    found = []
    for progress in (0.0, 0.5, 1.0):
        objective.moment = Moment("anneal", 0.0)  # nothing is dropped yet
        helper.prepare(objective)
        objective.taught = objective.teacher(**make_inputs("bert", HEAD))
        with torch.no_grad():
            model.token_pruner.objective = None
            model(**make_inputs("bert", HEAD))
        objective.moment = Moment("anneal", progress)
        found.append(helper.losses(objective)["ranking"].item())
    assert found[0] > 0
    assert [value / found[0] for value in found] == pytest.approx([1, 0.505, 0.01])
