"""Invariant 1: a packed model gives the outputs of the unmodified model, whatever the family, head and batch."""

import copy
import io
import threading
from inspect import signature

import pytest
import torch
import transformers as hf
from families import CASES, FAMILIES, TEXTS, build, make_inputs, outputs_of, padded_left
from families import class_head as one_class
from torch.nn import functional
from transformers import AttentionInterface

import hf_tokenprune as tp
from hf_tokenprune.modeling.calls import Forward, LayerCall
from hf_tokenprune.modeling.packing import PackedBatch
from hf_tokenprune.modeling.spans import NOWHERE

TEXT = [name for name in TEXTS if "ForTokenClassification" in FAMILIES[name].heads]
TEXT_CASES = [case for case in CASES if case[1] in ("ForSequenceClassification", "ForTokenClassification")]
CAUSAL = [name for name in TEXTS if FAMILIES[name].summary < 0]
CLASSIFIERS = [(name, head) for name, head in CASES if head in ("ForSequenceClassification", "ForImageClassification")]
TRAINABLE = [*CLASSIFIERS, *((name, "ForTokenClassification") for name in TEXT)]
POOLED = [(name, head) for name, head in CLASSIFIERS if name not in ("dinov2", "dinov2_with_registers", "siglip", "ijepa")]
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout",
    "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout_prob", "pooler_dropout", "cls_dropout",
)  # fmt: skip


def assert_same(got, expected, about="", **tolerance):
    assert got.keys() == expected.keys()
    for key in expected:
        settings = {"rtol": 0, "atol": 1e-5, **tolerance, "msg": lambda text, key=key: f"{about} {key}: {text}"}
        torch.testing.assert_close(got[key], expected[key], **settings)


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


# Training


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


# Causal models, whose heads read the last token


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[0] in CAUSAL])
def test_causal_models_take_padding_on_the_left(name, head):
    model, inputs = build(name, head), padded_left(make_inputs(name, head))
    dense = outputs_of(model, inputs)
    packed = tp.pack(model)
    assert_same(outputs_of(packed, inputs), dense)
    shifted = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    assert_same(outputs_of(packed, {**inputs, **shifted}), dense)  # only distances count


@pytest.mark.parametrize("name", CAUSAL)
def test_the_pooled_token_of_a_causal_model_is_the_one_that_transformers_reads(name):
    """The last whose id is not that of padding, even if real tokens have that id, too."""
    model, inputs = build(name, "ForSequenceClassification"), make_inputs(name, "", lengths=(12, 20, 7, 20))
    inputs["input_ids"][0, 10:12] = inputs["input_ids"][1, 15] = inputs["input_ids"][3, 19] = FAMILIES[name].config.pad_token_id
    for given in (inputs, padded_left(inputs), {"input_ids": inputs["input_ids"]}):
        dense = outputs_of(tp.detach(model), given)
        for sites in ((), (0, 2)):
            tp.attach(model, {layer: tp.TopK(1.0) for layer in sites})
            assert_same(outputs_of(model, given), dense)
            with torch.no_grad():
                states = model(**given, output_hidden_states=True)
            torch.testing.assert_close(states.logits, dense["logits"], rtol=0, atol=1e-5)
            tp.attach(model, {0: tp.TopK(1)})
            assert outputs_of(model, given)["logits"].isfinite().all()


def test_a_causal_head_that_would_read_padding_is_told_so():
    model, inputs = tp.pack(build("llama", "ForSequenceClassification")), make_inputs("llama", "")
    with pytest.raises(tp.errors.UnsupportedInputError, match="padding_side = 'left'"):
        model(**embedded(model, inputs))
    inputs["input_ids"][inputs["attention_mask"] == 0] = 9
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"pad_token_id = 0.*Set config.pad_token_id"):
        model(**inputs)
    model.config.pad_token_id = 9
    inputs["input_ids"][inputs["attention_mask"] == 1] = 7
    packed = outputs_of(model, inputs)
    assert_same(packed, outputs_of(tp.detach(model), inputs))


