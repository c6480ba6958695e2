"""InforCoef in real runs: weights are cut in its static stage, token samplers learn in its dynamic one; each has its budget, and the
run resumes exactly wherever it was killed."""

import itertools

import pytest
import torch
from families import build, make_inputs, outputs_of
from training_helpers import (
    GatesOf,
    Recorder,
    Rows,
    Texts,
    assert_close_state,
    assert_same_state,
    at_home,
    collate,
    logged,
    put_checkpoint,
    some_words,
    spent_share,
    stack,
    trained,
    trainer_for,
)
from weights_helpers import (
    DENSE_SIZES,
    INPUTS,
    NARROW,
    OptimizerOf,
    Surgery,
    assert_refused,
    classes,
    dropout_run,
    dropping,
    said,
    size_of,
    uninterrupted_runs,
)

import hf_tokenprune as tp
from hf_tokenprune.cost import dense_macs, trace_macs
from hf_tokenprune.methods import infor_coef as module
from hf_tokenprune.modeling.sizes import sizes_of

HEAD = "ForSequenceClassification"
BOTH = tp.Schedule(dense=1, static=2, anneal=2, settle=1)
DYNAMIC = tp.Schedule(dense=1, anneal=2, settle=1)


def stages(**settings):
    """Both stages in a few steps."""
    return tp.InforCoef(**{"static_macs": 0.5, "target_macs": 0.3, "schedule": BOTH, **settings})


def tokens(**settings):
    """The dynamic stage alone."""
    return tp.InforCoef(**{"static_macs": None, "target_macs": 0.5, "schedule": DYNAMIC, **settings})


def offset_of(model):
    """The offset of all samplers, which share one."""
    (offset,) = {sampler.offset.item() for sampler in model.token_pruner.sites.values()}
    return offset


def weights_of(sampler):
    return torch.cat([parameter.detach().flatten() for parameter in sampler.parameters()])


def gradient_of(sampler):
    return sum(parameter.grad.abs().sum().item() for parameter in sampler.parameters() if parameter.grad is not None)


def look(model):
    """What a recorder remembers of each step."""
    pruner = model.token_pruner
    return size_of(model), sizes_of(model), offset_of(model), [weights_of(sampler) for sampler in pruner.sites.values()]


class Watch(Recorder):
    """A recorder that also remembers how large the gradient of each sampler was in each step."""

    def __init__(self, look):
        super().__init__(look)
        self.gradients = []

    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.gradients.append([gradient_of(sampler) for sampler in model.token_pruner.sites.values()])


# One run

