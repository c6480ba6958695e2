"""Invariant 8: what attaches detaches, and what cannot be attached is left as it was."""

import pytest
import torch
import transformers as hf
from families import CASES, FAMILIES, TEXT, build, make_inputs, outputs_of
from families import class_head as one_head
from torch import nn

import hf_tokenprune as tp


def configs_of(model):
    """Every config object that hangs on a module of a model, once."""
    found = [module.config for module in model.modules() if isinstance(getattr(module, "config", None), hf.PreTrainedConfig)]
    return list({id(config): config for config in found}.values())


def footprint(model):
    """All that attaching could change of a model, as values to compare."""
    hooks = {
        (name, kind): list(value.items())
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if "hooks" in kind and isinstance(value, dict)
    }
    return {
        "class": type(model),
        "modules": {name: type(module) for name, module in model.named_modules()},
        "weights": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": hooks,
        "configs": [(id(config), config.to_dict(), sorted(vars(config))) for config in configs_of(model)],
        "attention": [config._attn_implementation for config in configs_of(model)],
    }


def assert_untouched(model, before):
    after = footprint(model)
    for key in before:
        assert after[key] == before[key], key


@pytest.mark.parametrize(("name", "head"), CASES)
def test_detach_restores(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    dense, before = outputs_of(model, inputs), footprint(model)
    for sites in ({}, {0: tp.TopK(0.5), 2: tp.RankBins(7)}):
        assert tp.attach(model, sites) is model
        assert type(model) is not before["class"]
        assert isinstance(model, before["class"])
        pruned = outputs_of(model, inputs)
        assert not sites or any(not torch.allclose(pruned[key], dense[key], atol=1e-3) for key in dense)
        assert tp.detach(model) is model
        assert_untouched(model, before)
        for key, value in outputs_of(model, inputs).items():
            assert torch.equal(value, dense[key]), key


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_detach_restores_the_attention_that_was_chosen(name, attention):
    model = build(name, one_head(name))
    for config in configs_of(model):
        config._attn_implementation = attention
    before = footprint(model)
    assert_untouched(tp.detach(tp.pack(model)), before)


@pytest.mark.parametrize("change", ["training", "frozen", "hooked", "hidden states asked", "own auto_map"])
def test_detach_restores_a_model_in_use(change):
    model, inputs = build("bert", "ForSequenceClassification"), make_inputs("bert", "")
    if change == "training":
        model.train()
    elif change == "frozen":
        model.bert.requires_grad_(False)
    elif change == "hooked":
        model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
        model.bert.register_forward_pre_hook(lambda *_: None)
    elif change == "hidden states asked":
        model(**inputs, output_hidden_states=True)
    else:
        model.config.auto_map = {"AutoModelForSequenceClassification": "my_file.MyModel"}
    before = footprint(model)
    tp.attach(model, {1: tp.TopK(0.5)})
    model(**inputs)
    assert_untouched(tp.detach(model), before)


def test_detach_leaves_a_dense_model_alone():
    model = build("bert", "Model")
    before = footprint(model)
    assert tp.detach(model) is model
    assert_untouched(model, before)


def test_a_hook_of_the_user_that_came_after_stays():
    model, seen = tp.pack(build("bert", "Model")), []
    model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    outputs_of(tp.detach(model), make_inputs("bert", ""))
    assert seen == [1]


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_twice_is_packing_once(name):
    model, inputs = tp.pack(build(name, one_head(name))), make_inputs(name, "")
    before, once = footprint(model), outputs_of(model, inputs)
    assert tp.pack(model) is model
    assert_untouched(model, before)
    assert torch.equal(outputs_of(model, inputs)["logits"], once["logits"])


def test_packing_a_pruned_model_leaves_its_sites():
    model = tp.attach(build("bert", "Model"), {1: tp.TopK(0.5)})
    before = footprint(model)
    assert_untouched(tp.pack(model), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_attaching_twice_replaces(name):
    model, inputs = build(name, one_head(name)), make_inputs(name, "")
    once = outputs_of(tp.attach(model, {1: tp.TopK(0.5)}), inputs)
    hooks = {key: len(value) for key, value in footprint(model)["hooks"].items()}
    tp.attach(model, {0: tp.TopK(3), 2: tp.TopK(1)}, protected_token_ids=[7] if "input_ids" in inputs else ())
    assert list(model.token_pruner.sites) == ["0", "2"]
    assert [site["layer"] for site in model.config.token_pruning["sites"]] == [0, 2]
    assert not torch.allclose(outputs_of(model, inputs)["logits"], once["logits"], atol=1e-3)
    tp.attach(model, {1: tp.TopK(0.5)})
    assert {key: len(value) for key, value in footprint(model)["hooks"].items()} == hooks
    assert model.config.token_pruning["protected_token_ids"] == []
    assert torch.equal(outputs_of(model, inputs)["logits"], once["logits"])


# What cannot be attached

SMALL = {name: TEXT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")}


def with_attention(model, attention):
    model.config._attn_implementation_internal = attention
    return model


UNSUPPORTED = {
    "T5": lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)),
    "DeBERTa of the first version": lambda: hf.DebertaModel(hf.DebertaConfig(**SMALL, intermediate_size=48)),
    "convolving DeBERTa": lambda: build("deberta-v2", "Model", conv_kernel_size=3),
    "MobileBERT": lambda: hf.MobileBertModel(hf.MobileBertConfig(**SMALL, intermediate_size=48, embedding_size=32)),
    "Llama that generates": lambda: hf.LlamaForCausalLM(FAMILIES["llama"].config),
    "Gemma 3 that generates": lambda: hf.Gemma3ForCausalLM(FAMILIES["gemma3"].config),
    "CLIP": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                                           num_attention_heads=2, image_size=8, patch_size=4)),
    "decoder BERT": lambda: build("bert", "Model", is_decoder=True),
    "decoder RoBERTa": lambda: build("roberta", "ForMaskedLM", is_decoder=True),
    "cross-attention": lambda: build("bert", "Model", is_decoder=True, add_cross_attention=True),
    "chunked BERT": lambda: build("bert", "Model", chunk_size_feed_forward=2),
    "chunked DistilBERT": lambda: build("distilbert", "Model", chunk_size_feed_forward=2),
    "dropped paths": lambda: build("dinov2", "Model", drop_path_rate=0.1),
    "last-token ELECTRA": lambda: build("electra", "ForMultipleChoice", summary_type="last"),
    "paged attention": lambda: with_attention(build("bert", "Model"), "paged|sdpa"),
    "attention of somebody else": lambda: with_attention(build("vit", "Model"), "somebody_elses"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_an_unsupported_model_is_refused_and_left_alone(what):
    model = UNSUPPORTED[what]()
    before = footprint(model)
    with pytest.raises(tp.errors.UnsupportedModelError, match=type(model).__name__):
        tp.pack(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "bert-base-uncased", None], ids=["module", "name", "None"])