@pytest.mark.parametrize("name", CAUSAL)
def test_no_cache_is_filled_and_one_that_is_asked_for_is_refused(name):
    model, inputs = tp.pack(build(name, "Model")), make_inputs(name, "")
    assert model.config.use_cache
    with torch.no_grad():
        assert model(**inputs).past_key_values is None
    with pytest.raises(tp.errors.UnsupportedInputError, match="use_cache"):
        model(**inputs, use_cache=True)


def test_a_causal_config_may_ask_for_attention_in_both_directions():
    inputs = make_inputs("llama", "")
    model = build("llama", "Model", is_causal=False)
    dense = outputs_of(model, inputs)
    assert not torch.allclose(
        dense["last_hidden_state"], outputs_of(build("llama", "Model"), inputs)["last_hidden_state"], atol=0.1
    )
    assert_same(outputs_of(tp.pack(model), inputs), dense)
    model = build("gemma3", "Model", use_bidirectional_attention=True)
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


# What a packed model refuses


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


# The last layer of a pooled head


@pytest.mark.parametrize(("name", "head"), POOLED)
def test_the_last_layer_computes_what_a_pooled_head_reads(name, head):
    model, inputs = tp.pack(build(name, head)), make_inputs(name, head)
    full = sorted(inputs["attention_mask"].sum(1).tolist()) if "attention_mask" in inputs else [37 + (name == "deit")] * 5
    outputs_of(model, inputs)
    *others, last = model.token_pruner.trace
    assert [(layer.entered, layer.queries, layer.survived) for layer in others] == [(full, full, full)] * 3
    asking = full if model.token_pruner.family.probabilities else [1] * 5
    assert (last.entered, last.queries, last.survived) == (full, asking, [1] * 5)
    outputs_of(model, {**inputs, "output_hidden_states": True})
    last = model.token_pruner.trace[-1]
    assert (last.entered, last.queries, last.survived) == (full, full, full)


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[1] in ("Model", "VisionModel", "ForMaskedLM")])
def test_the_last_layer_computes_all_where_all_is_read(name, head):
    model, inputs = tp.pack(build(name, head)), make_inputs(name, head)
    outputs_of(model, inputs)
    last = model.token_pruner.trace[-1]
    assert last.entered == last.queries == last.survived


@pytest.mark.parametrize(("name", "head"), POOLED)
def test_the_encoder_under_a_pooled_head_gives_every_token_when_called_by_itself(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    dense, right = outputs_of(model.base_model, inputs), outputs_of(model, inputs)
    tp.pack(model)
    assert_same(outputs_of(model.base_model, inputs), dense)
    assert_same(outputs_of(model, inputs), right)


class MeanForSequenceClassification(hf.BertForSequenceClassification):
    """A head of a user's own, which is called like a pooled one and reads every token."""

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return {"logits": self.classifier((states * attention_mask[..., None]).sum(1))}


class MeanPooler(torch.nn.Module):
    """What a user might put in the place of BERT's pooler."""

    def forward(self, states):
        return states.mean(1)


def test_a_part_of_a_users_own_may_read_every_token():
    model, inputs = build("bert", "ForSequenceClassification"), make_inputs("bert", "", lengths=(9, 9))
    assert tp.pack(build("bert", "ForSequenceClassification")).token_pruner.pooled_head
    model.bert.pooler = MeanPooler()
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)
    assert_same(outputs_of(tp.pack(model), inputs), dense, "packed again")


def test_texts_that_come_in_one_row_are_refused():
    """A packed model would read them as one text."""
    model = tp.pack(build("bert", "Model"))
    ids, bounds = torch.randint(5, 30, (1, 12)), torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(tp.errors.UnsupportedInputError, match="pass them padded"):
        model(input_ids=ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=7, max_length_k=7)
    causal = tp.pack(build("llama", "Model"))
    places = torch.tensor([[*range(5), *range(7)]])
    with pytest.raises(tp.errors.UnsupportedInputError, match="begin anew"):
        causal(input_ids=ids, position_ids=places)
    causal(input_ids=ids, position_ids=torch.arange(12)[None])


