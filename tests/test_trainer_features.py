"""The Trainer's other features work with the callback as without it. Accumulation is tested in `test_whose_loss.py`, evaluation in
`test_training.py`, resuming in `test_resuming.py`, several processes in `test_distributed.py`."""

import shutil

import pytest
import torch
from families import build, make_inputs, outputs_of
from torch.nn import functional
from training_helpers import Recorder, Texts, at_home, collate, no_dropout, spent_share, top, trainer_for
from transformers import Adafactor, EarlyStoppingCallback, TrainingArguments
from transformers.optimization import AdafactorSchedule

import hf_tokenprune as tp
from hf_tokenprune.modeling.sizes import sizes_of
from hf_tokenprune.schedule import Moment

HEAD = "ForSequenceClassification"
PLAN = tp.Schedule(dense=1, anneal=1, settle=1)
SETTLE = 8  # the first step of the last phase in a run of 12 steps


def steps_evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]


def falling():
    """A metric that is worse at every evaluation."""
    marks = iter(range(100, 0, -1))
    return lambda _: {"mark": next(marks)}


STOPPING = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
    "metric_for_best_model": "mark", "greater_is_better": True,
}  # fmt: skip


def test_early_stopping_waits_for_the_budget(tmp_path):
    """The metric falls from the first step on; only from the model that meets the budget on does that count."""
    trainer = trainer_for(
        tmp_path, top(), callbacks=[EarlyStoppingCallback(2)], compute_metrics=falling(), **STOPPING
    )  # fmt: skip
    trainer.train()
    assert steps_evaluated(trainer) == list(range(1, SETTLE + 3))
    assert trainer.state.best_global_step == SETTLE
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_stopping_before_the_budget_is_met_is_told(tmp_path, caplog):
    class Stop(Recorder):
        def on_step_end(self, _, state, control, **__):
            control.should_training_stop = state.global_step == 6

    trainer_for(tmp_path, top(), callbacks=[Stop()]).train()
    assert "ended at step 6, before the budget was met" in caplog.text


def test_hyperparameter_search_by_the_loss(tmp_path):
    """Its default objective adds up all that was evaluated, or takes the loss where there is nothing else."""
    callback = tp.TokenPruneCallback(top())
    trainer = trainer_for(
        tmp_path, callbacks=[callback], model_init=lambda: callback.attach(build("bert", HEAD)), eval_strategy="steps", eval_steps=12
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)},
        n_trials=1, backend="optuna",
    )  # fmt: skip
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.objective == evaluated["eval_loss"]
    assert 0 < evaluated["eval_macs_realised"] < 1


def test_an_objective_of_ones_own_finds_what_was_spent(tmp_path):
    callback, seen = tp.TokenPruneCallback(top()), []
    trainer = trainer_for(
        tmp_path, callbacks=[callback], model_init=lambda: callback.attach(build("bert", HEAD)), eval_strategy="steps", eval_steps=12
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)},
        compute_objective=lambda metrics: seen.append(metrics["eval_macs_realised"]) or seen[-1], n_trials=1, backend="optuna",
    )  # fmt: skip
    assert 0 < seen[-1] < 1


def test_hyperparameter_search(tmp_path):
    """Of the Trainer's arguments and of the method's settings; each trial ends with a model that meets its own budget."""
    spent = []
    callback = tp.TokenPruneCallback(top())

    def model_init(trial=None):
        if trial is not None:
            callback.method = top(target_macs=trial.suggest_categorical("target_macs", [0.45, 0.6]))
        return callback.attach(build("bert", HEAD, **no_dropout()))

    def objective(metrics):
        spent.append((callback.method.target_macs, spent_share(trainer.model, Texts())))
        return metrics["eval_loss"]

    trainer = trainer_for(
        tmp_path, callbacks=[callback], model_init=model_init, eval_strategy="steps", eval_steps=12
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)},
        compute_objective=objective, n_trials=2, direction="minimize", backend="optuna", sampler=GridSampler(),
    )  # fmt: skip
    assert best.hyperparameters.keys() == {"target_macs", "learning_rate"}
    assert {target for target, _ in spent} == {0.45, 0.6}
    assert all(target - 0.05 < share < target + 0.01 for target, share in spent)


