"""Batches with next to nothing in them, or with what is no token: the right result, or an error that says what is wrong."""

import pytest
import torch
from families import FAMILIES, VOCAB, build, make_inputs, outputs_of
from test_not_finite import METHODS, STEPS, assert_sound
from training_helpers import collate, trainer_for

import hf_tokenprune as tp
from hf_tokenprune.losses import regression_distillation
from hf_tokenprune.modeling.calls import active

TEXT = [name for name, row in FAMILIES.items() if not row.images]
SITES = ({}, {1: 0.5}, {0: 0.3, 2: 0.5})


def head_of(name):
    return "ForImageClassification" if FAMILIES[name].images else "ForSequenceClassification"


def empty(name, shape):
    if FAMILIES[name].images:
        return {"pixel_values": torch.zeros(0, 3, 24, 24)}
    return {key: torch.zeros(shape, dtype=torch.long) for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_batch_is_refused_and_leaves_nothing_behind(name, shape):
    model, inputs = build(name, head_of(name)), make_inputs(name, "", lengths=(4, 9))
    for sites in SITES:
        tp.attach(model, {layer: tp.TopK(keep) for layer, keep in sites.items()})
        before = outputs_of(model, inputs)["logits"]
        for given in (empty(name, shape), {key: value for key, value in empty(name, shape).items() if key != "attention_mask"}):
            with pytest.raises(tp.errors.UnsupportedInputError, match=r"The batch is empty: \d+ sequences of \d+ tokens"):
                model(**given)
        assert torch.equal(outputs_of(model, inputs)["logits"], before)


@pytest.mark.parametrize("name", TEXT)
def test_one_token_is_what_the_dense_model_makes_of_it(name):
    """With another text beside it, and with nothing else in the batch; nothing of it can be dropped."""
    model = build(name, "ForSequenceClassification")
    alone, beside = make_inputs(name, "", lengths=(1,)), make_inputs(name, "", lengths=(1, 6, 1))
    expected = outputs_of(model, alone)["logits"], outputs_of(model, beside)["logits"]
    for sites in SITES:
        tp.attach(model, {layer: tp.TopK(keep) for layer, keep in sites.items()})
        found = outputs_of(model, alone)["logits"], outputs_of(model, beside)["logits"]
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1][[0, 2]], expected[1][[0, 2]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_a_sample_of_nothing_but_padding_disturbs_nobody(name):
    """What the dense model makes of it is an average over padding. Here it is some finite answer, as for a batch of such samples."""
    model = build(name, "ForSequenceClassification")
    inputs = make_inputs(name, "", lengths=(7, 0, 1, 4))
    without = {key: value[[0, 2, 3]] for key, value in inputs.items()}
    nothing = {key: value[1:2] for key, value in inputs.items()}
    for sites in SITES:
        tp.attach(model, {layer: tp.TopK(keep) for layer, keep in sites.items()})
        found = outputs_of(model, inputs)["logits"]
        assert sorted(model.token_pruner.trace[0].arrived) == [0, 1, 4, 7]
        torch.testing.assert_close(found[[0, 2, 3]], outputs_of(model, without)["logits"], rtol=0, atol=1e-5)
        assert found.isfinite().all()
        if name != "esm":  # its own embeddings divide by the number of tokens, packed or not
            assert outputs_of(model, nothing)["logits"].isfinite().all()


@pytest.mark.parametrize("token", [VOCAB, VOCAB + 7, -1])
@pytest.mark.parametrize("name", TEXT)
def test_an_id_out_of_range_is_the_dense_models_error_and_leaves_nothing_behind(name, token):
    model, inputs = build(name, "ForSequenceClassification"), make_inputs(name, "", lengths=(4, 9))
    wrong = {**inputs, "input_ids": inputs["input_ids"].clone()}
    wrong["input_ids"][1, 2] = token
    with pytest.raises(IndexError) as dense:
        model(**wrong)
    for sites in SITES:
        tp.attach(model, {layer: tp.TopK(keep) for layer, keep in sites.items()})
        before = outputs_of(model, inputs)["logits"]
        with pytest.raises(IndexError) as packed:
            model(**wrong)
        assert str(packed.value) == str(dense.value)
        assert active.forward is active.call is active.head is None
        assert torch.equal(outputs_of(model, inputs)["logits"], before)


# Training


def poor(what):
    """A collator of batches in which there is little to learn about tokens."""

    def poor_batch(rows):
        batch = collate(rows)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if what == "a sample of padding":
            ids[0], mask[0] = 0, 0
        elif what == "padding only":
            ids[:], mask[:] = 0, 0
        elif what == "a sample of one token":
            ids[0, 1:], mask[0, 1:] = 0, 0
        elif what == "one token each":
            batch.update(input_ids=ids[:, :1], attention_mask=mask[:, :1])
        return batch

    return poor_batch


@pytest.mark.parametrize("what", ["a sample of padding", "padding only", "a sample of one token", "one token each"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_poor_batches(tmp_path, name, what):
    trainer = trainer_for(tmp_path, METHODS[name](), max_steps=STEPS, logging_steps=1, data_collator=poor(what))
    trainer.train()
    assert_sound(trainer.model.token_pruner.state_dict())
    for key, value in trainer.model.state_dict().items():
        assert value.dim() == 0 or value.isfinite().all(), key
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            assert torch.tensor(float(value)).isfinite(), (entry["step"], key)
            assert not key.startswith("macs_") or value <= 1.1, (entry["step"], key)


def test_an_empty_batch_in_training_is_refused(tmp_path):
    trainer = trainer_for(
        tmp_path, METHODS["tokens"](), data_collator=lambda rows: {k: v[:0] for k, v in collate(rows).items()}
    )
    with pytest.raises(tp.errors.UnsupportedInputError, match="The batch is empty: 0 sequences"):
        trainer.train()


def test_nothing_to_distil_is_no_loss():
    student = torch.zeros(0, 3, requires_grad=True)
    loss = regression_distillation(student, torch.zeros(0, 3))
    loss.backward()
    assert loss.item() == 0
