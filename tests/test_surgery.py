"""Surgery in mid-run: the optimizer goes on with what is left of its moments."""

import copy

import pytest
import torch
from families import LABELS, VOCAB, build, make_inputs, outputs_of
from test_shapes import CUTS, HEAD, TOKENS, H, assert_close, cut_model, samplers

import hf_tokenprune as tp
from hf_tokenprune import surgery


def trained(model, optimizer, steps=2):
    """A few steps, without gradients left behind."""
    inputs = make_inputs("bert", TOKENS)
    labels = (inputs["input_ids"] % LABELS).masked_fill(inputs["attention_mask"] == 0, -100)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        (loss + sum(p.square().sum() for site in model.token_pruner.sites.values() for p in site.parameters())).backward()
        optimizer.step()
    return model


def operated(make):
    """A model and its optimizer, two groups of parameters, before and after surgery. And what was before."""
    model = tp.attach(build("bert", TOKENS), samplers())
    for site in model.token_pruner.sites.values():
        site.offset.fill_(10.0)
    vectors, matrices = ([p for p in model.parameters() if (p.dim() > 1) is big] for big in (False, True))
    optimizer = make([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    trained(model, optimizer)
    before = {
        name: (parameter, parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter]))
        for name, parameter in model.named_parameters()
    }
    surgery.operate(model, **CUTS["mixed"], optimizer=optimizer)
    return model, optimizer, before


OPTIMIZERS = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
}
HEADS = [*range(24, 32), *range(8)]
LEFT = {  # name after surgery: name before it, and what is left of each dimension
    "bert.encoder.layer.2.attention.self.query.weight": ("3", HEADS, range(0, H, 2)),
    "bert.encoder.layer.2.attention.self.query.bias": ("3", HEADS),
    "bert.encoder.layer.2.attention.output.dense.weight": ("3", range(0, H, 2), HEADS),
    "bert.encoder.layer.0.intermediate.dense.weight": ("0", range(10), range(0, H, 2)),
    "bert.encoder.layer.0.intermediate.dense.bias": ("0", range(10)),
    "bert.encoder.layer.2.output.dense.weight": ("3", range(0, H, 2), range(7, 40, 3)),
    "bert.encoder.layer.1.attention.output.LayerNorm.bias": ("1", range(0, H, 2)),
    "bert.embeddings.word_embeddings.weight": ("", range(VOCAB), range(0, H, 2)),
    "classifier.weight": ("", range(LABELS), range(0, H, 2)),
    "classifier.bias": ("", range(LABELS)),
    "token_pruner.sites.2.net.0.weight": ("3", range(0, H, 2)),
    "token_pruner.sites.2.net.1.weight": ("3", range(5), range(0, H, 2)),
    "token_pruner.sites.2.net.4.weight": ("3", range(2), range(5)),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_moments_are_cut_like_their_parameters(make):
    model, optimizer, before = operated(OPTIMIZERS[make])
    parameters = dict(model.named_parameters())
    for name, (layer, *dims) in LEFT.items():
        parameter = parameters[name]
        was, value, state = before[name.replace(".2.", f".{layer}.") if layer else name]
        assert parameter is was
        assert state.keys() == optimizer.state[parameter].keys()
        moments = [key for key, moment in state.items() if isinstance(moment, torch.Tensor) and moment.dim()]
        assert len(moments) == {"Adam": 3, "AdamW": 2, "SGD": 1}[make]
        for old, new in ((value, parameter), *((state[key], optimizer.state[parameter][key]) for key in moments)):
            for dim, index in enumerate(dims):
                old = old.index_select(dim, torch.tensor(list(index)))
            assert torch.equal(new, old), name


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_optimizer_goes_on_as_one_of_the_small_model(make):
    model, optimizer, before = operated(OPTIMIZERS[make])
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) < len(before)
    assert set(held) == set(model.parameters()) == set(optimizer.state)
    assert [group["weight_decay"] == 0 for group in optimizer.param_groups] == [make != "AdamW", True]
    twin = copy.deepcopy(model)
    mine = dict(model.named_parameters())
    names = {parameter: name for name, parameter in mine.items()}
    theirs = dict(twin.named_parameters())
    other = OPTIMIZERS[make](
        [{**group, "params": [theirs[names[p]] for p in group["params"]]} for group in optimizer.param_groups]
    )
    for name, parameter in theirs.items():
        other.state[parameter] = copy.deepcopy(optimizer.state[mine[name]])
    start = {name: parameter.detach().clone() for name, parameter in mine.items()}
    trained(model, optimizer)
    trained(twin, other)
    for name, parameter in theirs.items():
        assert torch.equal(mine[name], parameter), name
    assert not torch.equal(mine["classifier.weight"], start["classifier.weight"])
    assert not torch.equal(mine["bert.encoder.layer.2.output.dense.weight"], start["bert.encoder.layer.2.output.dense.weight"])


def test_moments_of_another_form_begin_anew():
    model, optimizer, before = operated(lambda groups: torch.optim.Adafactor(groups, lr=1e-3))
    assert "row_var" in before["classifier.weight"][2]
    assert model.classifier.weight not in optimizer.state
    assert torch.equal(optimizer.state[model.classifier.bias]["variance"], before["classifier.bias"][2]["variance"])
    trained(model, optimizer)
    assert "row_var" in optimizer.state[model.classifier.weight]


def test_surgery_without_an_optimizer():
    model, inputs = tp.pack(build("bert", HEAD)), make_inputs("bert", HEAD)
    surgery.operate(model, **CUTS["mixed"])
    assert_close(outputs_of(model, inputs), outputs_of(cut_model("bert", HEAD, "mixed"), inputs), atol=0)