def test_each_trial_keeps_its_own_teacher(tmp_path):
    """So that any of them can be gone on with."""
    callback = tp.TokenPruneCallback(top())
    trainer = trainer_for(
        tmp_path, callbacks=[callback], model_init=lambda: callback.attach(build("bert", HEAD)), eval_strategy="steps", eval_steps=12,
        save_strategy="steps", save_steps=6,
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True)},
        n_trials=2,
        backend="optuna",
    )
    assert not (tmp_path / "_teacher").exists()
    first = trainer_for(tmp_path / "run-0", top())
    first.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-6"))
    assert spent_share(first.model, Texts()) < 0.51


def GridSampler():
    import optuna

    return optuna.samplers.GridSampler({"target_macs": [0.45, 0.6], "learning_rate": [1e-3]}, seed=0)


def test_input_tokens_are_counted(tmp_path):
    data = Texts(96)
    trainer = trainer_for(tmp_path, top(), data=data, include_num_input_tokens_seen="non_padding")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(len(row["input_ids"]) for row in data)


def test_texts_grouped_by_length(tmp_path):
    """Batches of equal lengths are another way through attention."""
    widths = []

    def watched(rows):
        widths.append(len({len(row["input_ids"]) for row in rows}))
        return collate(rows)

    trainer = trainer_for(tmp_path, top(), train_sampling_strategy="group_by_length", data_collator=watched, data=Texts(192))
    trainer.train()
    assert sum(widths) / len(widths) < 4
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51


def test_neftune_adds_noise_in_training_only_and_not_to_the_teacher(tmp_path):
    states, noisy = [], Recorder(lambda model: model.token_pruner.objective.teacher)
    for alpha in (None, 5.0):
        torch.manual_seed(0)
        model = build("bert", HEAD, **no_dropout())
        trainer = trainer_for(tmp_path, top(), model=model, callbacks=[noisy], neftune_noise_alpha=alpha)
        trainer.train()
        states.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert not torch.equal(*states)
    assert not trainer.model.get_input_embeddings()._forward_hooks
    teachers = [teacher for teacher in noisy.looks if teacher is not None]
    assert teachers
    assert not any(teacher.get_input_embeddings()._forward_hooks for teacher in teachers)
    assert 0.45 < spent_share(trainer.model, Texts()) < 0.51
    trainer.save_model(str(tmp_path / "saved"))
    inputs, opened = make_inputs("bert", HEAD), at_home(tp.from_pretrained(tmp_path / "saved"))
    assert torch.equal(outputs_of(opened, inputs)["logits"], outputs_of(at_home(trainer.model.eval()), inputs)["logits"])


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_the_tightening_budget_is_no_plateau(tmp_path, kind):
    """The metric is best in the dense phase (steps 1 to 4), gets worse while annealing and better while settling, or stays."""
    for at_last in (0.0, 0.1):
        marks = iter([4, 3, 2, 1, 6, 7, 8, 9, *(9 - at_last * step for step in range(4))])
        trainer = trainer_for(
            tmp_path, top(), eval_strategy="steps", eval_steps=1, logging_steps=1, metric_for_best_model="mark",
            lr_scheduler_type=kind, lr_scheduler_kwargs={"patience": 1, "factor": 0.5, "min_lr": 1e-5, "max_lr": 1e-3}
            if kind == "greedy" else {"patience": 1}, compute_metrics=lambda _, marks=marks: {"mark": next(marks)},
        )  # fmt: skip
        trainer.train()
        assert (trainer.optimizer.param_groups[0]["lr"] < 1e-3) == (at_last == 0)