METHODS = {"stages": stages, "tokens": tokens, "lagrangian": lambda: stages(constraint="lagrangian")}
STEPS = 48  # dense to step 8 and static to 24; or dense to 12; annealing to 40, or to 36


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of every method: the Trainer, what a recorder saw after each step, and the surgery."""
    done = {}

    def run(name):
        if name not in done:
            torch.manual_seed(0)
            recorder = Watch(look)
            with pytest.MonkeyPatch.context() as patch:
                surgery = Surgery(patch, collate(list(Texts(32, seed=1))))
                trainer = trained(
                    tmp_path_factory.mktemp("run"), METHODS[name](), callbacks=[recorder], max_steps=STEPS, logging_steps=2,
                    eval_strategy="steps", eval_steps=8,
                )  # fmt: skip
            done[name] = trainer, recorder, surgery
        return done[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_one_run_goes_through_all_phases(runs, name):
    trainer, recorder, surgery = runs(name)
    phases = logged(trainer, "pruning_phase")
    assert phases == sorted(phases)
    assert set(phases) == ({0, 2, 3} if name == "tokens" else {0, 1, 2, 3})
    sizes = [size for size, *_ in recorder.looks]
    if name == "tokens":
        assert set(sizes) == {size_of(build("bert", HEAD))}
        return
    assert set(sizes[:23]) == {sizes[0]}
    assert set(sizes[23:]) == {sizes[-1]}
    assert sizes[-1] < 0.8 * sizes[0]
    surgery.assert_changes_nothing()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    labels = collate(list(Texts(32, seed=1)))["labels"]
    assert evaluated[24] == pytest.approx(torch.nn.functional.cross_entropy(surgery.gated, labels).item(), abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_samplers_keep_everything_until_the_dynamic_stage_begins(runs, name):
    _, recorder, _ = runs(name)
    plan = METHODS[name]().schedule
    looking_on = module.InforCoefObjective.FORESEES if name == "tokens" else 0.0
    moments = [plan.at(step, STEPS) for step in range(STEPS)]
    begins = next(step for step, (phase, progress) in enumerate(moments) if phase == "anneal" and progress >= looking_on)
    offsets = [offset for _, _, offset, _ in recorder.looks]
    assert offsets[:begins] == [float("inf")] * begins
    assert all(abs(offset) < 30 for offset in offsets[begins:])
    assert min(offsets) < -1, "the untrained samplers keep with log-odds of 3.5"
    dense = plan.start("static", STEPS)
    last, learned = recorder.looks[begins - 1][3], recorder.looks[-1][3]  # surgery is behind both
    assert all(torch.equal(a, b) for a, b in zip(recorder.looks[0][3], recorder.looks[dense - 1][3], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(last, learned, strict=True))
    learning = recorder.gradients[begins : plan.start("settle", STEPS)]
    assert min(map(min, learning)) > 0, "Adam would move them for a while without"


@pytest.mark.parametrize("name", METHODS)
def test_the_log_holds_the_budget_and_every_loss(runs, name):
    entries = [entry for entry in runs(name)[0].state.log_history if "loss" in entry]
    assert len(entries) == STEPS // 2
    always = {"macs_target", "macs_realised", "pruning_phase", "tokens_after_0"}
    taught = {"distillation", "layer_distillation"}
    of_static = {*taught, "soft_hard_gap", *({"lagrangian"} if name == "lagrangian" else ())}
    of_anneal = {*taught, "soft_hard_gap", "macs_expected", "information_norm", "negative_entropy"}
    plan = METHODS[name]().schedule
    for number, entry in enumerate(entries, start=1):
        phase, progress = plan.at(2 * number - 1, STEPS)
        if phase == "anneal" and name == "tokens" and progress < module.InforCoefObjective.FORESEES:
            of_anneal_now = {*taught, "soft_hard_gap"}
            assert entry["foresight"] > 0
        else:
            of_anneal_now = of_anneal
        expected = {"dense": set(), "static": of_static, "anneal": of_anneal_now, "settle": taught}[phase]
        if phase == "static" and (progress >= 0.15 or name == "lagrangian"):  # before, information is measured
            expected = expected | {"macs_expected"}
        assert always <= entry.keys()
        assert (of_static | of_anneal | {"lagrangian"}) & entry.keys() == expected, (number, phase)
        assert torch.tensor([entry[key] for key in expected | always]).isfinite().all()
        if phase in ("dense", "static"):
            assert entry["tokens_after_0"] == entry["tokens_after_2"] == 1
    targets = [entry["macs_target"] for entry in entries]
    assert all(b < a + 1e-3 for a, b in itertools.pairwise(targets)), "up to the lengths that were seen meanwhile"
    assert targets[0] == 1
    assert targets[-1] == METHODS[name]().target_macs
    if name != "tokens":
        assert targets[11] == pytest.approx(0.5)


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met(runs, name):
    """Samplers that have hardly learned decide much alike, so that a whole layer's tokens may hang on a bit of the offset."""
    trainer, _, _ = runs(name)
    target = METHODS[name]().target_macs
    spent = spent_share(trainer.model, Texts())
    assert target - 0.06 < spent < target + 0.04
    assert logged(trainer, "macs_realised")[-1] == pytest.approx(target, abs=0.06)


@pytest.fixture
def warnings(monkeypatch):
    """What the method warns of."""
    told = []
    monkeypatch.setattr(module.logger, "warning", told.append)
    return told


@pytest.mark.parametrize("steps", [32, 100])
def test_a_short_run_with_the_default_schedule_meets_the_budget(tmp_path, warnings, steps):
    torch.manual_seed(0)
    trainer = trainer_for(tmp_path, tp.InforCoef(static_macs=0.5, target_macs=0.35), max_steps=steps)
    trainer.train()
    assert trainer.evaluate()["eval_macs_realised"] < 0.39
    assert not warnings


