"""What a packed model cannot compute it refuses by name, before it computes something else."""

import pytest
import torch
from families import build, make_inputs, outputs_of
from families import class_head as one_class
from test_packing import assert_same

import hf_tokenprune as tp
from hf_tokenprune.modeling.calls import LayerCall
from hf_tokenprune.modeling.packing import PackedBatch


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "electra"])
def test_masks_of_another_shape_are_refused(name):
    model, inputs = tp.pack(build(name, "ForTokenClassification")), make_inputs(name, "")
    for shape in ((5, 1, 1, 30), (5, 1, 30, 30), (5, 30, 30), (5, 29), (5, 31), (4, 30), (30,)):
        with pytest.raises(tp.errors.UnsupportedInputError, match="attention_mask"):
            model(**{**inputs, "attention_mask": torch.ones(shape)})


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "vit"])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_attention_matrices_are_refused(name, by):
    head = one_class(name)
    model, inputs = build(name, head), make_inputs(name, head)
    if by == "config":
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
    else:
        inputs["output_attentions"] = True
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"output_attentions=True.*detach"):
        tp.pack(model)(**inputs)
    if by == "argument":
        del inputs["output_attentions"]
        assert outputs_of(model, inputs)["logits"].isfinite().all()  # a refused call leaves nothing behind


@pytest.mark.parametrize(
    "argument",
    [{"use_cache": True}, {"encoder_hidden_states": torch.zeros(5, 3, 32)}, {"past_key_values": ()}],
    ids=lambda argument: next(iter(argument)),
)
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
def test_arguments_of_decoders_are_refused(name, argument):
    model = tp.pack(build(name, "Model"))
    with pytest.raises(tp.errors.UnsupportedInputError, match=next(iter(argument))):
        model(**make_inputs(name, ""), **argument)


def test_arguments_of_decoders_that_say_no_are_taken():
    model = tp.pack(build("bert", "Model"))
    inputs = make_inputs("bert", "")
    expected = outputs_of(model, inputs)
    assert_same(outputs_of(model, {**inputs, "use_cache": False, "past_key_values": None}), expected)


def test_texts_that_come_in_one_row_are_refused():
    """A packed model would read them as one text."""
    model = tp.pack(build("bert", "Model"))
    ids, bounds = torch.randint(5, 30, (1, 12)), torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(tp.errors.UnsupportedInputError, match="pass them padded"):
        model(input_ids=ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=7, max_length_k=7)
    causal = tp.pack(build("llama", "Model"))
    for places in ([*range(5), *range(7)], [0, *range(11)], [*range(5), *range(20, 27)]):
        with pytest.raises(tp.errors.UnsupportedInputError, match="begin anew"):
            causal(input_ids=ids, position_ids=torch.tensor([places]))
    causal(input_ids=ids, position_ids=torch.arange(12)[None])


def test_a_model_that_lies_on_several_devices_is_refused():
    """The first CUDA error of `device_map="auto"` would say nothing."""
    states = torch.zeros(1, 4, 3, 8, device="meta")
    call = LayerCall(None, 2, PackedBatch.from_mask(None, batch_size=1, seq_len=3, device="cpu"), states, [3])
    with pytest.raises(tp.errors.UnsupportedInputError, match="Layer 2 is on meta, the first on cpu"):
        call.attend(states, states, states, 0.0, None, None, False)
