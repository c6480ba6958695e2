"""Gates on weights: 0 does what cutting out does, 1 does nothing, and in between the effect is continuous and has a gradient."""

import copy

import pytest
import torch
from families import CASES as ALL_CASES
from families import FAMILIES, build, class_head, make_inputs, outputs_of
from torch import nn
from training_helpers import no_dropout

import hf_tokenprune as tp
from hf_tokenprune.modeling.modeling_token_pruned import resize
from hf_tokenprune.modeling.selection import Skim
from hf_tokenprune.modeling.sizes import sizes_of
from hf_tokenprune.modeling.spans import NOWHERE
from hf_tokenprune.structure import PARTS, Layout, StructureGates, gated_layer_norm

CASES = [case for case in ALL_CASES if FAMILIES[case[0]].weights]
SOME = [
    ("bert", "ForSequenceClassification"),
    ("electra", "Model"),
    ("esm", "ForTokenClassification"),
    ("distilbert", "ForMaskedLM"),
    ("modernbert", "ForSequenceClassification"),
    ("nomic_bert", "ForTokenClassification"),
    ("eurobert", "ForSequenceClassification"),
    ("vit", "ForImageClassification"),
    ("dinov2", "Model"),
    ("siglip", "ForImageClassification"),
]
OFF = {
    "no block": (),
    "an attention block": [("attention", 1)],
    "an FFN": [("ffn", 2)],
    "a layer": [("attention", 1), ("ffn", 1)],
    "the first layer": [("attention", 0), ("ffn", 0)],
    "the last layer": [("attention", 3), ("ffn", 3)],
    "all attention": [("attention", layer) for layer in range(4)],
    "all but one block": [("attention", 0), ("ffn", 0), ("ffn", 1), ("attention", 2), ("ffn", 2), ("attention", 3), ("ffn", 3)],
    "every head of a block": [("heads", 1)],
    "every unit of a block": [("units", 2)],
}
MIXED = [("attention", 1), ("ffn", 1), ("ffn", 2), ("attention", 3)]