def test_a_missed_budget_is_told(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(module.InforCoefObjective, "_rate", lambda *_: 0.0)  # the offset stays where it keeps everything
    trainer_for(tmp_path, tp.InforCoef(static_macs=0.5, target_macs=0.35), max_steps=32).train()
    assert len(warnings) == 1
    assert "target_macs=0.35) was missed: the last batches spent 0.5" in warnings[0]


def test_evaluation_is_deterministic_and_tokens_are_gone_in_it(runs):
    trainer, _, _ = runs("stages")
    words = []
    for seed in range(3):
        torch.manual_seed(seed)
        words.append(said(trainer.model, INPUTS))
    assert torch.equal(words[0], words[1])
    assert torch.equal(words[0], words[2])
    outputs_of(trainer.model.eval(), INPUTS)
    before = [sum(layer.arrived) for layer in trainer.model.token_pruner.trace]
    assert before[0] > before[-1]


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_opens_to_the_same_logits(runs, tmp_path, name):
    trainer, _, _ = runs(name)
    trainer.save_model(str(tmp_path))
    opened = at_home(tp.from_pretrained(tmp_path))
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], outputs_of(at_home(trainer.model.eval()), INPUTS)["logits"])
    assert offset_of(opened) == offset_of(trainer.model)
    assert opened.config.token_pruning["method"]["name"] == "infor_coef"


# Resume

TOTAL, LEARNING = 18, 3e-3  # dense to step 3, surgery with step 9, annealing to 15
RESUMED = {
    "stages": stages,
    "narrow": lambda: stages(parts=NARROW, static_macs=0.4, target_macs=0.25),
    "no teacher, no budget": lambda: stages(teacher=None, target_macs=None, norm_weight=3.0),
    "tokens": lambda: tokens(schedule=BOTH_WITHOUT_STATIC),
}
BOTH_WITHOUT_STATIC = tp.Schedule(dense=1, anneal=4, settle=1)
KILLS = [("stages", step) for step in (2, 3, 4, 7, 9, 10, 13, 15, 16)] + [("narrow", step) for step in (7, 9, 13)]
KILLS += [(name, step) for name in ("no teacher, no budget", "tokens") for step in (7, 13, 16)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return uninterrupted_runs(tmp_path_factory, RESUMED, TOTAL)


@pytest.mark.parametrize(("name", "step"), KILLS, ids=[f"{name} {step}" for name, step in KILLS])
def test_a_run_killed_and_resumed_ends_with_the_same_weights(uninterrupted, tmp_path, name, step):
    folder, model, _ = uninterrupted(name)
    resumed = dropout_run(tmp_path, RESUMED[name](), put_checkpoint(folder, tmp_path, step, dense=3), steps=TOTAL)
    assert len(logged(resumed, "loss")) == 4
    assert_same_state(resumed.model.state_dict(), model.state_dict())


def test_the_resumed_run_loses_hidden_units(uninterrupted):
    assert sizes_of(uninterrupted("narrow")[1])[0] < 32


@pytest.mark.parametrize("name", ["stages", "narrow"])
@pytest.mark.parametrize("step", [7, 9, 13, TOTAL])
def test_a_checkpoint_opens_as_the_model_that_was_training(uninterrupted, name, step):
    folder, model, words = uninterrupted(name)
    opened = at_home(tp.from_pretrained(folder / f"checkpoint-{step}"))
    assert torch.equal(outputs_of(opened, INPUTS)["logits"], words[step - 1][1])
    assert sizes_of(opened) == (DENSE_SIZES if step < 9 else sizes_of(model)) != (sizes_of(model) if step < 9 else DENSE_SIZES)
    assert (offset_of(opened) == float("inf")) == (step <= 9)


# The optimizer, accumulation, checkpointing, precision


@pytest.mark.parametrize("name", ["stages", "narrow"])
def test_the_optimizer_survives_surgery(tmp_path, name):
    """The samplers' own weights are cut with the hidden units that they read."""
    look = OptimizerOf()
    trainer = trained(tmp_path, RESUMED[name](), callbacks=[look], max_steps=TOTAL)
    held, kept, numbers = zip(*look.counts, strict=True)
    assert numbers[8] < 0.95 * numbers[7]
    assert held[8:] == (held[8],) * 10
    assert kept[-1] == held[-1]
    hidden = sizes_of(trainer.model)[0]
    assert {sampler.hidden for sampler in trainer.model.token_pruner.sites.values()} == {hidden}
    assert trainer.model.config.token_pruning["sites"][0]["selector"]["hidden"] == hidden


@pytest.mark.usefixtures("gates_without_noise")
@pytest.mark.parametrize(
    "make", [stages, tokens, lambda: stages(target_macs=None, norm_weight=1.0)], ids=["both", "tokens", "free"]
)
def test_accumulating_two_micro_batches_is_one_batch(tmp_path, make):
    """Of one text over and over, see `test_weights_training`. A budget moves the offset after each micro-batch, by half as much:
    nearly the same."""
    states, sizes = [], []
    for accumulation in (1, 2):
        trainer = trained(
            tmp_path, make(), per_device_train_batch_size=8 // accumulation, data=[Texts(1, lengths=(17, 17))[0]] * 96,
            max_steps=TOTAL, gradient_accumulation_steps=accumulation, max_grad_norm=0, optim="sgd", learning_rate=0.01,
        )  # fmt: skip
        state = trainer.model.state_dict()
        for name in ("teacher", "start"):  # a fingerprint of the very bits; logarithms of tiny sums of squares
            state.pop(f"token_pruner.training_state.{name}")
        states.append(state)
        sizes.append(sizes_of(trainer.model))
    assert sizes[0] == sizes[1]
    assert (sizes[0] != DENSE_SIZES) == (make().static_macs is not None)
    offsets = [[state.pop(name) for name in list(state) if name.endswith("offset")] for state in states]
    torch.testing.assert_close(*offsets, atol=0.3, rtol=0)
    assert_close_state(*states, atol=1e-5 if make().target_macs is None else 0.02)


@pytest.mark.parametrize("make", [stages, tokens], ids=["both", "tokens"])
def test_activation_checkpointing_changes_nothing(tmp_path, make):
    found = []
    for asked in ({}, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}):
        torch.manual_seed(0)
        trainer = trained(tmp_path, make(), model=build("bert", HEAD), max_steps=TOTAL, learning_rate=LEARNING, **asked)
        assert trainer.model.is_activation_checkpointing == bool(asked)
        found.append(trainer.model.state_dict())
    assert_same_state(found[1], found[0])


