"""Weights cut in the middle of a real run: it meets its budget, surgery changes nothing that the gates had not, the optimizer
survives it, the run resumes exactly wherever it was killed; and the gates on weights keep to one budget."""

import itertools
import shutil

import pytest
import torch
from families import FAMILIES, build, make_inputs, outputs_of
from test_training import assert_close_state, assert_same_state, logged, some_words, trained
from torch.nn import functional
from training_helpers import Recorder, Rows, Texts, at_home, collate, no_dropout, spent_share, stack, trainer_for
from transformers import TrainerCallback

import hf_tokenprune as tp
from hf_tokenprune.budget import Lengths
from hf_tokenprune.cost import CostMeter, layer_shapes
from hf_tokenprune.gates import keep_probability
from hf_tokenprune.methods import structured as module
from hf_tokenprune.modeling.architectures import find_encoder, get_layers
from hf_tokenprune.modeling.sizes import sizes_of
from hf_tokenprune.schedule import Moment
from hf_tokenprune.surgery import operate

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


# One run

STEPS, DENSE, SURGERY = 40, 10, 30


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of every method: the Trainer, what a recorder saw after each step, and the surgery."""
    done = {}

    def run(name):
        if name not in done:
            torch.manual_seed(0)
            recorder = Recorder(
                lambda model: (size_of(model), sizes_of(model), getattr(model.token_pruner.structure, "hard", None))
            )
            with pytest.MonkeyPatch.context() as patch:
                surgery = Surgery(patch, collate(list(Texts(32, seed=1))))
                trainer = trained(
                    tmp_path_factory.mktemp("run"), METHODS[name](), callbacks=[recorder], max_steps=STEPS, logging_steps=2,
                    eval_strategy="steps", eval_steps=10,
                )  # fmt: skip
            done[name] = trainer, recorder, surgery
        return done[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_one_run_goes_through_all_phases_and_the_weights_shrink_at_surgery(runs, name):
    trainer, recorder, _ = runs(name)
    phases = logged(trainer, "pruning_phase")
    assert phases == sorted(phases)
    assert set(phases) == {0, 2, 3}
    assert all(hard is None for *_, hard in recorder.looks[: DENSE - 1]), "a dense phase is as fast as ever"
    assert recorder.looks[SURGERY - 2][2].sum() > 0
    sizes = [size for size, *_ in recorder.looks]
    assert set(sizes[: SURGERY - 1]) == {sizes[0]}
    assert set(sizes[SURGERY - 1 :]) == {size_of(trainer.model)}
    assert sizes[-1] < (0.95 if name == "learned" else 0.8) * sizes[0], "tokens that are ranked better are worth dropping"
    assert recorder.looks[SURGERY - 2][1] == DENSE_SIZES
    if name == "narrow":
        assert sizes_of(trainer.model)[0] < 32
    assert trainer.model.token_pruner.structure is None, "no gate is left"


@pytest.mark.parametrize("name", METHODS)
def test_the_log_holds_the_budget_and_every_loss(runs, name):
    cost = "params" if name == "parameters" else "macs"
    entries = [entry for entry in runs(name)[0].state.log_history if "loss" in entry]
    assert len(entries) == STEPS // 2
    always = {f"{cost}_target", "macs_realised", "pruning_phase", "tokens_after_0"}
    settling = {"distillation", "layer_distillation", *({"importance"} if name == "learned" else ())}
    gated = {"soft_hard_gap", *({"ranking"} if name == "both" else ()), *({"lagrangian"} if name == "lagrangian" else ())}
    every = {"macs_expected", "params_expected", "ranking", *settling, *gated}
    for number, entry in enumerate(entries, start=1):
        phase, progress = PLAN.at(2 * number - 1, STEPS)
        expected = {"dense": set(), "anneal": settling | gated, "settle": settling}[phase]
        if phase == "anneal" and (progress >= 0.15 or name == "lagrangian"):  # before, information is measured
            expected = expected | {f"{cost}_expected"}
        assert always <= entry.keys()
        assert every & entry.keys() == expected, (number, phase)
        assert torch.tensor([entry[key] for key in expected | always]).isfinite().all()
    targets = [entry[f"{cost}_target"] for entry in entries]
    assert all(b < a + 1e-3 for a, b in itertools.pairwise(targets)), "up to the lengths that were seen meanwhile"
    assert targets[0] == 1
    assert targets[-1] == pytest.approx(0.3 if name in (*BOTH, "narrow") else 0.4)


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met(runs, name):
    """The coarsest part of such a tiny model, a block of attention, is 14 % of it; tokens make up for that. 0.01 more for lengths:
    the gates know those of the batches of the dense and the anneal phase."""
    trainer, _, _ = runs(name)
    target = logged(trainer, "params_target" if name == "parameters" else "macs_target")[-1]
    spent = layers_left(trainer.model) if name == "parameters" else spent_share(trainer.model, Texts())
    assert target - (0.03 if name in BOTH else 0.14) < spent < target + 0.01
    realised = logged(trainer, "macs_realised")
    assert realised[-1] == pytest.approx(spent_share(trainer.model, Texts()), abs=0.02)
    if name not in BOTH:  # tokens are dropped while annealing, weights are not
        assert min(realised[: SURGERY // 2]) > 0.8


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lagrangian"])
def test_what_is_expected_of_projected_gates_is_the_target(runs, name):
    """It is logged as a mean over two steps and the target at the second; the target falls by at most 0.04 in a step. The rest:
    a batch's lengths are not those of all."""
    entries = [entry for entry in runs(name)[0].state.log_history if {"macs_expected", "params_expected"} & entry.keys()]
    assert len(entries) > 5
    for entry in entries:
        expected = entry.get("macs_expected", entry.get("params_expected"))
        target = entry.get("macs_target", entry.get("params_target"))
        assert target - 0.02 < expected < target + 0.06


