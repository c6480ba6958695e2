"""Models whose weights were cut: they compute, cost and drop what a model of that size does, and say what is left of them."""

import copy
import json
import resource
import warnings

import pytest
import torch
import transformers as hf
from families import FAMILIES, LABELS, VOCAB, build, make_inputs, outputs_of
from reference import Reference, Rule, share
from test_cost import counted_macs
from test_pruning import LENGTHS, SUMMARY, assert_same_samples
from training_helpers import at_home

import hf_tokenprune as tp
from hf_tokenprune.modeling.architectures import find_encoder, get_layers
from hf_tokenprune.modeling.configs import settle_config
from hf_tokenprune.modeling.modeling_token_pruned import resize
from hf_tokenprune.modeling.selection import Skim
from hf_tokenprune.modeling.shapes import shape_map
from hf_tokenprune.modeling.sizes import sizes_of

HEAD, TOKENS, IMAGES = "ForSequenceClassification", "ForTokenClassification", "ForImageClassification"
H, A, F = 32, 4, 48  # hidden units, and heads (of 8) and FFN units of each of 4 layers


def cuts(heads=None, units=None, hidden=None):
    return {"heads": heads or [range(A)] * 4, "units": units or [range(F)] * 4, "hidden": hidden}


CUTS = {
    "mixed": cuts([[0, 2], [1], [], [3, 0]], [range(10), [], [], range(7, 40, 3)], range(0, H, 2)),
    "heads and units": cuts([[0, 2], [1], [], [3, 0]], [range(10), [], range(3, 9), range(7, 40, 3)]),
    "a layer": cuts([range(A), [], range(A), range(A)], [range(F), [], range(F), range(F)]),
    "the first layer": cuts([[], *[range(A)] * 3], [[], *[range(F)] * 3]),
    "units": cuts(units=[range(5, 25), range(20), range(28, 48), range(0, 40, 2)]),
    "heads and hidden": cuts([[1, 3]] * 4, hidden=range(3, 19)),
    "heads": cuts([[1, 3]] * 4),
    "hidden": cuts(hidden=range(16)),
    "an attention block": cuts([range(A), [], range(A), range(A)]),
    "heads of groups": cuts([[0], [1], [], [0, 1]], [range(10), [], range(3, 9), range(7, 40, 3)]),
    "an FFN": cuts(units=[range(F), [], range(F), range(F)]),
    "other units in one layer": cuts(units=[range(F), range(20), range(F), range(F)]),
}


def cut_model(name, head, what, sites=()):
    """A model that drops tokens at the sites, or none, and has been cut."""
    model = tp.attach(build(name, head), dict(sites))
    full = sizes_of(model)[2]  # DINOv2 has more
    units = [range(full[0]) if some == range(F) else some for some in CUTS[what]["units"]]
    return resize(model, **{**CUTS[what], "units": units})


def half():
    return {0: tp.TopK(0.5), 1: tp.TopK(6), 2: tp.TopK(3)}


def samplers():
    return {layer: sampler(layer) for layer in range(4)}


def sampler(seed):
    torch.manual_seed(seed)
    skim = Skim(H, width=5)
    torch.nn.init.normal_(skim.net[4].weight, std=0.2)
    skim.offset.fill_(-1.0)
    return skim


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# Sizes.


def parameters_of(name, hidden, layers):
    """How many parameters a classifier of these sizes has."""
    blocks = norms = 0
    for heads, units in layers:
        width = 8 * heads
        blocks += (4 * hidden * width + 3 * width + hidden) * (heads > 0) + (2 * hidden * units + units + hidden) * (units > 0)
        norms += 2 * hidden * (2 if name == "vit" else (heads > 0) + (units > 0))
    rest = {
        "bert": (VOCAB + 80 + 2) * hidden + 2 * hidden + hidden * hidden + hidden,
        "distilbert": (VOCAB + 80) * hidden + 2 * hidden + hidden * hidden + hidden,
        "vit": (1 + 37) * hidden + 3 * 16 * hidden + hidden + 2 * hidden,
    }
    return rest[name] + blocks + norms + LABELS * hidden + LABELS