def test_bf16_trains_cuts_and_drops_tokens(tmp_path):
    trainer = trained(tmp_path, stages(), max_steps=36, bf16=True, learning_rate=LEARNING)
    assert sizes_of(trainer.model) != DENSE_SIZES
    assert spent_share(trainer.model, Texts()) < 0.42
    assert all(value.isfinite().all() for name, value in trainer.model.state_dict().items())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# Families

IMAGES = "ForImageClassification"


def patient(**settings):
    """Both stages, with more time for the second."""
    return stages(schedule=tp.Schedule(dense=1, static=2, anneal=4, settle=1), **settings)


FAMILY_RUNS = {
    "distilbert": ("distilbert", HEAD, classes, patient),
    "modernbert": ("modernbert", HEAD, classes, patient),
    "esm": ("esm", HEAD, classes, patient),
    "images": ("vit", IMAGES, classes, patient),
    "siglip": ("siglip", IMAGES, classes, lambda: patient(static_macs=0.6, target_macs=0.4)),
    "siglip, tokens": ("siglip", IMAGES, classes, tokens),
    "albert, tokens": ("albert", HEAD, classes, tokens),
    "deberta-v2, tokens": ("deberta-v2", HEAD, classes, tokens),
    "qwen3, tokens": ("qwen3", HEAD, classes, tokens),
    "masked words": ("bert", "ForMaskedLM", some_words, patient),
}


@pytest.mark.parametrize("what", FAMILY_RUNS)
def test_every_family_trains_and_opens_again(tmp_path, monkeypatch, what):
    name, head, make_labels, make = FAMILY_RUNS[what]
    inputs, look = make_inputs(name, head), OptimizerOf()
    surgery = Surgery(monkeypatch, inputs)
    model = build(name, head)
    arguments = {"data": Rows(name, head, make_labels), "data_collator": stack, "max_steps": 24, "learning_rate": LEARNING}
    trainer = trained(tmp_path / "run", make(), model=model, callbacks=[look], **arguments)
    if make().static_macs is not None:
        surgery.assert_changes_nothing()
    assert torch.tensor([value for entry in trainer.state.log_history for value in entry.values()]).isfinite().all()
    found = outputs_of(at_home(model.eval()), inputs)
    lengths = model.token_pruner.trace[0].arrived
    trace = model.token_pruner.trace
    assert min(trace[-1].survived) >= 1
    assert sum(trace[-1].entered) < sum(lengths), "tokens were dropped"
    assert sum(trace_macs(model)) < (make().target_macs + 0.25) * sum(dense_macs(model, lengths))
    trainer.save_model(str(tmp_path / "saved"))
    opened = outputs_of(at_home(tp.from_pretrained(tmp_path / "saved")), inputs)
    for key, value in found.items():
        assert torch.equal(opened[key], value), key


# What a user may do, and may not

