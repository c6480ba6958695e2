"""What a user may ask of the methods that cut weights, and may not."""

import pytest
import torch
from families import FAMILIES, build, outputs_of
from training_helpers import Texts, at_home, logged, spent_share, trained
from weights_helpers import HEAD, INPUTS, PLAN, TOTAL, assert_refused, both, dense, dropping, face, size_of, weights

import hf_tokenprune as tp
from hf_tokenprune.modeling.sizes import sizes_of

MACS = "target_macs"
WRONG = [
    *(("weights", MACS, value) for value in (0, 1, -0.1, 1.5, float("nan"), True, "0.4")),
    *(("weights", "target_params", value) for value in (0, 1, -0.1, float("inf"), True, "0.4")),
    *(("weights", "parts", value) for value in ((), [], "heads", ("head",), ("heads", 1), 3)),
    *(("weights", "layer_weight", value) for value in (-1, float("nan"), "1", None)),
    *(("weights", "distill_weight", value) for value in (-1, None)),
    *(("weights", "constraint", value) for value in (None, "none")),
    *(("weights", "gate_lr", value) for value in (0, -1, "1")),
    *(("weights", "teacher", value) for value in ("", 3)),
    *(("weights", "schedule", value) for value in (None, (1, 2, 1), tp.Schedule(static=1))),
    *(("both", MACS, value) for value in (0, 1, True)),
    *(("both", "schedule", value) for value in (None, tp.Schedule(static=1))),
    *(("both", "constraint", value) for value in (None,)),
]


@pytest.mark.parametrize(("which", "name", "value"), WRONG, ids=[f"{which} {name}={value!r}" for which, name, value in WRONG])
def test_a_wrong_setting_is_refused_by_name(which, name, value):
    make = {"weights": tp.StructuredPruning, "both": lambda **s: tp.Compose(tp.StructuredPruning(), tp.ToP(), **s)}[which]
    budget = {} if name == "target_params" else {MACS: 0.4}
    make(**budget)
    with pytest.raises(tp.errors.ConfigError, match=name):
        make(**{**budget, name: value})


COMPOSED = {
    "a budget of the weights": (lambda: (tp.StructuredPruning(target_macs=0.4), tp.ToP()), r"StructuredPruning\(target_macs="),
    "their parameters": (lambda: (tp.StructuredPruning(target_params=0.4), tp.ToP()), r"StructuredPruning\(target_params="),
    "their schedule": (lambda: (tp.StructuredPruning(schedule=PLAN), tp.ToP()), r"StructuredPruning\(schedule="),
    "a budget of the tokens": (lambda: (tp.StructuredPruning(), tp.ToP(target_macs=0.4)), r"ToP\(target_macs="),
    "their teacher": (lambda: (tp.StructuredPruning(), tp.ToP(teacher=None)), r"ToP\(teacher="),
    "their rate": (lambda: (tp.StructuredPruning(), tp.ToP(gate_lr=0.1)), r"ToP\(gate_lr="),
    "tokens first": (lambda: (tp.ToP(), tp.StructuredPruning()), "weights=.*give a StructuredPruning"),
    "weights twice": (lambda: (tp.StructuredPruning(), tp.StructuredPruning()), "tokens=.*give a ToP"),
}


@pytest.mark.parametrize("what", COMPOSED)
def test_what_belongs_to_the_run_is_given_to_compose(what):
    make, message = COMPOSED[what]
    with pytest.raises(tp.errors.ConfigError, match=message):
        tp.Compose(*make(), target_macs=0.3)


IMAGE_HEAD = "ForImageClassification"
REFUSED = {
    "no budget": (lambda: tp.StructuredPruning(), dense, "needs a budget"),
    "no budget for both": (lambda: tp.Compose(tp.StructuredPruning(), tp.ToP()), dense, "needs a budget"),
    "two budgets": (lambda: weights(target_macs=0.4, target_params=0.4), dense, "target_params.*not both"),
    "parameters out of reach": (lambda: weights(target_params=0.5, parts=("heads",)), dense, "target_params.*0.572 are left"),
    "no such site": (lambda: tp.Compose(tp.StructuredPruning(), tp.ToP(sites=(9,)), target_macs=0.3), dense, "layer 9"),
    "drops tokens": (weights, dropping, "drops tokens already.*Compose"),
    "drops tokens, both": (both, dropping, "drops tokens already"),
    "hidden units of siglip": (lambda: weights(parts=("hidden",)), lambda: build("siglip", IMAGE_HEAD), "Hidden units cannot be cut"),
    **{
        f"weights of {name}": (lambda: weights(), lambda name=name: build(name, HEAD), "No weights can be cut out of")
        for name, row in FAMILIES.items() if not row.weights
    },
    "hidden units of llama": (lambda: weights(parts=("hidden",)), lambda: build("llama", HEAD), "Hidden units cannot be cut"),
    "hidden units of siglip, both": (
        lambda: both(parts=("hidden", "heads")), lambda: tp.pack(build("siglip", IMAGE_HEAD)), "Hidden units cannot be cut",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_the_model_left_as_it_was(tmp_path, what):
    assert_refused(tmp_path, *REFUSED[what])


def test_attaching_twice_leaves_no_second_set_of_hooks():
    callback, model = tp.TokenPruneCallback(weights()), dense()
    first = face(callback.attach(model))
    assert face(callback.attach(model)) == first


def test_training_once_more_says_what_to_do_and_that_works(tmp_path):
    trainer = trained(tmp_path / "first", weights(), max_steps=TOTAL)
    with pytest.raises(tp.errors.TrainingError, match="load the saved model and give it to a new Trainer with a new callback"):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    size = size_of(trainer.model)
    again = trained(
        tmp_path / "second", weights(target_macs=0.2), model=tp.from_pretrained(tmp_path / "saved"), max_steps=TOTAL
    )
    assert size_of(again.model) < size
    assert 0.1 < spent_share(again.model, Texts()) < 0.21, "of the original model"


@pytest.fixture(scope="module")
def cut_folder(tmp_path_factory):
    """A saved model whose weights were cut to 0.5."""
    folder = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    trained(folder / "run", weights(target_macs=0.5), max_steps=TOTAL).save_model(str(folder / "saved"))
    return folder / "saved"


ON_CUT = {"tokens": lambda: tp.ToP(target_macs=0.3, rank_bins=8, schedule=PLAN), "both": both}


@pytest.mark.parametrize("what", ON_CUT)
def test_a_cut_model_trains_on_with_a_budget_of_the_original(tmp_path, cut_folder, what):
    model = tp.from_pretrained(cut_folder)
    shapes, sizes, whole = model.config.token_pruning["shapes"], sizes_of(model), spent_share(model, Texts())
    assert 0.36 < whole < 0.51
    trainer = trained(tmp_path / "run", ON_CUT[what](), model=model, max_steps=TOTAL)
    assert 0.27 < spent_share(model, Texts()) < 0.31
    assert logged(trainer, "macs_realised")[0] == pytest.approx(whole, abs=0.02)
    assert logged(trainer, "macs_realised")[-1] == pytest.approx(0.29, abs=0.025)
    assert logged(trainer, "layer_distillation" if what == "both" else "distillation")[-1] > 0
    assert len(model.token_pruner.sites) > 0
    if what == "tokens":
        assert sizes_of(model) == sizes
        assert model.config.token_pruning["shapes"] == shapes
    trainer.save_model(str(tmp_path / "saved"))
    opened = at_home(tp.from_pretrained(tmp_path / "saved"))
    assert sizes_of(opened) == sizes_of(model)
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], outputs_of(at_home(model.eval()), INPUTS)["logits"])