def test_a_model_that_lies_on_several_devices_is_refused():
    """The first CUDA error of `device_map="auto"` would say nothing."""
    states = torch.zeros(1, 4, 3, 8, device="meta")
    call = LayerCall(None, 2, PackedBatch.from_mask(None, batch_size=1, seq_len=3, device="cpu"), states, [3])
    with pytest.raises(tp.errors.UnsupportedInputError, match="Layer 2 is on meta, the first on cpu"):
        call.attend(states, states, states, 0.0, None, None, False)


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


def test_a_head_of_a_users_own_may_read_every_token():
    model, inputs = build("bert", "ForSequenceClassification"), make_inputs("bert", "")
    model.__class__ = MeanForSequenceClassification
    dense = outputs_of(model, inputs)
    assert_same(outputs_of(tp.pack(model), inputs), dense)


# Models that share, are copied, pickled or run at once


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dense_model_that_shares_the_config_stays_dense(name):
    head = one_class(name)
    packed, inputs = build(name, head), make_inputs(name, head)
    other = type(packed)(packed.config).eval()
    dense, expected = outputs_of(other, inputs), outputs_of(packed, inputs)
    tp.pack(packed)
    assert_same(outputs_of(other, inputs), dense)
    assert_same(outputs_of(packed, inputs), expected)
    tp.pack(other)
    assert_same(outputs_of(other, inputs), dense)
    assert_same(outputs_of(packed, inputs), expected)


@pytest.mark.parametrize("first", ["first packed", "last packed"])
def test_two_packed_models_that_share_a_config_detach_in_any_order(first):
    models = [build("bert", "Model")]
    models.append(type(models[0])(models[0].config).eval())
    inputs = make_inputs("bert", "Model")
    dense = [outputs_of(model, inputs) for model in models]
    for model in models:
        tp.pack(model)
    for number in (0, 1) if first == "first packed" else (1, 0):
        tp.detach(models[number])
        for model, expected in zip(models, dense, strict=True):
            assert_same(outputs_of(model, inputs), expected)
    assert models[0].config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_works_and_is_independent(name):
    head = one_class(name)
    model, inputs = build(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    tp.attach(model, {1: tp.TopK(0.5)})
    pruned = outputs_of(model, inputs)
    trace, model.token_pruner.trace = model.token_pruner.trace, []
    twin = copy.deepcopy(model)
    assert_same(outputs_of(twin, inputs), pruned)
    assert (twin.token_pruner.trace, model.token_pruner.trace) == (trace, [])
    assert_same(outputs_of(tp.detach(twin), inputs), dense)
    assert_same(outputs_of(model, inputs), pruned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(outputs_of(model, inputs), pruned)


@pytest.mark.parametrize("name", ["bert", "modernbert", "siglip"])
def test_pickling_round_trips_into_a_fresh_process(name, monkeypatch):
    head = one_class(name)
    model, inputs = tp.attach(build(name, head), {1: tp.TopK(0.5)}), make_inputs(name, head)
    expected = outputs_of(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.delitem(AttentionInterface._global_mapping, "token_pruning")  # as in a process that has packed nothing yet
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    assert_same(outputs_of(loaded, inputs), expected)


@pytest.mark.parametrize(
    ("name", "head"), [*((name, one_class(name)) for name in ("bert", "modernbert", "vit")), ("bert", "ForQuestionAnswering")]
)
def test_threads_may_share_a_model(name, head):
    model = tp.attach(build(name, head), {1: tp.TopK(0.5)})
    batches = [make_inputs(name, head, lengths=lengths, seed=seed) for seed, lengths in enumerate([(17, 5, 30), (4, 9)])]
    expected = [outputs_of(model, inputs) for inputs in batches]
    wrong = []

    def work(inputs, right):
        for _ in range(20):
            try:
                assert_same(outputs_of(model, inputs), right)
                if head == "ForQuestionAnswering":
                    with torch.no_grad():
                        said = model(**inputs).start_logits
                    assert torch.equal(said == NOWHERE, inputs["attention_mask"] == 0)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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
