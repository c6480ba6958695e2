"""Where the hooks cannot do their work, the call is refused with the reason: traces and exports, parts of an encoder called alone,
replicas of a model."""

import io

import pytest
import torch
from families import build, make_inputs, outputs_of

import hf_tokenprune as tp
from hf_tokenprune.modeling.calls import active

HEAD = "ForSequenceClassification"


WAYS = {
    "trace": lambda model, args: torch.jit.trace(model, args, check_trace=False),
    "onnx": lambda model, args: torch.onnx.export(model, args, io.BytesIO(), dynamo=False),
    "export": torch.export.export,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("head", ["Model", HEAD])
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_model_is_not_traced_or_exported(way, head):
    """The lengths of the texts it is traced with would be baked in."""
    model, inputs = tp.pack(build("bert", head, return_dict=False)), make_inputs("bert", head)
    message = "torch.export" if way == "export" else "cannot be traced or exported.*detach"
    with pytest.raises((tp.errors.UnsupportedInputError, RuntimeError), match=message):
        WAYS[way](model, (inputs["input_ids"], inputs["attention_mask"]))
    assert active.forward is active.head is None
    assert all(value.isfinite().all() for value in outputs_of(model, {**inputs, "return_dict": True}).values())


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
def test_a_part_of_a_packed_encoder_called_alone_is_refused(name):
    model, states = tp.pack(build(name, HEAD)), torch.randn(1, 5, 32)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"whole.*detach"):
        layers[0](states)
    other = tp.pack(build("bert", HEAD))
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"whole.*detach"):
        other.bert.encoder(states)


@pytest.mark.parametrize("head", ["Model", HEAD])
def test_replicas_of_data_parallel_are_refused(head):
    model, inputs = tp.pack(build("bert", head)), make_inputs("bert", head)
    replica = replicate(model)
    with pytest.raises(tp.errors.UnsupportedInputError, match=r"DataParallel.*torchrun"):
        replica(**inputs)
    assert outputs_of(model, inputs)


def replicate(module):
    """As `torch.nn.parallel.replicate` makes the copies of modules, on the CPU."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(twin, name, replicate(child))
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter.data)
    return twin