@pytest.mark.parametrize("name", METHODS)
def test_surgery_equals_the_gates_inside_a_run(runs, name):
    """And so does what is evaluated after that step: the model was no other before it was cut."""
    trainer, _, surgery = runs(name)
    surgery.assert_changes_nothing()
    labels = collate(list(Texts(32, seed=1)))["labels"]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert evaluated[SURGERY] == pytest.approx(functional.cross_entropy(surgery.gated, labels).item(), abs=1e-5)


def test_the_soft_and_the_hard_model_end_close(runs):
    """0.06 was measured."""
    assert logged(runs("weights")[0], "soft_hard_gap")[-1] < 0.2


# Resume

TOTAL = 16  # dense to step 4, surgery with step 12
RESUMED = {
    "narrow": METHODS["narrow"],
    "both": lambda: both(parts=NARROW),
    "learned": lambda: both(parts=NARROW, tokens=tp.ToP(rank_bins=8)),
    "weights, lagrangian": METHODS["lagrangian"],
    "no teacher": lambda: weights(teacher=None),
}
KILLS = [("narrow", step) for step in (2, 4, 5, 8, 11, 12, 14)] + [
    (name, step) for name in BOTH for step in (2, 4, 5, 8, 12, 14)
]
KILLS += [("weights, lagrangian", 8), ("weights, lagrangian", 12), ("no teacher", 12), ("no teacher", 14)]
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return uninterrupted_runs(tmp_path_factory, RESUMED, TOTAL)


def put_checkpoint(folder, target, step, dense=4):
    """What is left of a run that was killed after a step."""
    shutil.copytree(folder / f"checkpoint-{step}", target / f"checkpoint-{step}")
    if (folder / "_teacher").exists() and step > dense:
        shutil.copytree(folder / "_teacher", target / "_teacher")
    return str(target / f"checkpoint-{step}")


@pytest.mark.parametrize(("name", "step"), KILLS, ids=[f"{name} {step}" for name, step in KILLS])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, name, step):
    folder, model, _ = uninterrupted(name)
    resumed = dropout_run(tmp_path, RESUMED[name](), put_checkpoint(folder, tmp_path, step))
    assert len(logged(resumed, "loss")) == 4
    assert_same_state(resumed.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["narrow", *BOTH])
