"""`torch.compile`: same results, also as survivors, phases and sizes change; and how often it is interrupted, per layer."""

import pytest
import torch
from families import build, make_inputs, outputs_of
from training_helpers import Texts, collate, no_dropout, top, trainer_for

import hf_tokenprune as tp
from hf_tokenprune.structure import Layout, StructureGates

HEAD = "ForSequenceClassification"
# Interruptions are attention and the places where tokens are packed, dropped and unpacked; between two of them lies one graph. Per
# layer: Q, K and V; a reshape of the context; attention's output; the FFN (in DistilBERT with a graph of its own for the last norm).
GRAPHS_PER_LAYER = {"bert": 4, "distilbert": 5}
GRAPHS_BESIDE = 3


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A backend that runs graphs as they are, and counts how many have run."""

    def __init__(self):
        self.run = 0

    def __call__(self, graph, _):
        def forward(*args):
            self.run += 1
            return graph(*args)

        return forward


def batches():
    for seed in range(3):
        batch = collate(list(Texts(6, seed=seed)))
        del batch["labels"]
        yield batch


MODELS = {
    "packed": lambda: tp.pack(build("bert", HEAD)),
    "every token read": lambda: tp.pack(build("bert", "ForTokenClassification")),
    "tokens dropped": lambda: tp.attach(build("bert", HEAD), {1: tp.TopK(0.6), 2: tp.TopK(0.5)}),
    "tokens dropped after the layer": lambda: tp.attach(build("distilbert", HEAD), {1: tp.TopK(0.5)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_gives_the_same(name):
    model, graphs = MODELS[name]().eval(), Graphs()
    compiled = torch.compile(model, backend=graphs)
    layers = model.token_pruner.layer_count
    with torch.no_grad():
        for batch in batches():
            expected, graphs.run = model(**batch).logits, 0
            torch.testing.assert_close(compiled(**batch).logits, expected, atol=1e-6, rtol=0)
            assert 0 < graphs.run <= GRAPHS_PER_LAYER[model.config.model_type] * layers + GRAPHS_BESIDE
            if name.startswith("tokens"):
                assert sum(model.token_pruner.trace[-1].entered) < 0.6 * batch["attention_mask"].sum()


def test_models_of_one_family_do_not_share_what_differs():
    """Dense, packed, and dropping tokens at different sites, side by side, each with weights of its own."""
    makers = (*MODELS.values(), lambda: tp.attach(build("bert", HEAD), {2: tp.TopK(0.3)}), lambda: build("bert", HEAD))
    models = [make().eval() for make in makers]
    with torch.no_grad():
        expected = [[model(**batch).logits for batch in batches()] for model in models]
        compiled = [torch.compile(model, backend="eager") for model in models]
        for _ in range(2):
            for model, words in zip(compiled, expected, strict=True):
                for batch, logits in zip(batches(), words, strict=True):
                    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-6, rtol=0)


def test_code_is_compiled_anew_when_hooks_come_or_go():
    """torch uses the code of a module for all modules like it, and does not look whether their hooks are the same."""
    inputs, model = make_inputs("bert", HEAD), build("bert", HEAD, num_hidden_layers=2).eval()
    compiled, words = torch.compile(model, backend="eager"), []

    def gate():
        structure = model.token_pruner.structure = StructureGates(model, Layout(model))
        structure.hard = torch.ones(structure.layout.size)
        structure.hard[structure.layout.parts["units", 0]][:40] = 0.0

    for change in (lambda: tp.pack(model), gate, lambda: tp.detach(model), lambda: tp.attach(model, {0: tp.TopK(0.3)})):
        change()
        words.append(outputs_of(compiled, inputs)["logits"].clone())
        torch.testing.assert_close(words[-1], outputs_of(model, inputs)["logits"], atol=1e-6, rtol=0)
    packed, gated, dense, pruned = words
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=0)
    assert (gated - packed).abs().max() > 1e-4
    assert (pruned - packed).abs().max() > 1e-4


STAGES = tp.Schedule(dense=1, static=2, anneal=2, settle=1)
METHODS = {
    "tokens": lambda: top(layer_weight=0),
    "weights and tokens": lambda: tp.Compose(tp.StructuredPruning(), tp.ToP(rank_bins=8), target_macs=0.3),
    "weights and samplers": lambda: tp.InforCoef(static_macs=0.5, target_macs=0.3, schedule=STAGES),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(METHODS)[1:]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler looks at it itself
@pytest.mark.parametrize("name", ["tokens", *SLOW])
def test_a_compiled_run_ends_with_the_same_weights(tmp_path, name):
    states = []
    for asked in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        model = build("bert", HEAD, **no_dropout())
        trainer = trainer_for(tmp_path, METHODS[name](), model=model, max_steps=6 if name == "tokens" else 12, **asked)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert states[1].keys() == states[0].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(value, states[0][key], atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