@pytest.mark.parametrize("what", CUTS)
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_parameters_and_files_are_as_small_as_the_sizes_say(tmp_path, name, what):
    head = IMAGES if name == "vit" else HEAD
    dense = build(name, head)
    assert sizes_of(dense) == (H, [A] * 4, [F] * 4)
    before = sum(p.numel() for p in dense.parameters())
    assert before == parameters_of(name, H, [(A, F)] * 4)
    model, wanted = cut_model(name, head, what), CUTS[what]
    left = [(len(a), len(f)) for a, f in zip(wanted["heads"], wanted["units"], strict=True) if len(a) + len(f)]
    hidden = H if wanted["hidden"] is None else len(wanted["hidden"])
    assert sizes_of(model) == (hidden, [a for a, _ in left], [f for _, f in left])
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters_of(name, hidden, left) < before
    model.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").read_bytes()
    assert len(file) == 8 + int.from_bytes(file[:8], "little") + 4 * count


MAPS = {
    "mixed": (16, [(0, 2, 10), (1, 1, 0), (3, 2, 11)], {}),
    "heads and units": (H, [(0, 2, 10), (1, 1, 0), (2, 0, 6), (3, 2, 11)], {}),
    "a layer": (H, [(0, A, F), (1, A, F), (2, A, F)], {"num_hidden_layers": 4}),
    "units": (H, [(layer, A, 20) for layer in range(4)], {"intermediate_size": F}),
    "heads and hidden": (16, [(layer, 2, F) for layer in range(4)], {"hidden_size": H, "num_attention_heads": A}),
}


@pytest.mark.parametrize("without", ["heads", "units"])
def test_cutting_whole_blocks_warns_of_nothing(without):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        resize(tp.pack(build("bert", HEAD)), **cuts(**{without: [[]] * 4}))
    assert heard == []


@pytest.mark.parametrize("what", MAPS)
def test_the_shape_map_says_what_is_left_and_what_was(what):
    hidden, layers, dense = MAPS[what]
    model = cut_model("bert", HEAD, what)
    layers = [{"layer": layer, "heads": heads, "units": units} for layer, heads, units in layers]
    assert model.config.token_pruning["shapes"] == {"hidden": hidden, "layers": layers, "dense": dense, "restore": {}}
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == ((hidden, len(layers)) if dense else (H, 4))
    assert "shapes" not in tp.pack(build("bert", HEAD)).config.token_pruning


def test_the_rest_of_the_weights_stays_where_it_was():
    model, dense = cut_model("bert", HEAD, "mixed"), build("bert", HEAD)
    hidden, last = torch.arange(0, H, 2), dense.bert.encoder.layer[3]
    mine = model.bert.encoder.layer[2]
    heads, units = torch.cat([torch.arange(24, 32), torch.arange(8)]), torch.arange(7, 40, 3)
    assert torch.equal(mine.attention.self.key.weight, last.attention.self.key.weight[heads][:, hidden])
    assert torch.equal(mine.attention.output.dense.weight, last.attention.output.dense.weight[hidden][:, heads])
    assert torch.equal(mine.intermediate.dense.weight, last.intermediate.dense.weight[units][:, hidden])
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, dense.bert.embeddings.word_embeddings.weight[:, hidden])
    assert torch.equal(model.bert.pooler.dense.weight, dense.bert.pooler.dense.weight[hidden][:, hidden])


# Cut again, packed, detached, copied.

TWICE = {
    "again": (
        CUTS["mixed"],
        {"heads": [[1], [0], [0, 1]], "units": [range(5), [], [1, 2]], "hidden": range(8)},
        cuts([[2], [1], [], [3, 0]], [range(5), [], [], [10, 13]], range(0, 16, 2)),
    ),
    "another layer": (
        CUTS["mixed"],
        {"heads": [[], [0], [1]], "units": [[], [], [0]]},
        cuts([[], [1], [], [0]], [[], [], [], [7]], range(0, H, 2)),
    ),
    "after a layer": (
        CUTS["a layer"],
        {"heads": [[1, 3], [], [0]], "units": [range(F), range(9), []], "hidden": range(4, 20)},
        cuts([[1, 3], [], [], [0]], [range(F), [], range(9), []], range(4, 20)),
    ),
    "two layers": (
        CUTS["a layer"],
        {"heads": [range(A), [], range(A)], "units": [range(F), [], range(F)]},
        cuts([range(A), [], [], range(A)], [range(F), [], [], range(F)]),
    ),
    "uniform twice": (
        CUTS["heads and hidden"],
        {"heads": [[1]] * 4, "units": [range(9)] * 4, "hidden": range(8)},
        cuts([[3]] * 4, [range(9)] * 4, range(3, 11)),
    ),
}


