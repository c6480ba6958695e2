"""Runs of a few steps in which weights are cut, and what can be seen of them."""

import pytest
import torch
from families import build, make_inputs, outputs_of
from training_helpers import Recorder, Texts, trained, trainer_for
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.methods import structured as module
from hf_tokenprune.modeling.architectures import find_encoder, get_layers

HEAD = "ForSequenceClassification"
PLAN = tp.Schedule(dense=1, anneal=2, settle=1)
DENSE_SIZES = (32, [4] * 4, [48] * 4)


def weights(**settings):
    """A StructuredPruning that fits into a few steps."""
    budget = {} if "target_params" in settings else {"target_macs": 0.4}
    return tp.StructuredPruning(**{**budget, "schedule": PLAN, **settings})


def both(parts=None, **settings):
    """A Compose that fits into a few steps."""
    tokens = settings.pop("tokens", None) or tp.ToP(rank_bins=8, rank_topk=4, rank_weight=0.1)
    return tp.Compose(tp.StructuredPruning(parts=parts), tokens, **{"target_macs": 0.3, "schedule": PLAN, **settings})


NARROW = ("hidden", "heads", "units")  # without blocks, so that hidden units have to go
METHODS = {
    "weights": weights,
    "narrow": lambda: weights(target_macs=0.3, parts=NARROW),
    "parameters": lambda: weights(target_params=0.4),
    "lagrangian": lambda: weights(constraint="lagrangian"),
    "both": both,
    "learned": lambda: both(tokens=tp.ToP(rank_bins=8)),
}
BOTH = ("both", "learned")


def size_of(model):
    """How many numbers the model's own parameters hold."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("token_pruner."))


def layers_left(model):
    """Weights of the Linears in the layers, as a share of those of the table's BERT."""
    layers = get_layers(*find_encoder(model))
    return sum(p.numel() for p in layers.parameters() if p.dim() == 2) / (4 * (4 * 32 * 32 + 2 * 32 * 48))


def said(model, inputs, gated=True):
    """The logits in evaluation, without a trace of the question; or those that the same weights give without gates."""
    pruner, training = model.token_pruner, model.training
    meter, structure, trace = pruner.meter, pruner.structure, pruner.trace
    hard = None if structure is None else structure.hard
    try:
        pruner.meter = None
        if structure is not None and not gated:
            structure.hard = None
        return outputs_of(model.eval(), inputs)["logits"].clone()
    finally:
        model.train(training)
        pruner.meter, pruner.trace = meter, trace
        if structure is not None:
            structure.hard = hard


class Surgery:
    """Stands by at surgery: what the model says without gates, with its gates just before, and just after."""

    def __init__(self, patch, inputs):
        def operation(objective, optimizer, **left):
            self.left = left
            self.open, self.gated = said(objective.model, inputs, gated=False), said(objective.model, inputs)
            cut_weights(objective, optimizer, **left)
            self.cut = said(objective.model, inputs)

        cut_weights = module.cut_weights
        patch.setattr(module, "cut_weights", operation)

    def assert_changes_nothing(self, atol=1e-5):
        torch.testing.assert_close(self.cut, self.gated, atol=atol, rtol=0)
        assert (self.open - self.gated).abs().max() > 0.01, "the gates do matter"


TOTAL = 16  # dense to step 4, surgery with step 12
INPUTS = make_inputs("bert", HEAD)


def dropout_run(folder, method, resume=None, steps=TOTAL, **arguments):
    """48 texts are 6 steps an epoch; the model has dropout, and a resumed run begins with a model of other weights."""
    torch.manual_seed(0)
    settings = {"save_strategy": "steps", "save_steps": 1, "data": Texts(48), "max_steps": steps, **arguments}
    return trained(folder, method, resume, **{"model": build("bert", HEAD, seed=0 if resume is None else 7), **settings})


def uninterrupted_runs(tmp_path_factory, methods, steps):
    """A function that gives, by name, the folder of a run that went through, its model, and the model's words after each step."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp("run")
            words = Recorder(look=lambda model: (said(model, INPUTS), said(model, INPUTS, gated=False)))
            done[name] = folder, dropout_run(folder, methods[name](), steps=steps, callbacks=[words]).model, words.looks
        return done[name]

    return run


class OptimizerOf(TrainerCallback):
    """After each step: the optimizer holds every parameter that learns exactly once and no other, with moments of their shapes."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, *_, model=None, optimizer=None, **__):
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
        assert len(held) == len(set(held)), "once"
        assert set(held) == learning
        assert set(optimizer.state) <= learning
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                fits = not isinstance(value, torch.Tensor) or value.numel() == 1 or value.shape == parameter.shape
                assert fits or "sq_row" in name or "sq_col" in name, name
        self.counts.append((len(held), len(optimizer.state), sum(parameter.numel() for parameter in held)))


def classes(_):
    return {"labels": torch.arange(6) % 3}


def dropping(name="bert", head=HEAD):
    """A model that drops tokens already."""
    return tp.attach(build(name, head), {1: tp.TopK(0.5)})


def dense(name="bert", head=HEAD):
    return build(name, head)


def face(model):
    """What a model would show of having been touched."""
    hooks = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()]
    return type(model), list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation, hooks


def assert_refused(folder, make, make_model, message):
    """A method that a model does not fit is refused with a message, and leaves the model as it was."""
    model = make_model()
    before = face(model)
    with pytest.raises((tp.errors.ConfigError, tp.errors.UnsupportedModelError), match=message):
        trainer_for(folder, make(), model=model)
    assert face(model) == before
