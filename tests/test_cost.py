"""MACs: what `cost` counts is what torch's own counter sees run, and what a hand calculation gives."""

import pytest
import torch
import transformers as hf
from families import build, make_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hf_tokenprune as tp
from hf_tokenprune import cost
from hf_tokenprune.modeling.architectures import find_encoder, get_layers
from hf_tokenprune.modeling.calls import LayerTrace
from hf_tokenprune.modeling.selection import Selector

CASES = [
    ("bert", "Model"),
    ("bert", "ForSequenceClassification"),
    ("bert", "ForMultipleChoice"),
    ("distilbert", "Model"),
    ("distilbert", "ForSequenceClassification"),
    ("esm", "ForSequenceClassification"),
    ("modernbert", "Model"),
    ("modernbert", "ForSequenceClassification"),
    ("nomic_bert", "ForSequenceClassification"),
    ("llama", "Model"),
    ("qwen3", "ForSequenceClassification"),
    ("vit", "Model"),
    ("vit", "ForImageClassification"),
    ("siglip", "VisionModel"),
    ("siglip", "ForImageClassification"),
]


def counted_macs(model, inputs):
    """MACs of each layer by torch's counter. It does not know the CPU's fused attention, so that is spelled out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    counts = counter.get_flop_counts()
    family, encoder = find_encoder(model)
    path = next(name for name, module in model.named_modules() if module is encoder)
    stem = ".".join(part for part in (type(model).__name__, path, family.layers) if part)
    return [sum(counts[f"{stem}.{i}"].values()) // 2 for i in range(len(get_layers(family, encoder)))]


def half_kept(bins):
    selector = tp.RankBins(bins=bins)
    selector.set_kept([True] * (bins // 2) + [False] * (bins - bins // 2))
    return selector


@pytest.mark.parametrize(("name", "head"), CASES)
def test_packed_macs_are_those_that_run(name, head):
    model = tp.pack(build(name, head))
    counted = counted_macs(model, make_inputs(name, head))
    assert cost.trace_macs(model) == counted


@pytest.mark.parametrize(("name", "head"), CASES)
def test_pruned_macs_are_those_that_run(name, head):
    model = tp.attach(build(name, head), {0: tp.TopK(keep=0.7), 2: half_kept(4)})
    counted = counted_macs(model, make_inputs(name, head))
    assert cost.trace_macs(model) == counted
    assert counted[3] < counted[1] < counted[0]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_padded_macs_are_those_that_run(name, head):
    model, inputs = build(name, head), make_inputs(name, head)
    counted = counted_macs(model, inputs)
    ids = inputs.get("input_ids")
    rows, width = (5, 37 - (name == "siglip")) if ids is None else (ids[..., 0].numel(), ids.shape[-1])
    assert cost.padded_macs(model, rows, width) == counted
    tp.attach(model, {0: tp.TopK(keep=0.5)})
    assert cost.padded_macs(model, rows, width) == counted


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[0] not in ("vit", "siglip")])
def test_dense_macs_are_those_of_each_sequence_alone(name, head):
    model, lengths = build(name, head), (7, 12)
    alone = [counted_macs(model, make_inputs(name, head, lengths=(n,))) for n in lengths]
    choices = 2 if head == "ForMultipleChoice" else 1
    assert cost.dense_macs(model, lengths * choices) == [sum(layer) for layer in zip(*alone, strict=True)]


def test_hand_calculation():
    config = hf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = tp.pack(hf.BertForSequenceClassification(config).eval())
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])}
    inputs["attention_mask"] = (inputs["input_ids"] > 0).long()
    with torch.no_grad():
        model(**inputs)
    per_token = 4 * 32 * 32 + 2 * 32 * 48
    assert cost.dense_macs(model, [3, 5]) == [8 * per_token + 2 * 32 * (9 + 25)] * 2
    assert cost.padded_macs(model, 2, 5) == [10 * per_token + 2 * 32 * 50] * 2
    last = 8 * 3 * 32 * 32 + 2 * 32 * (3 + 5) + 2 * (32 * 32 + 2 * 32 * 48)  # one query and one survivor of each sequence
    assert cost.trace_macs(model) == [8 * per_token + 2 * 32 * (9 + 25), last]


@pytest.mark.parametrize(("name", "after"), [("bert", 1024 + 3072), ("distilbert", 3072), ("modernbert", 3072 + 1536)])
def test_survivors_cost_what_the_family_runs_on_them(name, after):
    shape = cost.layer_costs(build(name, "Model"))[0]
    assert shape.after == after
    assert shape.before + shape.after == sum(p.numel() for p in matrices(name))
    assert shape.attention == 2 * 32


def matrices(name):
    family, encoder = find_encoder(build(name, "Model"))
    return [p for p in get_layers(family, encoder)[0].parameters() if p.dim() == 2]


def test_layers_may_differ_in_heads_and_units():
    model = build("bert", "Model")
    layer = model.encoder.layer[1]
    for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
        part.weight, part.bias, part.out_features = torch.nn.Parameter(part.weight[:8]), torch.nn.Parameter(part.bias[:8]), 8
    output = layer.attention.output.dense
    output.weight, output.in_features = torch.nn.Parameter(output.weight[:, :8]), 8
    assert [shape.attention for shape in cost.layer_costs(model)] == [64, 16, 64, 64]
    counted = counted_macs(tp.pack(model), make_inputs("bert", "Model"))
    assert cost.trace_macs(model) == counted


def test_a_trace_can_be_given():
    model = tp.pack(build("bert", "Model"))
    trace = [LayerTrace([4, 6], [4, 6], [4, 6], [4, 6])] * 4
    assert cost.trace_macs(model, trace) == cost.dense_macs(model, [4, 6])


class Costly(Selector):
    kind = "costly"

    def macs(self, tokens):
        return 1000 * tokens


def test_the_selector_pays_for_itself():
    model = tp.pack(build("bert", "ForSequenceClassification"))
    trace = [LayerTrace([4, 6], [4, 6], [4, 6], [4, 6])] * 4
    free = cost.trace_macs(model, trace)
    model.token_pruner.sites["1"] = Costly()
    paid = cost.trace_macs(model, trace)
    assert [b - a for a, b in zip(free, paid, strict=True)] == [0, 10_000, 0, 0]


def test_meter_adds_up_batches():
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(keep=0.5)})
    meter = cost.CostMeter(model, max_length=40)
    spent = 0
    for lengths in ((17, 5, 30), (3, 9)):
        with torch.no_grad():
            model(**make_inputs("bert", "ForSequenceClassification", lengths=lengths))
        meter.update()
        spent += sum(cost.trace_macs(model))
    total = meter.cost
    assert total.sequences == 5
    assert total.spent == spent
    assert total.dense == sum(cost.dense_macs(model, [17, 5, 30, 3, 9]))
    assert total.padded == sum(cost.padded_macs(model, 5, 40))
    # CLS stays; of 16, 4, 29, 2 and 8 others half are kept, ranks with (r + 0.5) / n < 0.5.
    kept = 5 + 8 + 2 + 14 + 1 + 4
    assert total.tokens_per_layer == (64 / 5, kept / 5, kept / 5, 1.0)
    assert total.true_length_reduction == total.dense / total.spent > 1
    assert total.padded_reduction == total.padded / total.spent > total.true_length_reduction


def test_a_packed_model_without_sites_spends_what_the_dense_one_does():
    model = tp.pack(build("bert", "Model"))
    meter = cost.CostMeter(model, max_length=30)
    with torch.no_grad():
        model(**make_inputs("bert", "Model"))
    meter.update()
    assert meter.cost.true_length_reduction == 1.0
    assert meter.cost.tokens_per_layer == (70 / 5,) * 4


def test_what_cannot_be_counted_says_why():
    dense = build("bert", "Model")
    with pytest.raises(tp.errors.UnsupportedModelError, match="pack"):
        cost.trace_macs(dense)
    with pytest.raises(tp.errors.UnsupportedModelError, match="Supported families"):
        cost.layer_costs(torch.nn.Sequential(dense.encoder))
    model = tp.pack(dense)
    meter = cost.CostMeter(model, max_length=10)
    with pytest.raises(tp.errors.UnsupportedInputError, match="not run"):
        meter.update()
    with pytest.raises(tp.errors.UnsupportedInputError, match="update"):
        _ = meter.cost
    with torch.no_grad():
        model(**make_inputs("bert", "Model", lengths=(12, 3)))
    with pytest.raises(tp.errors.UnsupportedInputError, match="12 tokens"):
        meter.update()


def test_attention_without_queries_is_refused():
    model = build("bert", "Model")
    attention = model.encoder.layer[0].attention.self
    attention.lookup = attention.query
    del attention.query
    with pytest.raises(tp.errors.UnsupportedModelError, match="lookup"):
        cost.layer_costs(model)


def test_attention_of_parts_that_are_not_known_is_refused_rather_than_free():
    """As `torch.ao`'s quantised linears are."""
    model = build("bert", "Model")
    attention = model.encoder.layer[0].attention.self
    for name in ("query", "key", "value"):
        setattr(attention, name, torch.nn.Sequential())
    with pytest.raises(tp.errors.UnsupportedModelError, match="holds no torch"):
        cost.layer_costs(model)