@pytest.mark.parametrize("what", TWICE)
@pytest.mark.parametrize(("name", "head"), [("bert", HEAD), ("distilbert", "Model"), ("modernbert", TOKENS), ("vit", IMAGES)])
def test_cutting_twice_is_cutting_once(tmp_path, name, head, what):
    first, second, both = TWICE[what]
    inputs = make_inputs(name, head)
    twice = resize(resize(tp.pack(build(name, head)), **first), **second)
    once = resize(tp.pack(build(name, head)), **both)
    expected = outputs_of(once, inputs)
    assert_close(outputs_of(twice, inputs), expected, atol=0)
    assert sizes_of(twice) == sizes_of(once)
    assert tp.cost.dense_macs(twice, [7, 12]) == tp.cost.dense_macs(build(name, head), [7, 12])
    twice.save_pretrained(tmp_path)
    opened = at_home(tp.from_pretrained(tmp_path))
    assert tp.cost.dense_macs(opened, [7, 12]) == tp.cost.dense_macs(build(name, head), [7, 12])
    assert_close(outputs_of(opened, inputs), expected, atol=0)
    _, heads, units = sizes_of(once)
    third = {"heads": [range(min(n, 1)) for n in heads], "units": list(map(range, units))}
    assert_close(outputs_of(resize(opened, **third), inputs), outputs_of(resize(once, **third), inputs), atol=0)


@pytest.mark.parametrize("what", ["mixed", "a layer"])
@pytest.mark.parametrize(("name", "head"), [("bert", HEAD), ("distilbert", HEAD), ("modernbert", HEAD), ("vit", IMAGES)])
def test_a_cut_model_can_be_detached_packed_again_and_copied(name, head, what):
    model, inputs = cut_model(name, head, what), make_inputs(name, head)
    expected, settings = outputs_of(model, inputs), copy.deepcopy(model.config.token_pruning)
    dense = tp.detach(copy.deepcopy(model))
    assert type(dense) is getattr(hf, FAMILIES[name].stem + head)
    assert not hasattr(dense.config, "token_pruning")
    assert_close(outputs_of(dense, inputs), expected)
    twin = tp.pack(copy.deepcopy(dense))
    assert twin.config.token_pruning == settings
    assert_close(outputs_of(twin, inputs), expected, atol=0)
    _, heads, units = sizes_of(twin)
    resize(twin, heads=[[0] if n else [] for n in heads], units=[range(n) for n in units])
    assert sizes_of(twin)[1] == [min(n, 1) for n in heads] != heads
    assert_close(outputs_of(model, inputs), expected, atol=0)
    assert model.config.token_pruning == settings


# Cost.


COUNTED = [("bert", TOKENS), ("bert", HEAD), ("distilbert", HEAD), ("modernbert", "Model"), ("vit", IMAGES), ("siglip", IMAGES)]


@pytest.mark.parametrize(
    ("name", "head", "what"),
    [(*case, what) for case in COUNTED for what in CUTS if case[0] != "siglip" or not CUTS[what]["hidden"]],
)
def test_macs_of_a_cut_model_are_those_that_run(name, head, what):
    possible = tp.pack(build(name, head)).token_pruner.possible_sites()
    sites = {layer: selector for layer, selector in half().items() if layer in possible}
    dense = build(name, head)
    before, least = tp.cost.dense_macs(dense, [7, 12]), tp.cost.padded_macs(dense, 2, 40)
    model = cut_model(name, head, what, sites)
    counted = counted_macs(model, make_inputs(name, head))
    assert tp.cost.trace_macs(model) == counted
    assert tp.cost.dense_macs(model, [7, 12]) == before
    assert tp.cost.padded_macs(model, 2, 40) == least


