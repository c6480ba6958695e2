"""What every method shares: a teacher, phases, an auxiliary loss that enters through the forward, numbers for the log.

A method is two classes. Its config (`ToP`, ...) is a dataclass of settings. Its objective is made from the config for one
model; it lives in `model.token_pruner.objective`, is called instead of the model's forward in training mode, and adds only
mathematics to this base: which gates stand in for the selectors, and which losses.
"""

from collections import defaultdict

import torch

from ..losses import logit_distillation, regression_distillation
from ..losses.carry import carry
from ..schedule import PHASES, Moment

LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")


class Objective:
    """Runs the training forwards of one model; see the module's docstring.

    Attributes:
        moment: the phase of the current step, set by the callback.
        teacher: a frozen packed model, or None.
        taught: the teacher's output in the current step, or None.
        accumulation: micro-batches per optimizer step.
        loss_scale: callable; what mixed precision multiplies the loss by before its backward.
        measures_gap: in the next forward, compare the soft model with the hard one.
    """

    def __init__(self, model, distill_weight):
        self.pruner = model.token_pruner
        self.distill_weight = distill_weight
        self.moment = Moment("dense", 0.0)
        self.teacher = None
        self.taught = None
        self.accumulation = 1
        self.loss_scale = lambda: 1.0
        self.measures_gap = False
        self._sums, self._counts = defaultdict(float), defaultdict(int)

    # What a method defines.

    def open_gates(self):
        """Put gates in the place of selectors (`pruner.soft`) for one forward of the anneal phase."""

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

    def target(self):
        """The share of MACs asked for at this moment."""
        return 1.0

    # What all methods do.

    @property
    def teacher_number(self):
        """Fingerprint of the run's own teacher, 0 if it has none."""
        return int(self.pruner.training_state.teacher)

    @teacher_number.setter
    def teacher_number(self, number):
        self.pruner.training_state.teacher.fill_(number)

    def state(self):
        """Where the run is, for the log."""
        return {"pruning_phase": PHASES.index(self.moment.phase), "macs_target": self.target()}

    def __call__(self, model, forward, args, kwargs):
        annealing = self.moment.phase == "anneal"
        self.pruner.soft = {}
        if annealing:
            self.open_gates()
        outputs = forward(*args, **kwargs)
        if self.moment.phase != "settle":
            self.observe()
        terms = {}
        # Gates get a gradient in every step of every phase, as distributed training wants.
        total = sum((0.0 * parameter.sum() for parameter in self.parameters()), torch.zeros((), device=model.device))
        if self.moment.phase != "dense":
            if self.teacher is not None:
                terms.update(self._distill(model, outputs, args, kwargs))
            terms.update(self.losses(model, kwargs))
            total = total + sum(terms.values())
        for name, value in terms.items():
            self.note(name, value)
        if self.measures_gap and annealing:
            self.note("soft_hard_gap", self._gap(model, forward, args, kwargs))
        self.taught = self.pruner.last_forward = None
        self.pruner.watched = frozenset()
        if self.teacher is not None:
            self.teacher.token_pruner.watched = frozenset()
        of_step = self._share_of_step(model, outputs, kwargs)
        if of_step is not None:
            return carry(outputs, total * of_step, has_loss=_has_loss(outputs, kwargs), share=self.loss_scale)
        # The Trainer divides the model's loss itself; a loss computed from other outputs is divided by nobody we can ask.
        return carry(outputs, total, has_loss=_has_loss(outputs, kwargs), share=lambda: self.loss_scale() / self.accumulation)

    def _share_of_step(self, model, outputs, kwargs):
        """What part of an optimizer step this micro-batch is, where that can be told: the Trainer gives `num_items_in_batch`,
        the number of labels in all micro-batches of the step, and then divides nothing itself."""
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is None:
            return None
        if labels is not None:
            return labels.ne(-100).sum() / items
        logits = outputs[0] if isinstance(outputs, tuple) else outputs.get("logits")
        if logits is None or logits.dim() != 2:
            return None
        labels = logits.numel() if model.config.problem_type == "multi_label_classification" else logits.shape[0]
        return labels / items

    def _distill(self, model, outputs, args, kwargs):
        seen = {name: value for name, value in kwargs.items() if name not in (*LABELS, "num_items_in_batch", "return_loss")}
        with torch.no_grad():
            taught = self.teacher(*args, **{**seen, "return_dict": True})
        self.taught = taught
        names = [name for name in taught if name.endswith("logits")] or ["last_hidden_state"]
        regression = _is_regression(model) or names == ["last_hidden_state"]
        total = 0.0
        for name in names:
            student = outputs[name] if not isinstance(outputs, tuple) else _find(outputs, taught[name])
            mask = _rows_that_count(taught[name], kwargs)
            if mask is not None:
                student, target = student[mask], taught[name][mask]
            else:
                target = taught[name]
            total = total + (regression_distillation if regression else logit_distillation)(student, target)
        return {"distillation": self.distill_weight * total / len(names)}

    def _gap(self, model, forward, args, kwargs):
        """How differently the soft (training) and the hard (inference) model judge this batch, without dropout: mean total
        variation distance of their class probabilities (regression: mean absolute difference)."""
        soft, watched, meter = self.pruner.soft, self.pruner.watched, self.pruner.meter
        modes = {module: module.training for module in model.modules()}
        seen = {name: value for name, value in kwargs.items() if name not in (*LABELS, "num_items_in_batch", "return_loss")}
        found = []
        try:
            model.eval()
            self.pruner.watched, self.pruner.meter = frozenset(), None
            with torch.no_grad():
                for gates in (soft, {}):
                    self.pruner.soft, self.pruner.soft_in_eval = gates, bool(gates)
                    outputs = forward(*args, **{**seen, "return_dict": True})
                    found.append(
                        next((outputs[n] for n in outputs if n.endswith("logits")), outputs[next(iter(outputs))]).float()
                    )
        finally:
            self.pruner.soft, self.pruner.soft_in_eval = soft, False
            self.pruner.watched, self.pruner.meter = watched, meter
            for module, mode in modes.items():
                module.training = mode
        if _is_regression(model):
            return (found[0] - found[1]).abs().mean().item()
        return (found[0].softmax(-1) - found[1].softmax(-1)).abs().sum(-1).mean().item() / 2

    # Numbers for the log.

    def note(self, name, value):
        """Remember a number or scalar tensor; the log shows its mean since the last log."""
        self._sums[name] += value.detach() if isinstance(value, torch.Tensor) else value
        self._counts[name] += 1

    def pop_log(self):
        """Means of all noted numbers since the last call."""
        means = {name: float(self._sums[name]) / self._counts[name] for name in self._sums}
        self._sums.clear()
        self._counts.clear()
        return means


def _is_regression(model):
    """As transformers decides it, which sets `problem_type` only once it has computed a loss."""
    kind = model.config.problem_type
    return kind == "regression" or (kind is None and model.config.num_labels == 1 and "Classification" in type(model).__name__)


def _has_loss(outputs, kwargs):
    if isinstance(outputs, tuple):
        given = any(kwargs.get(name) is not None for name in LABELS)
        return given and isinstance(outputs[0], torch.Tensor) and outputs[0].dim() == 0
    return outputs.get("loss") is not None


def _find(outputs, like):
    return next(x for x in outputs if isinstance(x, torch.Tensor) and x.shape == like.shape)


def _rows_that_count(tensor, kwargs):
    """Mask of rows to compare: labelled ones where labels are per token, else real tokens, else (per sample) all."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    rows = tensor.shape[:-1]
    if labels is not None and labels.shape == rows and (labels == -100).any():
        return labels != -100
    if mask is not None and mask.shape == rows and tensor.dim() > 2:
        return mask.bool()
    return None
