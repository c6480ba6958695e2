"""Invariant 1: a packed model gives the outputs of the unmodified model, whatever the family, head and batch."""

from inspect import signature

import pytest
import torch
from families import CASES, FAMILIES, TEXTS, build, make_inputs, outputs_of, padded_left
from families import class_head as one_class
from torch.nn import functional

import hf_tokenprune as tp
from hf_tokenprune.modeling.calls import Forward
from hf_tokenprune.modeling.packing import PackedBatch

TEXT = [name for name in TEXTS if "ForTokenClassification" in FAMILIES[name].heads]
TEXT_CASES = [case for case in CASES if case[1] in ("ForSequenceClassification", "ForTokenClassification")]
CAUSAL = [name for name in TEXTS if FAMILIES[name].summary < 0]
CLASSIFIERS = [(name, head) for name, head in CASES if head in ("ForSequenceClassification", "ForImageClassification")]
TRAINABLE = [*CLASSIFIERS, *((name, "ForTokenClassification") for name in TEXT)]


def assert_same(got, expected, about="", **tolerance):
    assert got.keys() == expected.keys()
    for key in expected:
        settings = {"rtol": 0, "atol": 1e-5, **tolerance, "msg": lambda text, key=key: f"{about} {key}: {text}"}
        torch.testing.assert_close(got[key], expected[key], **settings)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_packed_equals_dense(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


def embedded(model, inputs):
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


CHANGES = {
    "embeddings": embedded,
    "no mask": lambda _, inputs: {"input_ids": inputs["input_ids"]},
    "one sample": lambda _, inputs: {key: value[:1, :17] for key, value in inputs.items()},
    "one padded sample": lambda _, inputs: {key: value[:1] for key, value in inputs.items()},
    "float mask": lambda _, inputs: {**inputs, "attention_mask": inputs["attention_mask"].float()},
    "bool mask": lambda _, inputs: {**inputs, "attention_mask": inputs["attention_mask"].bool()},
    "wide padding": lambda _, inputs: {key: functional.pad(value, (0, 9)) for key, value in inputs.items()},
}


@pytest.mark.parametrize(("name", "head"), TEXT_CASES)
def test_packed_equals_dense_however_the_input_comes(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    if name in CAUSAL and head == "ForSequenceClassification":
        inputs = padded_left(inputs)  # it looks for its token at the end if it is given embeddings
    changed = {change: make(model, inputs) for change, make in CHANGES.items()}
    dense = {change: outputs_of(model, inputs) for change, inputs in changed.items()}
    tp.pack(model)
    for change, inputs in changed.items():
        assert_same(outputs_of(model, inputs), dense[change], about=change)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_one_given_by_place_equals_dense(name):
    head = one_class(name)
    model, inputs = build(name, head), make_inputs(name, head, lengths=(9,))
    names = list(signature(model.forward).parameters)
    by_place = [inputs.get(name) for name in names[: 1 + max(map(names.index, inputs))]]
    with torch.no_grad():
        dense = model(*by_place).logits
        packed = tp.pack(model)(*by_place).logits
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-5)


MASKS = {
    "left padding": torch.arange(20) >= torch.tensor([[0], [7], [19], [3]]),
    "holes": torch.rand(4, 20, generator=torch.Generator().manual_seed(0)) < 0.6,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", TEXT)
def test_heads_that_read_every_token_take_any_mask(name, mask):
    model, inputs = build(name, "ForTokenClassification"), make_inputs(name, "", lengths=(20,) * 4)
    inputs["attention_mask"] = MASKS[mask].long()
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


def test_mean_pooling_takes_left_padding():
    model = build("modernbert", "ForSequenceClassification", classifier_pooling="mean")
    inputs = make_inputs("modernbert", "", lengths=(12,) * 3)
    inputs["attention_mask"][1, :5] = 0
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in CAUSAL])
def test_left_padding_under_a_pooled_head_names_the_remedy(name):
    model, inputs = build(name, "ForSequenceClassification"), make_inputs(name, "", lengths=(6, 6))
    dense = outputs_of(model, inputs)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with pytest.raises(tp.errors.UnsupportedInputError, match="padding_side = 'right'"):
        tp.pack(model)(**{**inputs, "attention_mask": mask})
    assert_same(outputs_of(model, inputs), dense)  # a refused call leaves nothing behind