def test_callbacks_before_and_after_ours_see_the_same(tmp_path):
    before, later = Recorder(), Recorder()
    trainer = trainer_for(tmp_path, callbacks=[before, tp.TokenPruneCallback(top())])
    trainer.add_callback(later)
    trainer.train()
    assert before.logs == later.logs
    assert "macs_realised" in later.logs[-2]


def test_a_tighter_budget_on_the_same_model(tmp_path):
    trainer = trainer_for(tmp_path / "first", top(target_macs=0.6))
    trainer.train()
    first = spent_share(trainer.model, Texts())
    plan = tp.Schedule(dense=0, anneal=1, settle=1)
    again = trainer_for(tmp_path / "second", top(target_macs=0.45, schedule=plan), model=trainer.model)
    assert spent_share(again.model, Texts()) == first, "until it is trained the model stays as it is"
    again.train()
    assert 0.4 < spent_share(again.model, Texts()) < 0.46 < first
    assert again.model.config.token_pruning["method"]["target_macs"] == 0.45


# Optimizers made by the user


class Layers(torch.optim.AdamW):
    """One group per layer, so that some end empty."""

    def __init__(self, model):
        layers = [list(layer.parameters()) for layer in model.bert.encoder.layer]
        inside = {id(parameter) for layer in layers for parameter in layer}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        super().__init__([{"params": group, "weight_decay": 0.01} for group in (rest, *layers)], lr=1e-3)


def own_optimizer_run(folder, resume=None):
    torch.manual_seed(0)
    model = build("bert", HEAD, seed=0 if resume is None else 7, **no_dropout())
    method = tp.StructuredPruning(target_macs=0.25, parts=("blocks",), schedule=PLAN)
    callback = tp.TokenPruneCallback(method)
    optimizer = Layers(callback.attach(model))
    trainer = trainer_for(
        folder, model=model, callbacks=[callback], optimizers=(optimizer, None), save_strategy="steps", save_steps=1,
        data=Texts(48),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("step", [6, 10])
def test_a_run_with_an_own_optimizer_resumes_before_and_after_surgery(tmp_path, step):
    whole = own_optimizer_run(tmp_path / "whole")
    assert 0 in sizes_of(whole.model)[1] or len(sizes_of(whole.model)[1]) < 4, "something is gone as a whole"
    for part in (f"checkpoint-{step}", "_teacher"):
        shutil.copytree(tmp_path / "whole" / part, tmp_path / "resumed" / part)
    resumed = own_optimizer_run(tmp_path / "resumed", str(tmp_path / "resumed" / f"checkpoint-{step}"))
    expected = whole.model.state_dict()
    assert resumed.model.state_dict().keys() == expected.keys()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    held = {parameter for group in resumed.optimizer.param_groups for parameter in group["params"]}
    assert held == set(resumed.model.parameters())


# fp16


@pytest.mark.parametrize("own_loss", [False, True], ids=["the model's loss", "a loss computed outside"])
@pytest.mark.parametrize("phase", ["measuring", "learning"])
def test_a_scaled_loss_changes_no_gradient(phase, own_loss):
    """What fp16 does: the loss is multiplied before the backward and gradients are divided after it."""
    method = tp.Compose(tp.StructuredPruning(), tp.ToP(rank_bins=8), target_macs=0.4, teacher=None)
    batch, found = collate(list(Texts(8))), []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        torch.manual_seed(0)
        callback = tp.TokenPruneCallback(method)
        model = callback.attach(build("bert", HEAD, **no_dropout())).train()
        objective = callback.objective
        objective.start_run(1e-3, {"dense": 0, "static": 0, "anneal": 10, "settle": 0})
        objective.moment = Moment("anneal", 0.0 if phase == "measuring" else 0.5)
        objective.loss_scale = scaler.get_scale
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = {name: value for name, value in batch.items() if name != "labels" or not own_loss}
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits, batch["labels"]) if own_loss else outputs.loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        objective.end_step()
        gates = objective.gates.state
        found.append((gates.information, gates.log_odds.grad, model.bert.embeddings.word_embeddings.weight.grad))
    assert (found[0][0 if phase == "measuring" else 1] != 0).any()
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-7, rtol=1e-4)