def test_the_resumed_runs_lose_hidden_units(uninterrupted, name):
    assert sizes_of(uninterrupted(name)[1])[0] < 32


@pytest.mark.parametrize("name", ["narrow", *BOTH])
@pytest.mark.parametrize("step", [8, 11, 12, 14, TOTAL])
def test_a_checkpoint_opens_as_the_model_that_was_training(uninterrupted, name, step):
    """Before surgery with all of its weights and no gates, after it cut."""
    folder, model, words = uninterrupted(name)
    opened = at_home(tp.from_pretrained(folder / f"checkpoint-{step}"))
    gated, plain = words[step - 1]
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], plain)
    if step < 12:
        assert sizes_of(opened) == DENSE_SIZES
        assert "shapes" not in opened.config.token_pruning
        assert not torch.equal(gated, plain)
    else:
        assert sizes_of(opened) == sizes_of(model) != DENSE_SIZES
    assert opened.config.token_pruning["method"]["name"] == ("structured" if name == "narrow" else "compose")


def test_the_same_trainer_goes_back_to_a_checkpoint_as_small_as_its_model_and_to_no_larger_one(tmp_path):
    trainer = dropout_run(tmp_path, METHODS["narrow"]())
    expected = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-14"))
    assert_same_state(trainer.model.state_dict(), expected)
    with pytest.raises(tp.errors.ConfigError, match=r"larger model.*make the model and the Trainer anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("best", [8, 14])
def test_the_best_model_at_the_end_is_one_that_is_cut(tmp_path, best):
    marks = iter([int(step == best) for step in range(2, TOTAL + 1, 2)])
    trainer = dropout_run(
        tmp_path, weights(), eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="mark", compute_metrics=lambda _: {"mark": next(marks)},
    )  # fmt: skip
    step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert step == (14 if best == 14 else 12), "the first one that meets the budget, or a better one after it"
    opened = at_home(tp.from_pretrained(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(outputs_of(at_home(trainer.model.eval()), INPUTS)["logits"], outputs_of(opened, INPUTS)["logits"])


# The optimizer


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


OPTIMIZERS = [("adamw_torch", name) for name in ("weights", "narrow", "both")] + [("sgd", "weights"), ("adafactor", "narrow")]


@pytest.mark.parametrize(("optimizer", "name"), OPTIMIZERS, ids=map(" ".join, OPTIMIZERS))
def test_the_optimizer_survives_surgery(tmp_path, optimizer, name):
    look = OptimizerOf()
    trained(tmp_path, METHODS[name](), callbacks=[look], max_steps=TOTAL, optim=optimizer)
    held, kept, numbers = zip(*look.counts, strict=True)
    assert held[11] <= held[10]
    assert numbers[11] < 0.9 * numbers[10]
    assert held[11:] == (held[11],) * 5
    assert kept[-1] in (0 if optimizer == "sgd" else held[-1], held[-1])


def test_moments_are_cut_like_their_weights(tmp_path, monkeypatch):
    """Moments that are made equal to the weights just before surgery are equal to them just after it."""
    seen = []

    def operation(objective, optimizer, **left):
        for parameter, state in optimizer.state.items():
            state["exp_avg"] = parameter.detach().clone()
        cut_weights(objective, optimizer, **left)
        seen.extend((parameter, state["exp_avg"]) for parameter, state in optimizer.state.items())
        assert all(torch.equal(parameter, moment) for parameter, moment in seen)
        assert all(parameter.grad is None for parameter in objective.model.parameters())

    cut_weights = module.cut_weights
    monkeypatch.setattr(module, "cut_weights", operation)
    trained(tmp_path, METHODS["narrow"](), max_steps=TOTAL)
    assert len({parameter for parameter, _ in seen}) > 50


# Accumulation, checkpointing, precision


@pytest.fixture
def gates_without_noise(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda like, **_: torch.full_like(like, 0.5))


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("make", [weights, both])
def test_accumulating_two_micro_batches_is_one_batch(tmp_path, make, constraint):
    """Plain gradient descent, which shows sizes, on texts of one length. What is measured is the square of the gradient of the whole
    batch, and both halves draw the same gates. Only layers of the teacher are matched in each half by itself."""
    states, sizes = [], []
    for accumulation in (1, 2):
        trainer = trained(
            tmp_path, make(constraint=constraint, layer_weight=0), per_device_train_batch_size=8 // accumulation,
            data=Texts(96, lengths=(17, 17)), gradient_accumulation_steps=accumulation, max_steps=12, max_grad_norm=0,
            optim="sgd", learning_rate=0.01,
        )  # fmt: skip
        states.append(trainer.model.state_dict())
        states[-1].pop("token_pruner.training_state.teacher")  # a fingerprint of the very bits
        sizes.append(sizes_of(trainer.model))
    assert sizes[0] == sizes[1] != DENSE_SIZES
    starts = [state.pop("token_pruner.training_state.start") for state in states]  # logarithms of tiny sums of squares
    torch.testing.assert_close(*starts, atol=0.01, rtol=0)
    assert_close_state(*states, atol=1e-5)


@pytest.mark.parametrize("make", [weights, both, METHODS["learned"]], ids=["weights", "both", "learned"])
def test_activation_checkpointing_changes_nothing(tmp_path, make):
    found = []
    for asked in ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}):
        torch.manual_seed(0)
        trainer = trained(tmp_path, make(), model=build("bert", HEAD), max_steps=TOTAL, **asked)
        assert trainer.model.is_activation_checkpointing == bool(asked)
        found.append(trainer.model)
    assert sizes_of(found[1]) != DENSE_SIZES
    assert_same_state(found[1].state_dict(), found[0].state_dict())


@pytest.mark.parametrize("name", ["narrow", *BOTH])
def test_bf16_trains_and_cuts(tmp_path, name):
    trainer = trained(tmp_path, METHODS[name](), max_steps=TOTAL, bf16=True)
    assert sizes_of(trainer.model) != DENSE_SIZES
    assert spent_share(trainer.model, Texts()) < 0.31
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# Families


def classes(_):
    return {"labels": torch.arange(6) % 3}


FAMILY_RUNS = {
    "distilbert": ("distilbert", HEAD, classes, weights),
    "modernbert": ("modernbert", HEAD, classes, weights),
    "esm": ("esm", HEAD, classes, weights),
    "images": ("vit", "ForImageClassification", classes, weights),
    "nomic_bert": ("nomic_bert", HEAD, classes, weights),
    "llama": ("llama", HEAD, classes, lambda: weights(parts=("heads", "units", "blocks"))),
    "qwen3, both": ("qwen3", HEAD, classes, lambda: both(parts=("heads", "units", "blocks"))),
    "siglip": ("siglip", "ForImageClassification", classes, lambda: weights(parts=("heads", "units"), target_macs=0.5)),
    "tied masked words": ("bert", "ForMaskedLM", some_words, METHODS["narrow"]),
    "images, both": ("vit", "ForImageClassification", classes, both),
    "modernbert, both": ("modernbert", HEAD, classes, both),
}


@pytest.mark.parametrize("what", FAMILY_RUNS)
def test_every_family_trains_is_cut_and_opens_again(tmp_path, monkeypatch, what):
    name, head, make_labels, make = FAMILY_RUNS[what]
    inputs = make_inputs(name, head)
    surgery, look = Surgery(monkeypatch, inputs), OptimizerOf()
    model = build(name, head)
    before = size_of(model)
    arguments = {"data": Rows(name, head, make_labels), "data_collator": stack, "max_steps": 8, "logging_steps": 1}
    trainer = trained(tmp_path / "run", make(), model=model, callbacks=[look], **arguments)
    surgery.assert_changes_nothing()
    assert torch.tensor([value for entry in trainer.state.log_history for value in entry.values()]).isfinite().all()
    assert size_of(model) < before
    meter = CostMeter(model)
    found = outputs_of(at_home(model.eval()), inputs)
    meter.update()
    assert 1 / meter.cost.true_length_reduction < make().target_macs + 0.02, "lengths differ from the training's"
    trainer.save_model(str(tmp_path / "saved"))
    opened = outputs_of(at_home(tp.from_pretrained(tmp_path / "saved")), inputs)
    for key, value in found.items():
        assert torch.equal(opened[key], value), key


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "vit"])
def test_a_head_that_is_gated_off_has_no_say_in_the_ranking(name):
    head = "ForImageClassification" if name == "vit" else HEAD
    model = tp.TokenPruneCallback(both(parts=("heads",))).attach(build(name, head))
    pruner, inputs = model.token_pruner, make_inputs(name, head)
    pruner.site(2).set_kept([1, 1, 0, 0, 0, 0, 0, 0])
    structure = pruner.structure
    structure.hard = torch.ones(structure.layout.size)
    structure.hard[structure.layout.parts["heads", 2]] = (torch.arange(structure.layout.heads[2]) == 0).float()
    gated = said(model, inputs)
    hidden, heads, units = structure.layout.left(structure.hard)
    operate(model, hidden=hidden, heads=heads, units=units)
    torch.testing.assert_close(said(model, inputs), gated, atol=1e-5, rtol=0)


