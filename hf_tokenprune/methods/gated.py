"""What the methods with budgeted gates share: the settings they have in common, and the objective that runs the gates."""

import math
import os
from dataclasses import asdict, astuple, dataclass, field

from torch import nn
from transformers.utils import logging

from ..budget import Lengths
from ..cost import layer_costs
from ..errors import ConfigError, TrainingError
from ..processes import total_of
from ..schedule import Schedule
from .base import Objective
from .layers import LayerDistillation

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class GatedMethod:
    """What the configs of all gated methods share; see `ToP` for the arguments.

    Attributes:
        name: in `config.token_pruning`.
        option: on the command line.
        title: for people.
        papers: their arXiv numbers.
        needs_budget: does it do nothing without one?
        cuts_weights: does it cut weights out of the model in training, at the end of a phase?
    """

    name = option = title = ""
    papers = ()
    needs_budget = True
    cuts_weights = False

    target_macs: float | None = None
    teacher: object = "self"
    distill_weight: float = 1.0
    layer_weight: float = 1.0
    constraint: str = "projected"
    gate_lr: float | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        if self.target_macs is not None and (not is_number(self.target_macs) or not 0 < self.target_macs < 1):
            self.refuse("target_macs", "a share of the dense model's MACs, above 0 and below 1")
        if self.constraint not in ("projected", "lagrangian"):
            self.refuse("constraint", '"projected" or "lagrangian"')
        if self.gate_lr is not None and (not is_number(self.gate_lr) or self.gate_lr <= 0):
            self.refuse("gate_lr", "a number above 0, or None")
        self.check_weights("distill_weight", "layer_weight")
        check_teacher(self)
        self.check_schedule()

    def check_schedule(self):
        """Raise ConfigError about a schedule that this method cannot follow."""
        check_schedule(self)

    def refuse(self, name, allowed):
        """Raise ConfigError about one setting."""
        raise ConfigError(f"{type(self).__name__}({name}={getattr(self, name)!r}): {allowed}.")

    def check_weights(self, *names):
        """Weights of losses are numbers, 0 or more."""
        for name in names:
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                self.refuse(name, "a number, 0 or more")

    def layer_distillation(self, model, state, *, matched):
        """The layer-wise distillation as a list of one helper, or of none if it has no weight."""
        return [LayerDistillation(model, state, self.layer_weight, matched)] if self.layer_weight > 0 else []

    def settings(self):
        """The settings as plain values, for `config.token_pruning`."""
        teacher = self.teacher
        if isinstance(teacher, nn.Module):
            teacher = type(teacher).__name__
        elif teacher is not None:
            teacher = os.path.basename(str(teacher))
        fields = {key: getattr(self, key) for key in self.__dataclass_fields__}
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        return {"name": self.name, **fields, "teacher": teacher, "schedule": asdict(self.schedule)}

    def need_target(self):
        """Raise ConfigError if no budget was given."""
        if self.target_macs is None:
            raise ConfigError(f"{type(self).__name__} needs a budget: {type(self).__name__}(target_macs=0.4), for instance.")