def test_what_is_no_transformers_model_is_refused(model):
    with pytest.raises(tp.errors.UnsupportedModelError, match="transformers model"):
        tp.pack(model)


MISTAKES = {
    "no such layer": {"sites": {9: tp.TopK(0.5)}},
    "the pooled layer": {"sites": {1: tp.TopK(0.5), 3: tp.TopK(0.5)}},
    "not a selector": {"sites": {1: 0.5}},
    "layer as text": {"sites": {"1": tp.TopK(0.5)}},
    "layers of two kinds": {"sites": {"1": tp.TopK(0.5), 2: tp.TopK(0.5)}},
    "ids below 0": {"sites": {1: tp.TopK(0.5)}, "protected_token_ids": [-1]},
    "one id": {"sites": {1: tp.TopK(0.5)}, "protected_token_ids": 5},
}


@pytest.mark.parametrize("already", ["dense", "packed", "pruned"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_attach_is_refused_and_changes_nothing(mistake, already):
    model = build("bert", "ForSequenceClassification")
    if already != "dense":
        tp.attach(model, {2: tp.TopK(3)} if already == "pruned" else {})
    before = footprint(model)
    with pytest.raises(tp.errors.ConfigError):
        tp.attach(model, **MISTAKES[mistake])
    assert_untouched(model, before)