def uneven(name, head):
    """A model whose biases and norms are not at their start."""
    model = build(name, head, **no_dropout(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def put_gates(model, name):
    """Gates on all that may be cut."""
    tp.pack(model)
    parts = PARTS if name not in FAMILIES or FAMILIES[name].hidden else PARTS[1:]
    gates = StructureGates(model, Layout(model, parts))
    model.token_pruner.structure = gates
    return gates


def random_gates(layout, off):
    """Gates of 0 and 1: some heads, units and hidden units, and all blocks but those that are off or have nothing left."""
    gates = (torch.rand(layout.size) > 0.4).float()
    for name in off:
        gates[layout.parts[name]] = 0.0
    for layer in range(4):
        for part, block in (("heads", "attention"), ("units", "ffn")):
            left = (block, layer) not in off and bool(layout.of(gates, (part, layer)).any())
            gates[layout.parts[block, layer]] = float(left)
    return gates


def soft_gates(layout):
    return (0.3 + 0.6 * torch.rand(layout.size)).requires_grad_()


def loss_of(model, inputs):
    """A number that depends on all that a head gives, but for what it says of padding."""
    generator = torch.Generator().manual_seed(3)
    outputs = [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]
    outputs = [value.masked_fill(value == NOWHERE, 0.0) for value in outputs]
    return sum((value * torch.randn(value.shape, generator=generator)).sum() for value in outputs)


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "head"), CASES)
def test_open_gates_give_the_dense_outputs(name, head):
    model, inputs = uneven(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    gates = put_gates(model, name)
    gates.hard = torch.ones(gates.layout.size)
    assert_close(outputs_of(model, inputs), dense)


def assert_cut_equals_gated(name, head, off):
    model, inputs = uneven(name, head), make_inputs(name, head)
    gates = put_gates(model, name)
    dense, before = outputs_of(model, inputs), sizes_of(model)
    gates.hard = hard = random_gates(gates.layout, off)
    gated = outputs_of(model, inputs)
    assert any((gated[key] - dense[key]).abs().max() > 0.01 for key in dense)
    hidden, heads, units = gates.layout.left(hard)
    resize(model, hidden=hidden, heads=heads, units=units)
    assert model.token_pruner.structure is None
    assert sum(sizes_of(model)[1]) < sum(before[1])
    left = outputs_of(model, inputs)
    for key in gated:
        if gated[key].shape != left[key].shape:  # hidden states
            assert gated[key][..., hidden].count_nonzero() == gated[key].count_nonzero()
            gated[key] = gated[key][..., hidden]
    assert_close(left, gated, atol=2e-5)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_cut_equals_gated_for_every_head(name, head):
    assert_cut_equals_gated(name, head, MIXED)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(("name", "head"), SOME)
def test_cut_equals_gated_whatever_is_off(name, head, off):
    assert_cut_equals_gated(name, head, OFF[off])


def test_a_refusal_leaves_the_model_as_it_was():
    model, inputs = tp.pack(build("bert", "Model")), make_inputs("bert", "Model")
    expected = outputs_of(model, inputs)
    with pytest.raises((IndexError, ValueError)):
        resize(model, heads=[range(4)] * 9, units=[range(48)] * 9)
    assert model.token_pruner.handles
    assert_close(outputs_of(model, inputs), expected)


@pytest.mark.parametrize("off", [(), MIXED], ids=["no block", "mixed"])
@pytest.mark.parametrize(("name", "near"), [("bert", 0), ("bert", 2), ("distilbert", 0), ("modernbert", 2), ("qwen3", 0)])
def test_cut_equals_gated_where_importance_is_learned(name, near, off):
    """What a scorer reads is cut along, and until then its norms are over what is left."""
    head = "ForTokenClassification"
    model, inputs = tp.pack(uneven(name, head)), make_inputs(name, head)
    sites = {layer: tp.RankBins(8, 32, 32, near) for layer in range(4)}
    for site in sites.values():
        site.set_kept([1] * 6 + [0] * 2)
        for parameter in list(site.scorer.parameters())[1:]:
            torch.nn.init.normal_(parameter, std=0.3)
    tp.attach(model, sites)
    gates = put_gates(model, name)
    gates.hard = hard = random_gates(gates.layout, off)
    for layer in range(4):  # as training does where attention is gated off
        if hard[gates.layout.parts["attention", layer]] == 0:
            sites[layer].set_kept([1] * 8)
    gated = outputs_of(model, inputs)
    traced = [layer.survived for layer in model.token_pruner.trace]
    hidden, heads, units = gates.layout.left(hard)
    resize(model, hidden=hidden, heads=heads, units=units)
    assert_close(outputs_of(model, inputs), gated, atol=2e-5)
    assert sum(traced[-1]) < sum(model.token_pruner.trace[0].arrived)
    left = list(model.token_pruner.sites.values())
    for site in left:
        maps = 2 if near else 1
        assert [tuple(part.shape) for part in site.scorer.parameters()][1:] == [(maps, site.hidden), (maps, site.width)]
    assert {site.width for site in left} != {32}


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit"])
def test_samplers_judge_by_what_is_left(name):
    """While weights are gated they say of a token what they will say of it once hidden units are cut out."""
    head = class_head(name)
    model, inputs = tp.pack(uneven(name, head)), make_inputs(name, head)
    samplers = {layer: Skim(32, 6) for layer in range(4)}
    for sampler in samplers.values():
        sampler.offset.fill_(0.0)
        for parameter in sampler.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    tp.attach(model, samplers)
    gates = put_gates(model, name)
    gates.hard = random_gates(gates.layout, ())
    pruner = model.token_pruner

    def judged():
        pruner.remembers = True
        outputs_of(model, inputs)
        with torch.no_grad():
            return [pruner.site(layer).logits(call.entered[0]) for layer, call in enumerate(pruner.last_forward.calls)]

    gated = judged()
    hidden, heads, units = gates.layout.left(gates.hard)
    resize(model, hidden=hidden, heads=heads, units=units)
    for before, after in zip(gated, judged(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=2e-4)


def test_gates_learn_nothing_from_samplers_that_look_on():
    model = tp.attach(build("bert", class_head("bert")), {1: Skim(32, 6)})
    gates = put_gates(model, "bert")
    gates.soft = torch.full((gates.layout.size,), 0.5, requires_grad=True)
    logits = model.train().token_pruner.site(1).logits(torch.randn(4, 32, requires_grad=True))
    assert logits.requires_grad
    assert torch.autograd.grad(logits.sum(), gates.soft, allow_unused=True) == (None,)


@pytest.mark.parametrize(("name", "head"), SOME)
def test_soft_gates_are_in_force_in_training_only_and_agree_with_hard_ones(name, head):
    model, inputs = uneven(name, head), make_inputs(name, head)
    gates = put_gates(model, name)
    dense = outputs_of(model, inputs)
    gates.soft = random_gates(gates.layout, MIXED)
    assert_close(outputs_of(model, inputs), dense, atol=0)
    soft = outputs_of(model.train(), inputs)
    gates.pruner.soft_in_eval = True
    assert_close(outputs_of(model.eval(), inputs), soft)
    gates.hard, gates.soft = gates.soft, None
    assert_close(outputs_of(model, inputs), soft)


@pytest.mark.parametrize(
    ("name", "head", "part"),
    [
        (*case, part)
        for case in SOME
        for part in ("hidden", ("heads", 1), ("units", 1), ("attention", 1), ("ffn", 1))
        if FAMILIES[case[0]].hidden or part != "hidden"
    ],
)
def test_soft_gates_are_continuous(name, head, part):
    model, inputs = uneven(name, head), make_inputs(name, head)
    gates = put_gates(model, name)
    gates.soft, gates.pruner.soft_in_eval = soft_gates(gates.layout).detach(), True

    def outputs(gate):
        gates.soft[gates.layout.parts[part].start] = gate
        return next(iter(outputs_of(model, inputs).values()))

    closed, ajar, nearly, opened = (outputs(gate) for gate in (0.0, 1e-4, 1 - 1e-4, 1.0))
    whole = (opened - closed).abs().max()
    assert whole > 1e-3
    assert (ajar - closed).abs().max() < 0.01 * whole
    assert (nearly - opened).abs().max() < 0.01 * whole


@pytest.mark.parametrize(("name", "head"), CASES)
def test_the_gradient_reaches_every_gate(name, head):
    model, inputs = uneven(name, head).train(), make_inputs(name, head)
    gates = put_gates(model, name)
    gates.soft = soft = soft_gates(gates.layout)
    (gradient,) = torch.autograd.grad(loss_of(model, inputs), soft)
    assert gradient.isfinite().all()
    for part, place in gates.layout.parts.items():
        assert (gradient[place] != 0).all(), part
    direction, step = torch.randn(gates.layout.size), 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            gates.soft = soft + sign * step * direction
            ends.append(loss_of(model, inputs).double())
    slope = (ends[0] - ends[1]) / (2 * step)
    scale = gradient.norm() * direction.norm()
    assert abs(slope - gradient @ direction) < 5e-3 * scale


@pytest.mark.parametrize(("name", "head"), SOME)
def test_gradient_checkpointing_changes_no_gradient(name, head):
    inputs, found = make_inputs(name, head), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = uneven(name, head).train()
        gates = put_gates(model, name)
        if checkpointing:
            model.activation_checkpointing_enable()
        gates.soft = soft = soft_gates(gates.layout)
        loss_of(model, inputs).backward()
        found.append({"gates": soft.grad, **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}})
    assert found[0]["gates"].count_nonzero() == gates.layout.size
    assert_close(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("way", ["remove", "detach", "attach again"])
@pytest.mark.parametrize(("name", "head"), SOME)
def test_without_the_gates_the_model_is_as_before(name, head, way):
    model, inputs = uneven(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    packed = outputs_of(tp.pack(model), inputs)
    gates = put_gates(model, name)
    gates.hard = random_gates(gates.layout, MIXED)
    assert any((value - packed[key]).abs().max() > 0.01 for key, value in outputs_of(model, inputs).items())
    if way == "remove":
        gates.remove()
    elif way == "detach":
        tp.detach(model)
    else:
        tp.attach(model)
    assert_close(outputs_of(model, inputs), dense if way == "detach" else packed, atol=0)


@pytest.mark.parametrize(("name", "head"), SOME)
def test_a_copy_of_a_gated_model_works_alone(name, head):
    model, inputs = uneven(name, head), make_inputs(name, head)
    gates = put_gates(model, name)
    dense = outputs_of(model, inputs)
    gates.hard = hard = random_gates(gates.layout, MIXED)
    gated = outputs_of(model, inputs)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    assert_close(outputs_of(twin, inputs), gated, atol=0)
    twin.token_pruner.structure.hard.fill_(1.0)
    assert_close(outputs_of(twin, inputs), dense)
    twin.token_pruner.structure.remove()
    assert_close(outputs_of(twin, inputs), dense, atol=0)
    hidden, heads, units = gates.layout.left(hard)
    resize(third, hidden=hidden, heads=heads, units=units)
    left = outputs_of(third, inputs)
    assert_close(left, {k: v if v.shape == left[k].shape else v[..., hidden] for k, v in gated.items()}, atol=2e-5)
    assert_close(outputs_of(model, inputs), gated, atol=0)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "vit"])
def test_lower_precision_stays_what_it_is(name):
    head = "ForImageClassification" if FAMILIES[name].images else "ForSequenceClassification"
    model, inputs = uneven(name, head), make_inputs(name, head)
    gates = put_gates(model, name)
    gates.soft, gates.pruner.soft_in_eval = soft_gates(gates.layout), True
    expected = outputs_of(model, inputs)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs_of(model, inputs)["logits"].float(), expected, rtol=0, atol=0.3)
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    logits = outputs_of(model.bfloat16(), inputs)["logits"]
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.3)