WRONG = [
    *(("static_macs", value) for value in (0, 1, -0.1, 1.5, float("nan"), True, "0.4")),
    *(("target_macs", value) for value in (0, 1, True, "0.2", 0.4, 0.5)),  # 0.4 is static_macs
    *(("norm_weight", value) for value in (-1, float("nan"), float("inf"), "1", None)),
    *(("entropy_weight", value) for value in (-1, None)),
    *(("layer_weight", value) for value in (-1, None)),
    *(("distill_weight", value) for value in (-1, None)),
    *(("width", value) for value in (0, -1, 2.0, True, "16", None, 10_001)),
    *(("parts", value) for value in ((), "heads", ("head",))),
    *(("constraint", value) for value in (None, "none")),
    *(("gate_lr", value) for value in (0, -1)),
    *(("teacher", value) for value in ("", 3)),
    *(("schedule", value) for value in ((1, 2, 1), tp.Schedule())),  # no static phase for static_macs
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}" for name, value in WRONG])
def test_a_wrong_setting_is_refused_by_name(name, value):
    with pytest.raises(tp.errors.ConfigError, match=name):
        tp.InforCoef(**{"static_macs": 0.4, name: value})


def test_a_static_phase_belongs_to_static_macs():
    assert tp.InforCoef().schedule.static > 0
    assert tp.InforCoef(static_macs=None).schedule.static == 0
    with pytest.raises(tp.errors.ConfigError, match=r"schedule.*static_macs"):
        tp.InforCoef(static_macs=None, schedule=BOTH)
    for method in (tp.ToP, tp.StructuredPruning):
        with pytest.raises(tp.errors.ConfigError, match=r"schedule.*static phase"):
            method(target_macs=0.4, schedule=BOTH)


REFUSED = {
    "drops tokens": (stages, dropping, "drops tokens already"),
    "drops tokens, no weights": (tokens, dropping, "drops tokens already"),
    "hidden units of siglip": (
        lambda: stages(parts=("hidden",)),
        lambda: build("siglip", IMAGES),
        "Hidden units cannot be cut",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_and_the_model_left_as_it_was(tmp_path, what):
    assert_refused(tmp_path, *REFUSED[what])


def test_a_run_too_short_for_its_static_phase_is_refused(tmp_path):
    with pytest.raises(tp.errors.TrainingError, match=r"2 steps.*static"):
        trained(tmp_path, stages(schedule=tp.Schedule(dense=5, static=0.1, anneal=5, settle=5)), max_steps=2)


@pytest.mark.parametrize("best", [6, 16])
def test_the_best_model_at_the_end_is_one_that_is_cut_and_meets_the_budget(tmp_path, best):
    marks = iter([int(step == best) for step in range(3, TOTAL + 1)])
    trainer = dropout_run(
        tmp_path, stages(), steps=TOTAL, eval_strategy="steps", eval_steps=1, eval_delay=3, load_best_model_at_end=True,
        metric_for_best_model="mark", compute_metrics=lambda _: {"mark": next(marks)},
    )  # fmt: skip
    assert trainer.state.best_global_step == (16 if best == 16 else 15)
    assert sizes_of(trainer.model) != DENSE_SIZES


def test_training_once_more_after_surgery_says_what_to_do_and_that_works(tmp_path):
    """Its samplers are no reason to refuse a model: they begin anew."""
    trainer = trained(tmp_path / "first", stages(), max_steps=TOTAL)
    with pytest.raises(tp.errors.TrainingError, match="load the saved model"):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    recorder = Recorder(offset_of)
    opened = tp.from_pretrained(tmp_path / "saved")
    again = trained(tmp_path / "second", tokens(target_macs=0.25), model=opened, max_steps=TOTAL, callbacks=[recorder])
    assert recorder.looks[0] == float("inf")
    assert offset_of(again.model) < 0
    again.train()
    assert recorder.looks[TOTAL] == float("inf"), "without surgery a run may be started over"


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-5])
def test_gates_on_weights_move_at_their_own_rate(tmp_path, learning_rate):
    """In the static stage, of which the rate is: 20 / 12 steps is more than 0.2, the most there is."""
    gates = GatesOf()
    plan = tp.Schedule(dense=0, static=2, anneal=1, settle=0)
    trained(
        tmp_path, stages(schedule=plan, constraint="lagrangian"), max_steps=18, lr_scheduler_type="constant",
        learning_rate=learning_rate, callbacks=[gates],
    )  # fmt: skip
    moved = (gates.values[1] - gates.values[0]).abs()
    assert moved.max() == pytest.approx(0.2, rel=0.02)