@pytest.mark.parametrize(("name", "head"), TEXT_CASES)
def test_a_row_of_padding_is_finite_and_touches_no_other(name, head):
    lengths = (17, 0, 5)
    model, inputs = build(name, head), make_inputs(name, head, lengths=lengths)
    with torch.no_grad():
        dense, packed = model(**inputs).logits, tp.pack(model)(**inputs).logits
    assert packed.isfinite().all()
    for row, length in enumerate(lengths):
        if length:
            real = slice(length) if head == "ForTokenClassification" else ...
            torch.testing.assert_close(packed[row][real], dense[row][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TEXT if name != "esm"])  # whose own embedding divides by the length
def test_a_batch_of_nothing_but_padding_is_finite(name):
    model = build(name, "ForSequenceClassification")
    for sites in ((), (1,)):
        tp.attach(model, {layer: tp.TopK(0.5) for layer in sites})
        for lengths in ((0,), (0, 0)):
            assert outputs_of(model, make_inputs(name, "", lengths=lengths, seq_len=6))["logits"].isfinite().all()


@pytest.mark.parametrize(("name", "head"), TRAINABLE)
def test_bf16_strays_no_further_than_the_dense_model_does(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    exact = outputs_of(model, inputs)["logits"]
    model.bfloat16()
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    dense = outputs_of(model, inputs)["logits"]
    packed = outputs_of(tp.pack(model), inputs)["logits"]
    assert packed.dtype == torch.bfloat16
    assert (packed - exact).abs().mean() < 1.5 * (dense - exact).abs().mean() + 1e-3


@pytest.mark.parametrize(("name", "head"), TRAINABLE)
def test_inference_mode_changes_nothing_and_autocast_no_more_than_for_the_dense_model(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    exact = outputs_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        dense = outputs_of(model, inputs)["logits"]
    tp.pack(model)
    with torch.inference_mode():
        assert_same(outputs_of(model, inputs), exact)
    with torch.autocast("cpu", torch.bfloat16):
        packed = outputs_of(model, inputs)["logits"]
    assert packed.dtype == dense.dtype
    assert (packed - exact["logits"]).abs().mean() < 1.5 * (dense - exact["logits"]).abs().mean() + 1e-3


def test_layoutlm_sees_its_boxes():
    model, inputs = build("layoutlm", "ForTokenClassification"), make_inputs("layoutlm", "")
    bare = outputs_of(model, inputs)["logits"]
    low = torch.randint(0, 500, (5, 30, 2), generator=torch.Generator().manual_seed(0))
    inputs["bbox"] = torch.cat([low, low + 100], -1)
    dense = outputs_of(model, inputs)
    assert not torch.allclose(dense["logits"], bare, atol=1e-2)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


@pytest.mark.parametrize("pooling", ["mean", "late"])
def test_eurobert_may_pool_every_token(pooling):
    model, inputs = build("eurobert", "ForSequenceClassification", classifier_pooling=pooling), make_inputs("eurobert", "")
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


# Hidden states and tuples


def assert_same_hidden_states(got, expected, inputs):
    mask = inputs.get("attention_mask")
    real = ... if mask is None else mask.reshape(-1, mask.shape[-1]).bool()
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_hidden_states_come_back_padded(name, head):
    """transformers hung up its recording hooks when hidden states were first asked for: before ours."""
    model, inputs = build(name, head), make_inputs(name, head)
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True).hidden_states
        packed = tp.pack(model)(**inputs, output_hidden_states=True).hidden_states
    assert_same_hidden_states(packed, dense, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_first_asked_of_the_packed_model_are_the_same(name):
    """The recording hooks are younger than ours."""
    head = one_class(name)
    inputs = {**make_inputs(name, head), "output_hidden_states": True}
    with torch.no_grad():
        packed = tp.pack(build(name, head))(**inputs).hidden_states
        dense = build(name, head)(**inputs).hidden_states
    assert_same_hidden_states(packed, dense, inputs)


WAYS = {
    "by config": ({"output_hidden_states": True}, {}),
    "some by number": ({}, {"output_hidden_states": [0, -1]}),
    "one by number": ({}, {"output_hidden_states": [2]}),
    "in a tuple": ({}, {"output_hidden_states": True, "return_dict": False}),
    "not asked": ({}, {"output_hidden_states": False}),
    "not asked, in a tuple": ({}, {"return_dict": False}),
    "refused despite config": ({"output_hidden_states": True}, {"output_hidden_states": False}),
    "in a tuple by config": ({"return_dict": False}, {"output_hidden_states": True}),  # most heads fail at it without us
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "Model"), ("bert", "ForSequenceClassification"), ("distilbert", "ForMultipleChoice"),
        ("modernbert", "Model"), ("vit", "Model"), ("vit", "ForImageClassification"),
    ],
)  # fmt: skip
def test_outputs_have_the_form_that_was_asked_for(name, head, way):
    settings, arguments = WAYS[way]
    if settings.get("return_dict") is False and name == "vit" and head != "Model":
        pytest.skip("transformers' own model fails")
    model, inputs = build(name, head), make_inputs(name, head)
    for key, value in settings.items():
        setattr(model.config, key, value)
    with torch.no_grad():
        dense, packed = model(**inputs, **arguments), tp.pack(model)(**inputs, **arguments)
    assert type(packed) is type(dense)
    if not isinstance(dense, tuple):
        assert packed.keys() == dense.keys()
        dense, packed = dense.to_tuple(), packed.to_tuple()
    assert len(packed) == len(dense)
    for a, b in zip(packed, dense, strict=True):
        if isinstance(b, tuple):
            assert_same_hidden_states(a, b, inputs)
        else:
            per_token = "attention_mask" in inputs and b.shape[:2] == inputs["attention_mask"].shape and b.ndim == 3
            assert_same_hidden_states([a], [b], inputs if per_token else {})