# What a user may do, and may not

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


def dropping(name="bert", head=HEAD):
    """A model that drops tokens already."""
    return tp.attach(build(name, head), {1: tp.TopK(0.5)})


def dense(name="bert", head=HEAD):
    return build(name, head)


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


def face(model):
    """What a model would show of having been touched."""
    hooks = [(name, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()]
    return type(model), list(model.state_dict()), model.config.to_dict(), model.config._attn_implementation, hooks


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_the_model_left_as_it_was(tmp_path, what):
    make, make_model, message = REFUSED[what]
    model = make_model()
    before = face(model)
    with pytest.raises((tp.errors.ConfigError, tp.errors.UnsupportedModelError), match=message):
        trainer_for(tmp_path, make(), model=model)
    assert face(model) == before


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


# The gates under one budget


def gated(method, name="bert", head=HEAD, **overrides):
    """A model with gates at the start of a run, in training mode, and the gates."""
    model = tp.TokenPruneCallback(method).attach(build(name, head, **no_dropout(name), **overrides)).train()
    model.token_pruner.objective.start_run(1e-3, {"static": 100, "anneal": 100})
    return model, model.token_pruner.objective.gates


def randomise(gates, progress, seed=0):
    """Random log-odds, as if learned, at some point of the annealing."""
    gates.progress = progress
    with torch.no_grad():
        gates.state.start.copy_(2 * torch.randn(len(gates.state.start), generator=torch.Generator().manual_seed(seed)))


USELESS = {("heads", 0): [1, 2], ("heads", 2): [0], ("units", 1): list(range(10, 20)), ("units", 3): [0, 47]}


def test_what_has_no_influence_goes_first():
    """Nobody reads of these heads and units; what was measured says so, and no more than they are is cut."""
    model, gates = gated(weights(parts=("heads", "units")))
    structure, layers = model.token_pruner.structure, model.bert.encoder.layer
    wanted = torch.ones(gates.state.start.shape)
    with torch.no_grad():
        for (part, layer), numbers in USELESS.items():
            wanted[structure.layout.parts[part, layer]][numbers] = 0
            width, reader = (8, layers[layer].attention.output) if part == "heads" else (1, layers[layer].output)
            for number in numbers:
                reader.dense.weight[:, number * width : (number + 1) * width] = 0
    objective, batches = model.token_pruner.objective, collate(list(Texts(32)))
    for part in range(4):
        objective.moment = Moment("anneal", 0.03 * part)
        model(**{key: value[8 * part : 8 * part + 8] for key, value in batches.items()}).loss.backward()
        objective.end_step()
    assert gates.state.log_odds.grad.abs().max() == 0, "while measuring nothing is learned"
    information = gates.state.information.clone()
    gates.final = float(gates.share([wanted.double()])) + 1e-6
    objective.moment = Moment("anneal", 1.0)
    objective.harden()
    assert torch.equal(information > 0, wanted > 0)
    assert torch.equal(structure.hard, wanted)
    torch.testing.assert_close(said(model, INPUTS), said(model, INPUTS, gated=False), atol=1e-5, rtol=0)
    gates.final -= 0.01
    objective.harden()
    assert (structure.hard <= wanted).all()
    assert (structure.hard < wanted).any()


def test_information_counts_per_cost():
    """Of equal information, what costs more goes first; the cost is that of a model that was really cut."""
    _, gates = gated(weights(parts=("heads", "units")))
    gates.state.information.fill_(3.0)
    gates.progress = 0.5
    gates.log_alpha()
    gates.harden(gated=True)

    def spends(heads, units):
        model = operate(
            tp.pack(dense()), heads=[range(4), range(heads), range(4), range(4)], units=[range(48), range(units)] * 2
        )
        return sum(shape.macs(entered=[101], queries=[101], survived=[101]) for shape in layer_shapes(model)[:2])

    ratio = (spends(4, 48) - spends(3, 48)) / (spends(4, 48) - spends(4, 47))
    layout = gates.parts[0].layout
    head, unit = (gates.state.start[layout.parts[name].start].item() for name in (("heads", 1), ("units", 1)))
    assert unit - head == pytest.approx(gates.PER_NEPER * torch.tensor(ratio).log().item(), abs=1e-4)
    assert ratio > 10
    assert gates.state.information.abs().max() == 0, "used once"


def test_no_information_is_too_far_off_to_count():
    """Units that cost the same start in the order of what was measured, over 10 orders of magnitude: none share a start."""
    _, gates = gated(weights(parts=("units",)))
    with torch.no_grad():
        gates.state.information.copy_(torch.logspace(-5, 5, gates.parts[0].size))
    gates.progress = 0.5
    gates.log_alpha()
    gates.harden(gated=True)
    assert all((gates.state.start[where].diff() > 0).all() for where in gates.parts[0].layout.parts.values())
    assert gates.state.start.abs().max() > 12
    assert gates.state.start.abs().max() < 13


@pytest.mark.parametrize("constraint", ["projected", "lagrangian"])
@pytest.mark.parametrize("make", [weights, lambda **s: weights(target_params=0.4, **s), both], ids=["macs", "params", "both"])
def test_the_gradient_is_orthogonal_to_that_of_the_cost(make, constraint):
    """So that the task's loss shifts the budget from one gate to another, and never spends more or less."""
    model, gates = gated(make(constraint=constraint))
    randomise(gates, 0.6)
    model.token_pruner.soft = {}
    gates.open()
    loss = (model.token_pruner.structure.soft * torch.linspace(-1, 2, gates.sizes[0])).sum()
    loss = loss + sum(soft.weights.square().sum() for soft in model.token_pruner.soft.values())
    loss.backward()
    gradient = gates.state.log_odds.grad
    log_alpha = gates.log_alpha().detach().requires_grad_()
    (normal,) = torch.autograd.grad(gates.share(gates.scores(keep_probability(log_alpha))), log_alpha)
    cosine = torch.nn.functional.cosine_similarity(gradient, normal, dim=0).abs()
    assert gradient.norm() > 0.1
    assert cosine < 1e-4 if constraint == "projected" else cosine > 0.05


@pytest.mark.parametrize("progress", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("make", [weights, lambda: weights(target_params=0.4), both], ids=["macs", "params", "both"])
def test_the_expected_share_is_the_target_whatever_was_learned(make, progress):
    _, gates = gated(make())
    for seed in range(3):
        randomise(gates, progress, seed)
        expected = gates.share(gates.scores(keep_probability(gates.log_alpha()))).item()
        assert expected == pytest.approx(gates.target(), abs=1e-4)
    assert gates.target() == pytest.approx(gates.final) if progress >= 0.83 else gates.target() > gates.final


@pytest.mark.parametrize("make", [weights, lambda: weights(target_params=0.4), both], ids=["macs", "params", "both"])
def test_the_most_probable_meets_the_target_and_no_more_would(make):
    _, gates = gated(make())
    gates.progress = 1.0
    for seed in range(20):
        torch.manual_seed(seed)
        gates.final = (0.15, 0.3, 0.6, 0.8)[seed % 4]
        probability = torch.rand(len(gates.state.start))
        kept = gates._most_probable(probability)
        scores = [s.double() + part.tie_break() for s, part in zip(gates.scores(probability), gates.parts, strict=True)]
        levels = [*torch.cat(scores).unique().tolist(), float("inf")]
        choices = [[part.choose(s, x) for part, s in zip(gates.parts, scores, strict=True)] for x in levels]
        shares = [float(gates.share([piece.double() for piece in choice])) for choice in choices]
        assert float(gates.share([piece.double() for piece in kept])) == max(x for x in shares if x <= gates.final)


def test_large_groups_are_cut_to_multiples_of_16():
    """As matrix products like it; those of the highest probability are what fills them up."""
    _, gates = gated(weights(), hidden_size=128, intermediate_size=160, num_hidden_layers=2)
    gates.progress, layout = 1.0, gates.parts[0].layout
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        probability = torch.rand(layout.size)
        gates.final = (0.2, 0.4, 0.6)[seed % 3]
        (kept,) = gates._most_probable(probability)
        hidden, _, units = layout.left(kept.double())
        counts = [128 if hidden is None else len(hidden), *map(len, units)]
        assert all(count % 16 == 0 for count in counts)
        sizes.update(counts)
        for where in layout.parts.values():
            some = kept[where]
            if some.any() and not some.all():
                assert probability[where][some].min() >= probability[where][~some].max()
    assert len(sizes) > 5


SHARES = [(name, HEAD) for name in ("bert", "distilbert", "esm")]
SHARES += [("modernbert", "ForTokenClassification"), ("vit", "ForImageClassification")]


@pytest.mark.parametrize(("name", "head"), SHARES, ids=[name for name, _ in SHARES])
def test_the_share_of_hard_gates_is_what_the_cut_model_spends(name, head):
    inputs = make_inputs(name, head)
    lengths = [37] * 5 if name == "vit" else [17, 5, 30, 17, 1]
    equal = 0
    for seed in range(8):
        model, gates = gated(weights(), name, head)
        (part,) = gates.parts
        kept = part.choose(torch.rand(part.size, generator=torch.Generator().manual_seed(seed)), 0.3 + 0.05 * seed)
        meter = CostMeter(model)
        seen = Lengths.of(lengths, gates.budget.protected)
        expected = float(gates.share([kept.double()], seen))
        hidden, heads, units = part.layout.left(kept)
        if not any(map(len, (*heads, *units))):
            continue
        operate(model, hidden=hidden, heads=heads, units=units)
        outputs_of(model.eval(), inputs)
        meter.update()
        spent = 1 / meter.cost.true_length_reduction
        if heads[-1] or units[-1] or not model.token_pruner.pooled_head:
            equal += 1
            assert spent == pytest.approx(expected, rel=1e-5)
        else:  # now the layer before computes no more than the pooled token, which nobody could know
            assert spent < expected
    assert equal >= 4


def test_the_share_of_parameters_is_what_the_cut_model_has():
    for seed in range(4):
        model, gates = gated(weights(target_params=0.4))
        (part,) = gates.parts
        kept = part.choose(torch.rand(part.size, generator=torch.Generator().manual_seed(seed)), 0.4)
        expected = float(gates.share([kept.double()]))
        hidden, heads, units = part.layout.left(kept)
        operate(model, hidden=hidden, heads=heads, units=units)
        assert layers_left(model) == pytest.approx(expected, rel=1e-5)
