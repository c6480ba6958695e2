"""One callback for an unmodified `transformers.Trainer`."""

import contextlib
import functools
import math
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpoints import resume_complete
from .cost import CostMeter
from .errors import TokenPruneError, TrainingError, UnsupportedModelError
from .integrations import sentence_transformers
from .loading import go_on_with_own_code
from .modeling.architectures import is_sharded, transformers_model
from .modeling.modeling_token_pruned import attach, check_can_be_saved, detach, is_token_pruned
from .modeling.shapes import shape_map
from .processes import total_of
from .results import evaluation_of_log
from .sharding import check_sharding, has_engine, reshard
from .teacher import check_head, dense_copy, find_teacher, load_teacher, save_teacher
from .trainer import (
    adds_up,
    calling_trainer,
    check_checkpointing,
    count_evaluations_alone,
    forget_what_is_gone,
    group_of,
    log_first,
    loss_scale,
    note_labels,
    run_folder,
    save_encoder_too,
    scaler_of,
)
from .trainer_card import complete, follow

logger = logging.get_logger(__name__)


class TokenPruneCallback(TrainerCallback):
    """Train a model to drop tokens, by any method of this package, within one ordinary `trainer.train()`.

    Give it to the Trainer's constructor. There the model becomes `TokenPruned<its class>`, with gates among its parameters,
    before the optimizer is made. Every checkpoint the Trainer writes is a complete model that loads with
    `AutoModelFor....from_pretrained(folder, trust_remote_code=True)`, and resumes exactly.

    Every loss term of pruning is logged by its name. `loss` in the log includes them where the model computes the loss, and does not
    where the Trainer or its compute_loss does.

    Of a module of your own around an encoder the Trainer writes the weights alone. The encoder is then saved beside them, in a folder
    named after its place in the module: `module.bert = from_pretrained("run/bert")`, and then
    `module.load_state_dict(load_file("run/model.safetensors"), strict=False)`; what is left over there is of the training.

    The Trainers of sentence-transformers take it, too; `integrations.sentence_transformers` says what pooling reads then.

    Args:
        method: a method's config, e.g. `ToP(target_macs=0.4)`.

    Raises:
        UnsupportedModelError, ConfigError: from the Trainer's constructor: the model or the settings do not fit.
        TrainingError: the callback was added too late, or the Trainer is set up in a way that cannot work.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data,  # doctest: +SKIP
        ...                   callbacks=[TokenPruneCallback(ToP(target_macs=0.4))])
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, method):
        if not hasattr(method, "attach") or not hasattr(method, "schedule"):
            raise TrainingError(f"TokenPruneCallback({method!r}): give it a method, for instance ToP(target_macs=0.4).")
        self.method = method
        self.model = self.inner = None
        self.place = None  # of the encoder in a module of the user's own
        self.objective = None
        self.total = 0
        self.told = False
        self.ran = False  # the encoder, in the current step
        self.meters = {}
        self.settled = None  # counts what is spent since nothing is chosen any more
        self.reached = None  # the share of the dense model's MACs that it is, once training is over
        self.watch = None
        self.untrained = False  # the model drops nothing yet, and has not been trained with this callback
        self.unpruned = {}  # what it was evaluated to by then

    def attach(self, model):
        """Prepare a model. The Trainer's constructor does it through this callback; call it yourself where the optimizer is made
        before that (`optimizers=(...)`) or where the model is made anew (`model_init`).

        Example:
            >>> callback = TokenPruneCallback(ToP(target_macs=0.4))  # doctest: +SKIP
            >>> def model_init(trial=None):  # doctest: +SKIP
            ...     if trial is not None:  # of a hyperparameter search: the method's settings can be searched, too
            ...         callback.method = ToP(target_macs=trial.suggest_float("target_macs", 0.3, 0.6))
            ...     return callback.attach(AutoModelForSequenceClassification.from_pretrained("..."))
            >>> Trainer(model_init=model_init, callbacks=[callback], ...)  # doctest: +SKIP
        """
        inner = transformers_model(model)
        go_on_with_own_code(inner)
        check_can_be_saved(inner)
        adapters, base = _adapters(model), None
        if adapters is not None:
            adapters.check(model, self.method)
            base = adapters.base_of(inner)
        else:
            check_head(inner)
        pruned = is_token_pruned(inner) and (len(inner.token_pruner.sites) or shape_map(inner) is not None)
        self.untrained, self.unpruned = not pruned, {}
        with _as_it_was_if_refused(inner):
            objective = self.method.attach(inner)
            _check_hidden(model, inner)
        self.objective = objective
        if adapters is not None:
            adapters.adopt(model, base)
        sentence_transformers.prepare(model, self.objective)
        self.model, self.inner, self.place = model, inner, _place(model, inner)
        self.meters = {mode: CostMeter(inner) for mode in (True, False)}
        inner.token_pruner.meter = self._measure
        return model

    # Events of the Trainer, in the order in which they come.

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if args.n_gpu > 1:
            raise TrainingError(
                "This Trainer would use DataParallel over several GPUs, which copies the model in every step and loses what the "
                "hooks learn. Start the script with `torchrun --nproc_per_node N`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        check_sharding(args, self.method, model, adapters=_adapters(model) is not None)
        if getattr(args, "predict_with_generate", False):
            raise TrainingError(
                "predict_with_generate=True: a token-pruned model reads a text once, it does not generate. Leave it out."
            )
        if model is not self.model:
            self.attach(model)
        if optimizer is not None:
            self.watch = model.register_load_state_dict_post_hook(functools.partial(forget_what_is_gone, optimizer))
        trainer = calling_trainer()
        if trainer is not None:
            follow(trainer)
            resume_complete(trainer)
            count_evaluations_alone(trainer, self)
            note_labels(trainer, self)
            save_encoder_too(trainer, self)
        log_first(self)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.model is None or model is not self.model:
            raise TrainingError(
                "TokenPruneCallback has not prepared the model that is to be trained: it was added with add_callback, or model_init "
                "made a new model. Pass it as Trainer(callbacks=[...]), and with model_init let that function return "
                "callback.attach(model)."
            )
        if self.watch is not None:
            self.watch.remove()
        self.untrained = False
        check_checkpointing(model)
        reshard(model)
        gates = list(self.inner.token_pruner.training_state.parameters())
        group = group_of(optimizer, gates, list(self.objective.parameters()), given=self.watch is not None)
        self.objective.sharded = has_engine(optimizer) or is_sharded(model)
        self.objective.forgets = not has_engine(optimizer)  # an engine keeps its moments to itself
        if state.global_step == 0:
            self.objective.total = state.max_steps
        self.total = self._steps_of_phases(state.max_steps)
        steps = self.method.schedule.steps(self.total)
        dense, self.objective.steps = steps["dense"], steps
        if self.method.schedule.static and not steps["static"]:
            raise TrainingError(
                f"A run of {self.total} steps is too short for {self.method.schedule}: no step is left for 'static'."
            )
        if state.global_step == 0:
            # A schedule of DeepSpeed's own has begun already, and does not say where it goes.
            learning_rate = group.get("initial_lr", args.learning_rate if has_engine(optimizer) else group["lr"])
            learning_rate = group.get("max_lr", learning_rate)  # of schedules that begin below it
            if not (learning_rate or 0) > 0:
                raise TrainingError(
                    f"The learning rate is {learning_rate}, so the gates cannot learn either. Set one above 0; an optimizer that "
                    "finds its own (Adafactor with relative_step=True) does not say how far gates would move."
                )
            if group.get("scale_parameter", "beta2_decay" in group):  # of transformers' Adafactor; torch's can do no other
                raise TrainingError(
                    "This Adafactor multiplies each step by the size of the parameter, and gates, which begin at 0, would take a "
                    "thousandth of theirs. Use transformers' with scale_parameter=False and relative_step=False (the Trainer's "
                    'optim="adafactor" is that), or another optimizer.'
                )
            self.objective.start_run(learning_rate, steps)
        self.told = False
        self.meters[True], self.settled, self.reached = CostMeter(self.inner), CostMeter(self.inner), None
        self.objective.close_gates()  # those of a run that was interrupted
        self.objective.moment = self.method.schedule.at(state.global_step, self.total)
        if self.objective.moment.phase != "settle":  # hard gates on weights are no part of a checkpoint
            self.objective.harden()
        self.objective.loss_scale = lambda: loss_scale(optimizer)
        trainer = calling_trainer()
        says = getattr(trainer, "loss_is_scaled_for_ga", None)
        self.objective.undivided = says is None and getattr(trainer, "model_accepts_loss_kwargs", False)
        self.objective.processes = args.world_size if args.average_tokens_across_devices else 1
        if self.method.teacher not in ("self", None):
            teacher = self.method.teacher
            teacher = _merged(teacher) if isinstance(teacher, nn.Module) else teacher
            self.objective.teacher = find_teacher(teacher, self.inner, kwargs.get("processing_class"))
        elif self.method.teacher == "self" and state.global_step > dense:
            self.objective.teacher = load_teacher(run_folder(args), self.objective.teacher_number, self.inner.device)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        step, plan = state.global_step, self.method.schedule
        reshard(model)
        dense = plan.start("static", self.total)
        if step in (dense, plan.start("anneal", self.total)):
            # A phase of zero gradients has made Adam believe that any gradient is huge.
            for parameter in self.objective.parameters():
                optimizer.state.pop(parameter, None)
        if step == dense and self.method.teacher == "self":
            self.objective.teacher = dense_copy(_merged(model))
            if args.should_save:
                self.objective.teacher_number = save_teacher(self.objective.teacher, run_folder(args))
        self.objective.moment = self.method.schedule.at(step, self.total)
        # Fewer than usual in the last step of an epoch.
        now = getattr(calling_trainer(), "current_gradient_accumulation_steps", None)
        self.objective.accumulation = now or args.gradient_accumulation_steps
        self.objective.begin_step()
        self.ran = self.objective.called = False
        self.objective.measures_gap = args.logging_strategy == "steps" and (step + 1) % max(state.logging_steps, 1) == 0

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if scaler_of(optimizer) is not None:
            return  # it leaves out such a step, and must see all gradients to know it by
        if self.objective.drop_unsound_gradients() and not self.told:
            self.told = True
            logger.warning(
                f"The gradient of step {state.global_step + 1} is not finite. What decides about tokens and weights stays as it is "
                "in such a step. The weights are the Trainer's: with max_grad_norm (1.0 by default) one such step in fp32 or "
                "bf16 makes all of them NaN. Then resume from an earlier checkpoint, with a lower learning rate or without the "
                "batch at fault."
            )

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if self.ran and not self.objective.called:
            raise TrainingError(
                "This Trainer's compute_loss calls a part of the model (model.bert, say), or the model in evaluation mode: no gate "
                "was in force, and none would learn. Call model(...), in training mode, and compute the loss from its outputs: its "
                "logits, or with output_hidden_states=True what you need of its hidden states."
            )
        if args.world_size > 1 and self.method.cuts_weights and self.objective.wrapper is None:
            raise TrainingError(
                f"{type(self.method).__name__} cuts weights in mid-run, and several processes can only go on after that inside of "
                "torch's DistributedDataParallel, which does not wrap this model. Leave torch._dynamo's optimize_ddp as it is, or "
                "use one process."
            )
        now = self.objective.moment
        self.objective.close_gates()  # they hold the gradients' graph of the last forward
        self.objective.end_step()
        self.inner.token_pruner.evaluation = None
        if now.phase == "settle":
            return
        # What is evaluated and saved after this step is the model that the next step begins with.
        self.objective.moment = self.method.schedule.at(state.global_step, self.total)
        self.objective.harden()
        for parameter in self.objective.restarted():
            optimizer.state.pop(parameter, None)
        was_cut = self.objective.moment.phase != now.phase and self.objective.end_phase(now.phase, optimizer)
        if was_cut or self.objective.moment.phase == "settle":
            # A model that was better before it met the budget is none to come back to.
            _forget_best(state, lr_scheduler)
        self.objective.moment = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or self.objective is None or not is_token_pruned(self.inner):
            return
        evaluated = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), None)
        over = "total_flos" in logs  # the last log of a run, with its times
        if "loss" in logs:
            numbers = {**self.objective.state(), **self.objective.pop_log(), **self._pop_shares(True)}
        elif over:
            numbers = {f"train_{name}": value for name, value in self._reached(state.global_step).items()}
        elif evaluated is not None:
            numbers = {f"{evaluated}_{name}": value for name, value in self._pop_shares(False).items()}
        else:
            return
        if "loss" in logs or not (state.is_hyper_param_search and adds_up(calling_trainer())):
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
            if evaluated not in (None, "train"):
                if self.untrained:
                    self.unpruned.update(logs)
                history, metric = state.log_history, args.metric_for_best_model
                if evaluated.startswith("eval_"):
                    history, evaluated = _evaluation_that_counts(history, state.global_step, metric) or (history, evaluated)
                self._note_evaluation(args, history, evaluated)

    def on_evaluate(self, args, state, control, lr_scheduler=None, **kwargs):
        # As the budget tightens every metric gets worse: no reason to stop early or to lower the rate, and no model to come back to.
        if self.objective is not None and (phase := self.objective.moment.phase) != "settle":
            _forget_best(state, None if phase == "dense" else lr_scheduler)

    def on_predict(self, args, state, control, **kwargs):
        if self.objective is not None and is_token_pruned(self.inner):
            self._pop_shares(False)  # a prediction is no evaluation

    def on_train_end(self, args, state, control, **kwargs):
        self.objective.teacher = None
        loaded, best_spent = args.load_best_model_at_end and state.best_model_checkpoint, None
        if loaded:  # of the best evaluations only those count that were saved
            step = int(loaded.rpartition("-")[2])
            best = _evaluation_that_counts(state.log_history, step, args.metric_for_best_model)
            self.inner.token_pruner.evaluation = None
            if best is not None:
                self._note_evaluation(args, *best)
                best_spent = best[0][-1].get(f"{best[1]}_macs_realised")
        self.objective.end_run(self.reached, best_spent)
        if state.global_step < (end := self.method.schedule.start("settle", self.total)):
            logger.warning(
                f"Training ended at step {state.global_step}, before the budget was met: annealing goes on to step "
                f"{end} of {self.total}. The model spends more than was asked for. Let early "
                "stopping begin later."
            )

    def on_push_begin(self, args, state, control, **kwargs):
        if self.model is None or not state.is_world_process_zero:
            return
        if self.place is not None:
            self.inner.save_pretrained(Path(args.output_dir) / self.place)
        elif _adapters(self.model) is None:
            complete(self.inner, args.output_dir, state.global_step)

    def _steps_of_phases(self, steps):
        """How many steps phases are shared out over: of a resumed run that has another number now, the one it began with."""
        begun = self.objective.total or steps
        if begun == steps:
            return steps
        if steps <= (settles := self.method.schedule.start("settle", begun)):
            raise TrainingError(
                f"The run that is resumed was begun for {begun} steps, of which the last phase begins with step {settles}; now it "
                f"would end after {steps}, before its budget is met. Give it more steps, or begin a new run."
            )
        logger.warning(
            f"The run that is resumed was begun for {begun} steps and now has {steps}. Its phases end where they would have "
            "ended, and the last one takes what is left."
        )
        return begun

    def _reached(self, step):
        """What a finished run was asked for and has come to, on its training texts; nothing of one that ended too early."""
        self.objective.moment = self.method.schedule.at(step, self.total)  # where there is no settling it was the one before
        self.reached = _shares(self.settled, self.inner).get("macs_realised")
        return {} if self.reached is None else self.objective.reached(self.reached)

    def _note_evaluation(self, args, history, prefix):
        """Remember for the model card what the last entry of the log says about the model as it is."""
        dense = self.method.schedule.steps(self.total)["dense"] if self.total else 0
        metric, unpruned = args.metric_for_best_model, {} if dense else self.unpruned
        self.inner.token_pruner.evaluation = evaluation_of_log(history, prefix, metric, dense, unpruned)

    def _measure(self, pruner):
        self.ran = self.ran or torch.is_grad_enabled()  # not where a Trainer only looks at a batch
        self.meters[self.inner.training].update()
        if self.inner.training and self.settled is not None and self.objective.moment.phase == "settle":
            self.settled.update()

    def _pop_shares(self, training):
        meter, self.meters[training] = self.meters[training], CostMeter(self.inner)
        return _shares(meter, self.inner)


def _check_hidden(model, inner):
    """Raise `UnsupportedModelError` if hidden units are to be cut that something around a base model reads."""
    structure = inner.token_pruner.structure
    if model is not inner and inner.token_pruner.alone and structure is not None and "hidden" in structure.layout.parts:
        raise UnsupportedModelError(
            f"parts names 'hidden', but the hidden units of the {type(inner).__name__} are read by what is around it in this "
            f"{type(model).__name__} (pooling, a head, a loss), whose own sizes nobody would cut. Leave 'hidden' out: "
            "parts=('heads', 'units', 'blocks')."
        )


def _place(model, inner):
    """Where the encoder is in a module of the user's own (`bert`), of which the Trainer saves nothing but a state dict; None if the
    model is one that is saved by itself."""
    if _adapters(model) is not None or sentence_transformers.is_its(model):
        return None
    name = next(name for name, module in model.named_modules() if module is inner)
    return ".".join(part for part in name.split(".") if part != "_orig_mod") or None  # of torch.compile


def _adapters(model):
    """The module that knows of adapters, if the model has any."""
    has = hasattr(model, "peft_config") or hasattr(transformers_model(model), "peft_config")
    return import_module(".integrations.peft", __package__) if has else None


def _merged(model):
    """The transformers model in a model; a copy of it with the adapters merged, where it has any."""
    adapters = _adapters(model)
    return transformers_model(model) if adapters is None else adapters.merged(model)


@contextlib.contextmanager
def _as_it_was_if_refused(model):
    """A model that a method refuses is left as it came."""
    before, pruner = None, getattr(model, "token_pruner", None)
    if is_token_pruned(model):
        sites = [(int(layer), selector) for layer, selector in pruner.sites.items()]
        before = sites, pruner.protected_ids, model.config.token_pruning.get("method")
    try:
        yield
    except TokenPruneError:
        if getattr(model, "token_pruner", None) is not pruner:
            detach(model)
            if before is not None:
                attach(model, *before)
        raise


def _shares(meter, model):
    """What a `CostMeter` and those of all other processes say for the log: `macs_realised`, the share of the dense model's MACs that
    was spent, and `tokens_after_<layer>`, the share of the tokens that left each layer. Nothing if nobody has counted."""
    sums = [0.0] * (3 + model.token_pruner.layer_count)
    if meter.started:
        cost = meter.cost
        sums = [cost.spent, cost.dense, *(cost.sequences * n for n in (cost.tokens, *cost.tokens_per_layer))]
    spent, dense, entered, *left = total_of(sums, model.device)
    if not dense:
        return {}
    return {"macs_realised": spent / dense, **{f"tokens_after_{layer}": n / entered for layer, n in enumerate(left)}}


def _evaluation_that_counts(history, step, metric):
    """The log up to the evaluation of a step, and what its names begin with; None if there was none. Of several sets
    (`eval_<set>_...`) that one counts by whose `metric` the best model is chosen, or else the first."""
    found = {}
    for number, entry in enumerate(history, start=1):
        if entry.get("step") == step:
            timed = (name.removesuffix("_runtime") for name in entry if name.startswith("eval") and name.endswith("_runtime"))
            found |= dict.fromkeys(timed, number)
    if not found:
        return None
    metric = f"eval_{(metric or '').removeprefix('eval_')}"
    prefix = max((prefix for prefix in found if metric.startswith(f"{prefix}_")), key=len, default=next(iter(found)))
    return history[: found[prefix]], prefix


def _forget_best(state, scheduler=None):
    """Let the next evaluation be the best so far, for the Trainer and for a scheduler that goes by evaluations, if it does."""
    state.best_metric = state.best_model_checkpoint = state.best_global_step = None
    if hasattr(scheduler, "num_bad_epochs"):  # ReduceLROnPlateau, GreedyLR
        scheduler.best = math.inf if scheduler.mode == "min" else -math.inf
        scheduler.num_bad_epochs = 0
        if hasattr(scheduler, "num_good_epochs"):
            scheduler.num_good_epochs = 0