@pytest.mark.parametrize(("groups", "inner"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_albert_may_share_its_layers_in_any_way(groups, inner):
    sizes = {"num_hidden_groups": groups, "inner_group_num": inner, "num_hidden_layers": 6}
    model, inputs = build("albert", "ForTokenClassification", **sizes), make_inputs("albert", "")
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True)
        packed = tp.pack(model)(**inputs, output_hidden_states=True)
    assert len(model.token_pruner.trace) == 6 * inner
    assert_same_hidden_states(packed.hidden_states, dense.hidden_states, inputs)
    assert_same_hidden_states([packed.logits], [dense.logits], inputs)
    tp.attach(model, {layer: tp.TopK(0.7) for layer in (1, 4)})
    outputs_of(model, inputs)
    counts = [sum(layer.survived) for layer in model.token_pruner.trace]
    assert [after < before for before, after in zip([sum((17, 5, 30, 17, 1)), *counts], counts, strict=False)] == [
        layer in (1, 4) for layer in range(6 * inner)
    ]


# What layers share


def test_distances_that_all_texts_share_are_there_once():
    """DeBERTa would make two more tables of their size in every layer."""
    model, inputs = build("deberta-v2", "ForTokenClassification"), make_inputs("deberta-v2", "")
    seen = []
    layer = tp.pack(model).deberta.encoder.layer[1].attention.self
    layer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["relative_pos"].numel()), with_kwargs=True)
    outputs_of(model, inputs)
    outputs_of(model, padded_left(inputs))
    assert seen == [30 * 30] * 2


def test_rotary_tables_are_not_mixed_up_where_each_layer_gets_its_own():
    """As under FSDP2, which casts what a layer gets: a new pair, that comes to lie where another one's lay."""
    batch = PackedBatch.from_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), batch_size=2, seq_len=3, device="cpu")
    forward = Forward(None, None, None, None, head_reads=False, return_tuple=False, keeps_states=False)
    for number in range(9):
        packed, _ = forward.gather((torch.full((1, 3, 2), float(number)), None), batch)
        assert packed.eq(number).all()


# Invariant 3: a sample stands for itself


@pytest.mark.parametrize(
    ("name", "head", "sites"),
    [*((name, head, (0, 2)) for name, head in CASES), *((name, head, ()) for name, head in CLASSIFIERS)],
)
def test_a_sample_does_not_depend_on_its_batch(name, head, sites):
    model, inputs = build(name, head), make_inputs(name, head)
    tp.attach(model, {layer: tp.TopK(0.5) for layer in sites})
    text = "attention_mask" in inputs
    with torch.no_grad():
        together = model(**inputs)
    key = next(key for key, value in together.items() if isinstance(value, torch.Tensor))
    wider = {key: functional.pad(value, (0, 9)) for key, value in inputs.items()} if text else inputs
    turned = {key: value.flip(0) for key, value in wider.items()}
    with torch.no_grad():
        elsewhere = model(**turned)[key].flip(0)
    for row, length in enumerate((17, 5, 30, 17, 1)):
        alone = {name: value[row : row + 1, ..., :length] if text else value[row : row + 1] for name, value in inputs.items()}
        with torch.no_grad():
            result = model(**alone)[key][0]
        for other in (together[key][row], elsewhere[row]):
            other = other[:length] if text and result.shape[:1] == (length,) else other
            torch.testing.assert_close(other, result, rtol=0, atol=1e-5)
