"""A packed model trains as the dense one does: the same loss and gradients, also with dropout and checkpointing."""

import pytest
import torch
import transformers as hf
from families import FAMILIES, build, make_inputs, outputs_of
from families import class_head as one_class
from test_packing import TRAINABLE, assert_same

import hf_tokenprune as tp

DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout",
    "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout_prob", "pooler_dropout", "cls_dropout",
)  # fmt: skip


def labels_for(head, inputs):
    """Labels for every sample, or for every real token."""
    if head == "ForTokenClassification":
        return torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)
    return torch.arange(len(next(iter(inputs.values())))) % 3


def with_dropout(name, **rates):
    """Settings that give every dropout of a family's config a rate: 0, or what `rates` say."""
    rates = {**dict.fromkeys(DROPOUTS, 0.0), **rates}
    vision = getattr(FAMILIES[name].config, "vision_config", None)
    return rates if vision is None else {"vision_config": {**vision.to_dict(), **rates}}


def loss_and_gradients(model, inputs, labels):
    model.zero_grad()
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


def assert_same_step(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5 * max(1, gradient.abs().max()), msg=name)


@pytest.mark.parametrize(("name", "head"), TRAINABLE)
def test_training_gives_the_dense_loss_and_gradients(name, head):
    model, inputs = build(name, head, **with_dropout(name)), make_inputs(name, head)
    labels = labels_for(head, inputs)
    dense = loss_and_gradients(model.train(), inputs, labels)
    assert sum(gradient.abs().sum() for gradient in dense[1].values()) > 0
    assert_same_step(loss_and_gradients(tp.pack(model), inputs, labels), dense)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(name):
    head = one_class(name)
    if not getattr(hf, FAMILIES[name].stem + head).supports_gradient_checkpointing:
        pytest.skip("transformers' own model does not offer it")
    inputs = make_inputs(name, head)
    labels = labels_for(head, inputs)
    for sites in ((), (0, 2)):
        model = build(name, head, **with_dropout(name, **dict.fromkeys(DROPOUTS, 0.3)))
        tp.attach(model, {layer: tp.TopK(0.5) for layer in sites}).train()
        torch.manual_seed(1)
        plain = loss_and_gradients(model, inputs, labels)
        model.config.use_cache = False
        model.activation_checkpointing_enable()
        torch.manual_seed(1)
        assert_same_step(loss_and_gradients(model, inputs, labels), plain)


@pytest.mark.parametrize(("name", "head"), TRAINABLE)
def test_dropout_is_random_in_training_and_absent_in_evaluation(name, head):
    inputs = make_inputs(name, head)
    for dropouts in (DROPOUTS, ("attention_probs_dropout_prob", "attention_dropout")):
        model = build(name, head, **with_dropout(name, **dict.fromkeys(dropouts, 0.3)))
        dense = outputs_of(model, inputs)
        tp.pack(model).train()
        one, two = (outputs_of(model, inputs)["logits"] for _ in range(2))
        assert one.isfinite().all()
        assert not torch.allclose(one, two, atol=1e-3)
        model(**inputs, labels=labels_for(head, inputs)).loss.backward()
        assert_same(outputs_of(model.eval(), inputs), dense)