def test_an_overflow_is_not_taken_for_information():
    callback = tp.TokenPruneCallback(tp.StructuredPruning(target_macs=0.4, teacher=None))
    model = callback.attach(build("bert", HEAD, **no_dropout())).train()
    gates = callback.objective.gates
    callback.objective.start_run(1e-3, {"anneal": 10})
    callback.objective.moment = Moment("anneal", 0.0)
    for scale in (float("inf"), 1.0):
        (scale * model(**collate(list(Texts(4)))).loss).backward()
        callback.objective.end_step()
        assert gates.state.information.isfinite().all()
        assert (gates.state.information != 0).any() == (scale == 1.0)


# What is refused


def test_data_parallel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(tp.errors.TrainingError, match=r"DataParallel.*torchrun"):
        trainer_for(tmp_path, top())


def test_the_dense_model_can_be_evaluated_by_the_same_trainer(tmp_path):
    trainer = trainer_for(tmp_path, top())
    trainer.train()
    tp.detach(trainer.model)
    assert "eval_macs_realised" not in trainer.evaluate()
    assert trainer.predict(Texts(8)).predictions.shape == (8, 3)


def test_gates_move_as_said_where_the_schedule_begins_below_its_peak(tmp_path):
    callback = tp.TokenPruneCallback(top(gate_lr=0.1))
    model = callback.attach(build("bert", HEAD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=12)
    trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=(optimizer, schedule)).train()
    assert callback.objective.gates.state.scale == pytest.approx(100)


def test_an_optimizer_that_finds_its_own_pace_is_refused(tmp_path):
    callback = tp.TokenPruneCallback(top())
    model = callback.attach(build("bert", HEAD))
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True)
    trainer = trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=(optimizer, AdafactorSchedule(optimizer)))
    with pytest.raises(tp.errors.TrainingError, match="relative_step"):
        trainer.train()


@pytest.mark.parametrize(
    "make", [lambda ps: Adafactor(ps, lr=1e-3, relative_step=False), lambda ps: torch.optim.Adafactor(ps, lr=1e-3)],
    ids=["transformers'", "torch's"],
)  # fmt: skip
def test_an_optimizer_that_steps_by_the_size_of_parameters_is_refused(tmp_path, make):
    callback = tp.TokenPruneCallback(top())
    model = callback.attach(build("bert", HEAD))
    optimizer = make(model.parameters())
    with pytest.raises(tp.errors.TrainingError, match="scale_parameter=False"):
        trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=(optimizer, None)).train()


@pytest.mark.parametrize("absolute", [True, False])
def test_gates_that_hardly_move_are_told(tmp_path, caplog, absolute):
    """A schedule may set the rate itself, over an optimizer's that is 1."""
    callback = tp.TokenPruneCallback(top())
    model = callback.attach(build("bert", HEAD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0 if absolute else 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1e-3 if absolute else 1.0)
    trainer_for(tmp_path, model=model, callbacks=[callback], optimizers=(optimizer, schedule)).train()
    assert ("hardly moved" in caplog.text) == absolute


def test_gates_of_a_run_that_has_no_time_to_move_them_are_no_news(tmp_path, caplog):
    """In a single step of annealing information is measured."""
    trainer_for(tmp_path, top(schedule=tp.Schedule()), max_steps=4).train()
    assert "hardly moved" not in caplog.text


def test_where_nothing_settles_gates_are_closed_all_the_same(tmp_path):
    """Another Trainer, without the callback, trains the model as it has become."""
    callback = tp.TokenPruneCallback(top(schedule=tp.Schedule(dense=1, anneal=1, settle=0)))
    trainer = trainer_for(tmp_path, callbacks=[callback])
    trainer.train()
    assert callback.objective.moment.phase == "settle"
    trainer.model.train()(**make_inputs("bert", HEAD))
    assert not trainer.model.token_pruner.is_soft