@pytest.mark.parametrize(("name", "norm"), [("bert", 0), ("distilbert", 0), ("vit", 2 * H)])
def test_a_block_that_is_gone_has_no_weights_and_costs_nothing(name, norm):
    head = IMAGES if name == "vit" else HEAD
    for what, expected in (("an attention block", (2 * H * F, 0)), ("an FFN", (4 * H * H, 2 * H))):
        model = cut_model(name, head, what)
        family, encoder = find_encoder(model)
        layer = get_layers(family, encoder)[1]
        gone = layer.get_submodule(family.attention if "attention" in what else family.ffn)
        assert not list(gone.parameters())
        weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
        vectors = sum(p.numel() for p in layer.parameters() if p.dim() == 1)
        assert weights == expected[0]
        assert vectors == norm + 2 * H + (F + H if "attention" in what else 4 * H)
        shape = tp.cost.layer_costs(model)[1]
        assert (shape.before + shape.after, shape.attention) == expected
        block = tp.cost.block_costs(model)[1]
        assert (sum(block.attention), block.pairs, block.ffn) == (
            (0, 0, expected[0]) if "attention" in what else (4 * H * H, 2 * H, 0)
        )


# Dropping tokens.


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "nomic_bert", "esm", "vit", "siglip"])
def test_tokens_are_dropped_from_a_cut_model_as_from_a_masked_one(name):
    head = IMAGES if FAMILIES[name].images else TOKENS
    inputs, sites = make_inputs(name, head, LENGTHS), (0, 1, 3) if name != "vit" else (0, 1)
    smaller = cuts(
        [[0, 2], [1], [], [3, 0]], [range(10), [], range(3, 9), range(7, 40, 3)], range(20) if name != "siglip" else None
    )
    model = resize(tp.attach(build(name, head), {layer: tp.TopK(0.5) for layer in sites}), **smaller)
    dense = tp.detach(copy.deepcopy(model))
    dense.config._attn_implementation = "eager"
    reference = Reference(dense, dict.fromkeys(sites, Rule(share(0.5), SUMMARY[name])))
    with torch.no_grad():
        assert_same_samples(model(**inputs), reference, inputs)
    assert sum(model.token_pruner.trace[3].survived) < sum(model.token_pruner.trace[0].entered) / 2


def test_sites_need_attention_and_move_with_their_layers():
    model = tp.attach(build("bert", TOKENS), {layer: tp.TopK(0.5 + layer / 10) for layer in range(4)})
    resize(model, **cuts([[], [], [0], range(A)], [[], range(F), range(F), range(F)]))
    pruner = model.token_pruner
    assert {layer: site.share for layer, site in pruner.sites.items()} == {"1": 0.7, "2": 0.8}
    assert model.config.token_pruning["sites"] == [
        {"layer": 1, "selector": {"kind": "top_k", "keep": 0.7}},
        {"layer": 2, "selector": {"kind": "top_k", "keep": 0.8}},
    ]
    assert pruner.possible_sites() == [1, 2]
    outputs_of(model, make_inputs("bert", TOKENS, LENGTHS))
    assert pruner.trace[0].survived == pruner.trace[0].entered
    assert sum(pruner.trace[2].survived) < sum(pruner.trace[1].survived) < sum(pruner.trace[0].survived)
    with pytest.raises(tp.errors.ConfigError, match="Layers without attention cannot rank"):
        tp.attach(model, {0: tp.TopK(0.5)})
    assert tp.attach(model, {0: Skim(H)}).token_pruner.site(0).idle


# What is damaged or makes no sense.

LAYER = {"layer": 0, "heads": 2, "units": 10}


def layers(*entries):
    return {"layers": [{**LAYER, **entry} for entry in entries]}


