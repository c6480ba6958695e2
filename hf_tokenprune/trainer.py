"""What a callback is not told: the Trainer that calls it, the optimizer's groups, and when it evaluates or logs."""

import functools
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import default_compute_objective

from .cost import CostMeter
from .errors import TrainingError
from .sharding import has_engine


def adds_up(trainer):
    """Is this Trainer in a search whose objective adds up whatever was evaluated?"""
    return trainer is None or getattr(trainer, "compute_objective", None) in (None, default_compute_objective)


def count_evaluations_alone(trainer, callback):
    """What else the model is used for in evaluation mode is no part of `eval_macs_realised`."""
    loop = trainer.evaluation_loop

    @functools.wraps(loop)
    def evaluation_loop(*args, **kwargs):
        if callback.inner is not None:
            callback.meters[False] = CostMeter(callback.inner)
        return loop(*args, **kwargs)

    trainer.evaluation_loop = evaluation_loop


def note_labels(trainer, callback):
    """Where the loss is computed outside of the model, labels are taken from the batch before the model sees it."""
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def compute_loss(model, inputs, *args, **kwargs):
        if callback.objective is not None:
            callback.objective.labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss


def save_encoder_too(trainer, callback):
    """Where a Trainer writes the bare weights of a module of the user's own, write the encoder in it as a folder of its own, before
    them: no file of theirs says what was cut and what is dropped."""
    save = trainer.save_model

    @functools.wraps(save)
    def save_model(output_dir=None, *args, **kwargs):
        if callback.place is not None and trainer.args.should_save:
            callback.inner.save_pretrained(Path(output_dir or trainer.args.output_dir) / callback.place)
        return save(output_dir, *args, **kwargs)

    trainer.save_model = save_model


def forget_what_is_gone(optimizer, model, _incompatible_keys):
    """A checkpoint has been loaded that may be of a model from which layers have been cut: an optimizer that was made for the whole
    model holds what is left of it, like the one whose state is loaded next."""
    left = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in left]


def run_folder(args):
    """Where the Trainer keeps a run's checkpoints: each trial of a hyperparameter search has a folder of its own."""
    trainer = calling_trainer()
    return args.output_dir if trainer is None else trainer._get_output_dir(getattr(trainer, "_trial", None))


def check_checkpointing(model):
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or not isinstance(function, functools.partial):
            continue
        if function.keywords.get("use_reentrant", True):  # torch's default; transformers says False where it is given nothing
            raise TrainingError(
                "Gradient checkpointing with use_reentrant=True, torch's default, cuts the gates off from their gradient. Say "
                'activation_checkpointing_kwargs={"use_reentrant": False}.'
            )


def group_of(optimizer, *parameters, given):
    """The optimizer's group that holds the gates, or if it holds none of them, the next of these lists of parameters. `given`: the
    user has made the optimizer, not the Trainer.

    Raises:
        TrainingError: it holds none of them, or they are frozen.
    """
    if not any(parameter.requires_grad for some in parameters for parameter in some):
        raise TrainingError(
            "The gates are frozen (requires_grad=False), so they would never learn. Freeze parameters before the model is given to a "
            "Trainer with the callback, or leave out those with 'token_pruner.' in their names."
        )
    if has_engine(optimizer):  # it has copied them
        return optimizer.param_groups[0]
    wanted = [{id(parameter) for parameter in some} for some in parameters]
    held = [group for some in wanted for group in optimizer.param_groups if some & {id(p) for p in group["params"]}]
    if not held:
        raise TrainingError(
            "The optimizer was made before the gates existed, or leaves them out, so it would never train them. Call "
            "callback.attach(model) before you make it, and give it the parameters with 'token_pruner.' in their names, too."
            if given
            else "The optimizer that this Trainer makes leaves out the gates, so it would never train them: its groups go by name. "
            "Add one: {'params': [p for name, p in model.named_parameters() if 'token_pruner.' in name]}."
        )
    return held[0]


def loss_scale(optimizer):
    """What mixed precision in fp16 multiplies the loss by; 1 otherwise."""
    scaler = scaler_of(optimizer)
    return 1.0 if scaler is None else scaler.get_scale()


def scaler_of(optimizer):
    """The `GradScaler` of mixed precision in fp16, or None."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def calling_trainer():
    from transformers import Trainer  # inference has no need of it

    return _calling(Trainer)


def _calling(kind):
    """The nearest object of a kind that is running a method right now in which the caller was called, or None. Callbacks are not
    told which Trainer, or which handler, calls them."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def log_first(callback):
    """Move a callback to the front of the Trainer's list, so that what it adds to the logs reaches TensorBoard, W&B and all others.

    The list is found in the handler that is calling right now; where it is another kind of handler, the order stays.
    """
    handler = _calling(CallbackHandler)
    if handler is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
