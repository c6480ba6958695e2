"""What every method shares: a teacher, phases, an auxiliary loss that enters through the forward, numbers for the log.

A method is two classes. Its config (`ToP`, ...) is a dataclass of settings. Its objective is made from the config for one
model; it lives in `model.token_pruner.objective`, is called instead of the model's forward in training mode, and adds only
mathematics to this base: which gates stand in for the selectors, and which losses.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers.utils import logging

from ..losses import logit_distillation, regression_distillation
from ..losses.carry import carry
from ..processes import of_all, whole, wrapper_now
from ..schedule import GATED_PHASES, PHASES, Moment
from .outputs import apart, is_separate, nothing_labelled, rows_that_count, without_labels, zero_of

logger = logging.get_logger(__name__)


class Helper:
    """Adds losses to an objective, beside its own."""

    def start_run(self):
        """Begin anew."""

    def prepare(self, objective):
        """Say what to watch in the next forward."""

    def losses(self, objective):
        """`{name: scalar tensor}` after a forward."""
        return {}


@dataclass
class Forwards:
    """The training forwards of one micro-batch: there are several where a loss compares embeddings.

    Attributes:
        count: how many there are so far.
        ahead: they ran without gradients, and run again with them in the backward pass (losses with a gradient cache).
        done: a backward pass has gone through them.
    """

    count: int = 0
    ahead: bool = False
    done: bool = False


class Objective:
    """Runs the training forwards of one model; see the module's docstring.

    A loss that compares embeddings needs several forwards in one step (anchor, positive, negative). Each has its own auxiliary
    loss, on its own texts; they count by their mean, as one forward over all texts would.

    Attributes:
        moment: the phase of the current step, set by the callback.
        steps: how many steps each phase has, by name.
        teacher: a frozen packed model, or None.
        taught: the teacher's output in the current step, or None.
        outputs: the model's own output in the current step, or None.
        accumulation: micro-batches per optimizer step.
        processes: how many share out the labels that `num_items_in_batch` counts.
        labels: those of the running micro-batch as the Trainer has them, or None: where somebody else computes the loss, the model
            does not see them.
        undivided: the Trainer takes for granted that a loss is divided by the labels of the whole step, and divides none itself.
        loss_scale: callable; what mixed precision multiplies the loss by before its backward.
        measures_gap: in the next forward, compare the soft model with the hard one.
        sharded: FSDP2 or DeepSpeed has the parameters.
        forgets: what the optimizer remembers of `restarted()` parameters can be dropped.
        wrapper: the `DistributedDataParallel` that called the latest forward, or None.
        forwards: the `Forwards` of the running micro-batch.
        called: it has run a forward in the current step.
        readout: what the model's outputs are read for, where the model itself does not know: a callable that makes embeddings
            `(B, ...)` of them, which are then distilled; or None.
        traced: a callable `(objective, taught)` that looks at the gradients of the teacher's output and takes them from it; or None.
    """

    def __init__(self, model, distill_weight):
        self.model = model
        self.pruner = model.token_pruner
        self.pruner.objective = self
        self.distill_weight = distill_weight
        self.moment = Moment("dense", 0.0)
        self.steps = dict.fromkeys(PHASES, 0)
        self.teacher = None
        self.taught = self.outputs = None
        self.accumulation = self.processes = 1
        self.labels, self.undivided = None, False
        self.loss_scale = lambda: 1.0
        self.measures_gap = False
        self.wrapper, self.sharded, self.forgets = None, False, True
        self.told_kind = False
        self.forwards, self.called = Forwards(), False
        self.readout = None
        self.traced = None
        self._sums, self._counts = defaultdict(float), defaultdict(int)

    # What a method defines.

    def start_run(self, learning_rate, steps):
        """Begin anew, with the optimizer's learning rate and the number of steps of each phase by name."""

    def prepare(self):
        """Say what to watch in the next forward (`pruner.watched`, `pruner.remembers`), after the dense phase."""

    def open_gates(self):
        """Put gates in the place of selectors (`pruner.soft`), or on the weights, for one forward after the dense phase."""

    def close_gates(self):
        """Take them away when training is over or the phase has ended."""

    def begin_step(self):
        """An optimizer step begins, before any forward: a loss that runs each forward twice, with the same random numbers
        (gradient caching), must not find that the first time some more were drawn."""

    def end_step(self):
        """An optimizer step is over: bring together what all micro-batches and processes have seen in it."""

    def reached(self, spent):
        """What a settled run was asked for and has come to, for its last log. `spent`: the share of the dense model's MACs."""
        return {**self._asked(), "macs_realised": spent}

    def end_run(self, spent, best_spent=None):
        """Training is over: say what went wrong. `spent`: as `reached` was told, or None if it never settled. `best_spent`: what the
        best model spent in its evaluation, if that one was loaded and it is known."""

    def end_phase(self, phase, optimizer):
        """A phase has ended with its last step. Returns True if the weights were cut."""

    def restarted(self):
        """Parameters that begin anew after this step, so that what the optimizer remembers of them is of no use."""
        return []

    def observe(self):
        """Look at the lengths of a training batch; runs in the dense and the anneal phase."""

    def losses(self, model, kwargs):
        """The method's own auxiliary losses after a forward: `{name: scalar tensor}`."""
        return {}

    def harden(self):
        """Write what the gates have learned so far into the selectors."""

    def parameters(self):
        """Parameters that the method trains."""
        return self.pruner.training_state.parameters()

    def drop_unsound_gradients(self):
        """Let the optimizer pass over the method's parameters in a step whose gradient is not finite: they would be NaN for good.

        Returns:
            True if this is such a step.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not gradients or torch.stack([whole(gradient.isfinite().all()) for gradient in gradients]).all():
            return False
        for parameter in self.parameters():
            parameter.grad = None
        return True

    def target(self):
        """The share of MACs (or of what `cost` says) asked for at this moment."""
        return 1.0

    cost = "macs"

    # What all methods do.

    def _count_forward(self):
        """A training forward begins."""
        recorded = torch.is_grad_enabled()
        if self.forwards.done and not (self.forwards.ahead and recorded):
            self.forwards = Forwards()
        now = self.forwards
        if not recorded:
            now.ahead = True
        if not (now.ahead and recorded):
            now.count += 1

    @property
    def teacher_number(self):
        """Fingerprint of the run's own teacher, 0 if it has none."""
        return int(self.pruner.training_state.teacher)

    @teacher_number.setter
    def teacher_number(self, number):
        self.pruner.training_state.teacher.fill_(number)

    @property
    def total(self):
        """Steps of the run as it was begun, 0 if it never was."""
        return int(self.pruner.training_state.total)

    @total.setter
    def total(self, steps):
        self.pruner.training_state.total.fill_(steps)

    def state(self):
        """Where the run is, for the log."""
        return {"pruning_phase": PHASES.index(self.moment.phase), **self._asked()}

    def _asked(self):
        target = self.target()
        return {} if target is None else {f"{self.cost}_target": target}

    def __call__(self, model, forward, args, kwargs):
        self._begin()
        seen = {**kwargs, "return_dict": True}
        seen.pop("num_items_in_batch", None)
        return self._finish(model, forward, forward(*args, **seen), args, kwargs, seen)

    # torch.compile compiles the forward that lies between these two.

    @torch.compiler.disable
    def _begin(self):
        self.wrapper, self.called = wrapper_now(), True
        self._count_forward()
        self.pruner.soft = {}
        if self.moment.phase != "dense":
            self.prepare()
            self.open_gates()

    @torch.compiler.disable
    def _finish(self, model, forward, outputs, args, kwargs, seen):
        wants_tuple = kwargs.get("return_dict", model.config.return_dict) is False
        if not torch.is_grad_enabled():  # only the outputs are wanted
            self._forget()
            return outputs.to_tuple() if wants_tuple else outputs
        self.outputs = outputs
        if self.moment.phase != "settle":
            self.observe()
        terms = {}
        # Gates get a gradient in every step of every phase, as distributed training wants.
        total = sum((0.0 * parameter.sum() for parameter in self.parameters()), torch.zeros((), device=model.device))
        if self.moment.phase != "dense":
            if self.teacher is not None:
                terms.update(self._distill(model, outputs, args, seen))
            terms.update(self.losses(model, seen))
            total = total + sum(terms.values())
        for name, value in terms.items():
            self.note(name, value)
        if self.measures_gap and self.moment.phase in GATED_PHASES:
            self.measures_gap = False
            self.note("soft_hard_gap", self._gap(model, forward, args, seen))
        self._forget()
        outputs = self._carry(model, outputs, total, kwargs)
        return outputs.to_tuple() if wants_tuple else outputs

    def _forget(self):
        self.taught = self.outputs = None
        for pruner in (self.pruner, *([] if self.teacher is None else [self.teacher.token_pruner])):
            pruner.last_forward, pruner.watched = None, frozenset()
            pruner.differentiable = pruner.remembers = False

    def _carry(self, model, outputs, total, kwargs):
        """Send the auxiliary loss along, scaled like the main loss under gradient accumulation."""
        loss, forwards = outputs.get("loss"), self.forwards
        if total.requires_grad:
            total.register_hook(lambda _: setattr(forwards, "done", True))
        of_step = self._share_of_step(kwargs)
        if of_step is None:
            self._tell_if_undivided(kwargs)
            # The Trainer divides the model's loss itself; one computed from other outputs is divided by nobody we can ask.
            scale = lambda: self.loss_scale() / (self.accumulation * forwards.count)  # noqa: E731
            return carry(outputs, total, has_loss=loss is not None, share=scale, sharded=self.sharded)
        if loss is not None:
            # Many heads of transformers ignore `num_items_in_batch`. A mean, times its part of the labels, is what it asks for; the
            # mean of none is NaN, and so would be its gradient.
            outputs["loss"] = zero_of(outputs) if nothing_labelled(kwargs.get("labels")) else loss * of_step
        scale = self.loss_scale if loss is not None else lambda: self.loss_scale() * self.processes
        return carry(outputs, total * of_step, has_loss=loss is not None, share=scale, sharded=self.sharded)

    def _share_of_step(self, kwargs):
        """What part of an optimizer step this micro-batch is, where that can be told: the Trainer gives `num_items_in_batch`,
        the number of labels in all micro-batches of the step, and then divides nothing itself."""
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        labels = self.labels if labels is None else labels
        if items is None or not isinstance(labels, torch.Tensor):
            return None
        return labels.ne(-100).sum() / torch.as_tensor(items).clamp(min=1)  # a whole step may have none

    def _tell_if_undivided(self, kwargs):
        """Say so if the main loss may weigh as much as there are micro-batches more than ours: its Trainer has counted the labels of
        the whole step, but did not let the model know."""
        uncounted = isinstance(self.labels, torch.Tensor) and kwargs.get("num_items_in_batch") is None
        if self.undivided and uncounted and self.accumulation > 1:
            self.undivided = False
            logger.warning(
                "This Trainer's compute_loss passes no num_items_in_batch to the model. If its loss is a mean over one micro-batch, "
                f"the Trainer adds up {self.accumulation} undivided, and the losses of pruning weigh that much less: set "
                "loss_is_scaled_for_ga = False in the Trainer's class. If it is divided by num_items_in_batch already, set True."
            )

    def _tell_if_unknown(self, model):
        """Say so if nobody says whether these logits are one class of many, or several judgements: the model sees no labels."""
        several = isinstance(self.labels, torch.Tensor) and self.labels.is_floating_point() and self.labels.dim() > 1
        if self.told_kind or not several or model.config.problem_type is not None or model.config.num_labels == 1:
            return
        self.told_kind = True
        logger.warning(
            f"The labels are {self.labels.shape[-1]} numbers a sample, and as the loss is not the model's, its config does not say "
            'what its logits mean. They are distilled as one class of many. Set model.config.problem_type: "regression" or '
            '"multi_label_classification" where each is judged by itself, "single_label_classification" for soft labels.'
        )

    def _distill(self, model, outputs, args, kwargs):
        with torch.set_grad_enabled(self.traced is not None):
            taught = self.teacher(*args, **without_labels(kwargs))
        if self.traced is not None:
            self.traced(self, taught)
        self.taught = taught
        if self.readout is not None:
            student, target = self.readout(outputs), self.readout(taught)
            if student.shape != target.shape:  # hidden units were cut: texts can still be as alike as they were
                student, target = (functional.cosine_similarity(x[:, None], x[None], dim=-1) for x in (student, target))
            return {"distillation": self.distill_weight * apart(student, target)}
        names = [name for name in taught if name.endswith("logits")]
        loss = regression_distillation if is_separate(model) else logit_distillation
        if not names:  # a base model: nobody knows yet what its hidden states are for
            names, loss = ["last_hidden_state"], apart
            if outputs.last_hidden_state.shape != taught.last_hidden_state.shape:  # hidden units were cut
                return {}
        else:
            self._tell_if_unknown(model)
        total = 0.0
        for name in names:
            student, target = outputs[name], taught[name]
            if student.dim() < target.dim():  # ModernBERT's `sparse_prediction`: logits of labelled tokens only
                target = target[kwargs["labels"].ne(model.sparse_pred_ignore_index)]
            mask = rows_that_count(target, kwargs)
            if mask is not None:
                student, target = student[mask], target[mask]
            total = total + loss(student, target)
        return {"distillation": self.distill_weight * total / len(names)}

    def _gap(self, model, forward, args, kwargs):
        """How differently the soft (training) and the hard (inference) model judge this batch, without dropout: mean total
        variation distance of their class probabilities (regression, several labels: mean absolute difference of the logits;
        without logits: mean square of the difference, relative to the hard model's own)."""
        pruner = self.pruner
        soft, watched, remembers, meter = pruner.soft, pruner.watched, pruner.remembers, pruner.meter
        modes = {module: module.training for module in model.modules()}
        found = []
        try:
            model.eval()
            pruner.watched, pruner.remembers, pruner.meter = frozenset(), False, None
            with torch.no_grad():
                for gates in (soft, {}):
                    pruner.soft, pruner.soft_in_eval = gates, gates is soft
                    outputs = forward(*args, **without_labels(kwargs))
                    name = next((name for name in outputs if name.endswith("logits")), None)
                    read = outputs[name or "last_hidden_state"] if self.readout is None else self.readout(outputs)
                    found.append(read.float())
        finally:
            pruner.soft, pruner.soft_in_eval = soft, False
            pruner.watched, pruner.remembers, pruner.meter = watched, remembers, meter
            for module, mode in modes.items():
                module.training = mode
        if self.readout is not None or name is None:
            return apart(*found).item()
        if is_separate(model):
            return (found[0] - found[1]).abs().mean().item()
        return (found[0].softmax(-1) - found[1].softmax(-1)).abs().sum(-1).mean().item() / 2

    # Numbers for the log.

    def note(self, name, value):
        """Remember a number or scalar tensor; the log shows its mean since the last log."""
        self._sums[name] += value.detach() if isinstance(value, torch.Tensor) else value
        self._counts[name] += 1

    def pop_log(self):
        """Means of all noted numbers since the last call, over all processes."""
        noted = of_all({name: (float(self._sums[name]), self._counts[name]) for name in self._sums})
        self._sums.clear()
        self._counts.clear()
        names = dict.fromkeys(name for numbers in noted for name in numbers)  # some may not have noted all
        pairs = {name: [numbers[name] for numbers in noted if name in numbers] for name in names}
        return {name: sum(total for total, _ in found) / sum(count for _, count in found) for name, found in pairs.items()}