DAMAGED = {
    "a list": [],
    "nothing": None,
    "empty": {},
    "an unknown key": {"colour": "red"},
    "no hidden units": {"hidden": 0},
    "hidden as text": {"hidden": "16"},
    "hidden as bool": {"hidden": True},
    "hidden beyond the model": {"hidden": H + 1},
    "hidden beyond memory": {"hidden": 2**40},
    "hidden below that": {"hidden": 2**31 - 1},
    "no layers": {"layers": []},
    "layers as a number": {"layers": 3},
    "a layer as a number": {"layers": [3]},
    "a layer without units": {"layers": [{"layer": 0, "heads": 2}]},
    "a layer with more": layers({"colour": "red"}),
    "heads as a float": layers({"heads": 2.0}),
    "heads below 0": layers({"heads": -1}),
    "more heads than there are": layers({"heads": A + 1}),
    "heads beyond memory": layers({"heads": 2**30}),
    "more units than there are": layers({"units": F + 1}),
    "units beyond memory": layers({"units": 2**62}),
    "an empty layer": layers({"heads": 0, "units": 0}),
    "layers out of order": layers({"layer": 2}, {"layer": 1}),
    "a layer twice": layers({"layer": 2}, {"layer": 2}),
    "a layer beyond": layers({"layer": 4}),
    "a layer far beyond": layers({"layer": 2**30}),
    "a layer below 0": layers({"layer": -1}),
    "dense as a list": {"dense": []},
    "dense of another size": {"dense": {"vocab_size": 5}},
    "dense in words": {"dense": {"hidden_size": "32"}},
    "dense layer types": {"dense": {"layer_types": [1]}},
    "dense smaller than what is left": {"dense": {"hidden_size": 8}},
    "dense beyond memory": {"dense": {"intermediate_size": 2**31 - 1}},
    "dense layers without end": {"dense": {"num_hidden_layers": 10**5}},
    "restore of another size": {"restore": {"vocab_size": 5}},
    "restore as a list": {"restore": []},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_shape_map_is_refused_before_any_memory_is_taken(tmp_path, damage):
    model = cut_model("bert", HEAD, "mixed")
    good, change = model.config.token_pruning, DAMAGED[damage]
    broken = {**good["shapes"], **change} if change else change
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["token_pruning"]["shapes"] = broken
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(tp.errors.ConfigError, match=r"config\.token_pruning|has num_hidden_layers=100000"):
        tp.from_pretrained(tmp_path)
    made = type(model.config).from_dict({**model.config.to_dict(), "token_pruning": {**good, "shapes": broken}})
    with pytest.raises(tp.errors.ConfigError, match=r"config\.token_pruning"):
        type(model)(made)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


NOTHING = {
    "no layer": {"heads": [[]] * 4, "units": [[]] * 4},
    "no hidden unit": {"heads": [range(A)] * 4, "units": [range(F)] * 4, "hidden": []},
}


@pytest.mark.parametrize("what", NOTHING)
def test_nothing_left_is_refused_and_the_model_stays(what):
    model, inputs = tp.attach(build("bert", TOKENS), {1: tp.TopK(0.5)}), make_inputs("bert", TOKENS)
    expected = outputs_of(model, inputs)
    with pytest.raises(tp.errors.ConfigError, match="Nothing would be left"):
        resize(model, **NOTHING[what])
    assert_close(outputs_of(model, inputs), expected, atol=0)
    assert shape_map(model) is None


def test_hidden_units_of_a_family_that_has_none_to_cut_are_refused_and_the_model_stays():
    model, inputs = tp.pack(build("siglip", IMAGES)), make_inputs("siglip", IMAGES)
    expected = outputs_of(model, inputs)
    with pytest.raises(tp.errors.UnsupportedModelError, match="Hidden units"):
        resize(model, **CUTS["mixed"])
    assert_close(outputs_of(model, inputs), expected, atol=0)
    assert shape_map(model) is None


def test_layers_that_are_built_otherwise_are_refused():
    model = build("dinov2", "Model", use_swiglu_ffn=True)
    with pytest.raises(tp.errors.UnsupportedModelError, match="not built like"):
        sizes_of(model)
    with pytest.raises(tp.errors.UnsupportedModelError, match="not built like"):
        tp.StructuredPruning(target_macs=0.5).attach(model)


def test_a_family_that_sets_no_ffn_size_can_be_cut(tmp_path):
    """DINOv2's FFN is a multiple of its hidden size; the tiny config of the other tests has a size that it does not read."""
    config = hf.Dinov2Config(image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model, inputs = tp.pack(hf.Dinov2Model(config).eval()), make_inputs("dinov2", "Model")
    resize(model, heads=[[0, 2]] * 2, units=[range(128)] * 2)
    assert settle_config(model)
    model.save_pretrained(tmp_path)
    assert_close(outputs_of(at_home(tp.from_pretrained(tmp_path)), inputs), outputs_of(model, inputs), atol=0)