# The layout.


def test_a_layout_has_gates_for_what_is_there():
    model = tp.pack(build("bert", "Model"))
    assert Layout(model).size == 32 + 4 * (4 + 48 + 2)
    heads = Layout(model, ("heads",))
    assert heads.size == 16
    gates = torch.ones(16)
    gates[4:7] = 0.0
    assert heads.left(gates) == (None, [[0, 1, 2, 3], [3], [0, 1, 2, 3], [0, 1, 2, 3]], [list(range(48))] * 4)
    assert heads.share(gates, ("heads", 1)) == 0.25
    assert heads.share(gates, "hidden") == heads.share(gates, ("ffn", 1)) == 1
    resize(model, heads=[range(4), [], [0], [0]], units=[[], range(5), range(5), range(5)], hidden=range(7))
    layout = Layout(model)
    assert layout.size == 7 + (4 + 1) + (5 + 1) + 2 * (1 + 5 + 2)
    assert ("attention", 1) not in layout.parts
    assert ("ffn", 0) not in layout.parts
    assert layout.left(torch.ones(layout.size)) == (
        None,
        [[0, 1, 2, 3], [], [0], [0]],
        [[], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    )


def test_hidden_units_of_a_family_that_has_none_to_cut_are_refused():
    with pytest.raises(tp.errors.UnsupportedModelError, match="Hidden units"):
        put_gates(build("siglip", "ForImageClassification"), "any")


# The norm.

NORMS = {"affine": {}, "without bias": {"bias": False}, "bare": {"elementwise_affine": False}}


def norm_of(settings, size=12):
    norm = nn.LayerNorm(size, eps=1e-3, **settings)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("settings", NORMS)
def test_the_gated_norm_is_the_norm_of_the_units_that_are_left(settings):
    norm, states = norm_of(NORMS[settings]), 3 + 2 * torch.randn(2, 5, 12)
    torch.testing.assert_close(gated_layer_norm(states, norm, torch.ones(12)), norm(states))
    kept = torch.tensor([0, 3, 4, 9])
    small = nn.LayerNorm(4, eps=1e-3, **NORMS[settings])
    small.load_state_dict({key: value[kept] for key, value in norm.state_dict().items()})
    expected = torch.zeros(2, 5, 12).index_copy(2, kept, small(states[..., kept]))
    gates = torch.zeros(12).index_fill(0, kept, 1.0)
    torch.testing.assert_close(gated_layer_norm(states, norm, gates), expected)
    assert gated_layer_norm(states.bfloat16(), norm, gates.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("settings", NORMS)
def test_the_gradient_of_the_gated_norm(settings):
    norm = norm_of(NORMS[settings], size=5)
    states, gates = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.0, 0.2, 0.9, 1.0, 0.5], dtype=torch.float64)
    given = (states.requires_grad_(), gates.requires_grad_())
    # It computes in float32, hence the wide steps.
    assert torch.autograd.gradcheck(lambda s, g: gated_layer_norm(s, norm, g), given, eps=1e-2, atol=5e-3, rtol=5e-3)