def is_number(value):
    """Is this a finite number?"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_teacher(method):
    """A teacher is "self", a folder or Hub id, a model, or None."""
    if method.teacher == "" or not isinstance(method.teacher, (str, os.PathLike, nn.Module, type(None))):
        method.refuse("teacher", '"self", a folder or Hub id, a model, or None')


def check_schedule(method, static=False):
    """A schedule is one, and has a static phase only where a method knows what to do in it."""
    if not isinstance(method.schedule, Schedule):
        method.refuse("schedule", "a hf_tokenprune.Schedule")
    if method.schedule.static and not static:
        method.refuse("schedule", "a Schedule without a static phase, which is InforCoef's")


class GatedObjective(Objective):
    """Trains a model with budgeted gates.

    Args:
        model: the model, attached.
        config: the method's config.
        gates: its `BudgetedGates`, which are in force in the phase `phase`.
        helpers: `Helper`s that add losses.
    """

    def __init__(self, model, config, gates, *, helpers=(), phase="anneal"):
        super().__init__(model, config.distill_weight)
        self.config, self.gates, self.helpers, self.gated_phase = config, gates, helpers, phase
        self.pruner.training_state = gates.state
        self.told = self.told_idle = False
        self.observed = [0] * 6

    def start_run(self, learning_rate, steps):
        """Begin anew. `steps` of each phase by name."""
        if self.gates.state.sizes is not None and self.pruner.structure is None:
            raise TrainingError(
                "The weights have been cut since this run's gates were made. To train on, load the saved model and give it to a new "
                "Trainer with a new callback."
            )
        self.gates.start_run(learning_rate, steps[self.gated_phase])
        for helper in self.helpers:
            helper.start_run()
        self.told = self.told_idle = False

    def parameters(self):
        return [*self.pruner.training_state.parameters(), *self.pruner.sites.parameters()]

    def target(self):
        if self.moment.phase == "dense":
            return 1.0
        self._tell_time()
        return self.gates.target()

    def _tell_time(self):
        self.gates.progress = self.moment.progress if self.moment.phase == self.gated_phase else 1.0
        self.gates.loss_scale, self.gates.forgets = self.loss_scale, self.forgets

    def prepare(self):
        for helper in self.helpers:
            helper.prepare(self)

    def open_gates(self):
        if self.moment.phase == self.gated_phase:
            self._tell_time()
            self.gates.open()

    def close_gates(self):
        self.gates.close()

    def lengths(self):
        """`Lengths` of the batch that has just run."""
        counts = self.pruner.guarded
        return Lengths.of(self.pruner.trace[0].arrived, self.gates.budget.protected if counts is None else counts)

    def observe(self):
        seen = self.lengths()
        self.observed = [a + b for a, b in zip(self.observed, astuple(seen), strict=True)]

    def begin_step(self):
        if self.moment.phase == self.gated_phase:
            self._tell_time()
            self.gates.begin_step()

    def end_step(self):
        if self.moment.phase != "settle":
            counts = self.gates.state.lengths
            counts += counts.new_tensor(total_of(self.observed, counts.device))
            self.observed = [0] * 6
        if self.moment.phase == self.gated_phase:
            self.gates.end_step()

    def restarted(self):
        if self.gates.restarted:
            self.gates.restarted = False
            return [self.gates.state.log_odds]
        return []

    def losses(self, model, kwargs):
        terms = self.gates.losses(self.lengths(), self.note) if self.moment.phase == self.gated_phase else {}
        for helper in self.helpers:
            terms.update(helper.losses(self))
        return terms

    def harden(self):
        if self.moment.phase not in ("dense", self.gated_phase, "settle"):
            return
        self._tell_time()
        if self.moment.phase != "settle":
            self._tell_if_idle()
        spent = self.gates.harden(gated=self.moment.phase != "dense")
        if self.moment.phase != "dense" and spent > self.gates.target() + 1e-5 and not self.told:
            self.told = True
            self.tell_out_of_reach(spent)

    def reached(self, spent):
        if self.gates.cost == "macs":
            return super().reached(spent)
        left = self.gates.budget.parameters(layer_costs(self.model))
        return {**super().reached(spent), "params_realised": left}

    STILL = 0.01  # of the way that gates may go, at which to say that they did not
    MISSED = 0.05  # what is spent above the target, as a share of it, at which to say so

    def end_run(self, spent, best_spent=None):
        if self.gates.cost == "macs" and spent is not None and spent > (1 + self.MISSED) * (target := self.gates.final):
            logger.warning(
                f"The model spends {spent:.3f} of the dense model's MACs on its training texts, more than the {target:g} asked "
                f"for.{''.join(part.if_missed for part in self.gates.parts)}"
            )
        if spent is not None and not self.told_idle and self.gates.everything() > self.gates.final:
            self._tell_if_still()

    def _tell_if_still(self):
        """Say so if the optimizer did not move the gates, which rely on steps about as large as its learning rate."""
        moved = (self.gates.learned() - self.gates.state.start.cpu()).abs().max().item()
        steps = self.steps[self.gated_phase]
        free = steps - (math.ceil(self.gates.MEASURE * steps) if self.gates.measured else 0)
        meant = min(self.gates.rate(steps) * free, self.gates.WAY)
        if moved < self.STILL * meant:
            logger.warning(
                f"The gates have hardly moved: the furthest by {moved:.2g} in {free} steps, in which they may go {meant:.2g}. "
                "They move at gate_lr where the optimizer's steps are about its learning rate, as Adam's are. A schedule that sets "
                "the rate itself belongs over an optimizer with lr=<its highest rate>; with another optimizer, raise gate_lr."
            )

    def _tell_if_idle(self):
        """Say so if there is nothing to do, as soon as the length of some texts is known."""
        gates = self.gates
        if self.told_idle or not gates.on_host.of(gates.state.lengths)[0]:
            return
        spent = gates.everything()
        if spent <= gates.final:
            self.told_idle = True
            self.tell_idle(
                f"={gates.final:g} is met already: with everything left, this model has {spent:.3f} of the dense model's "
                + (
                    "MACs to do on texts like these, once it is packed."
                    if gates.cost == "macs"
                    else "parameters in its layers."
                )
            )

    def tell_idle(self, met):
        """Say that there is nothing to do; `met` says what is met, from the equals sign on."""
        logger.warning(f"{type(self.config).__name__}: target_{self.gates.cost}{met} Nothing will go. Ask for less.")

    def tell_out_of_reach(self, spent):
        """The texts are too short, or the model too small, for the target: say so."""
