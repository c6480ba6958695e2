"""The phases of a training run, as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .errors import ConfigError

PHASES = ("dense", "static", "anneal", "settle")
GATED_PHASES = ("static", "anneal")


class Moment(NamedTuple):
    """Where a run is: its phase, and how far that phase has come (0 at its first step, 1 after its last)."""

    phase: str
    progress: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the steps of one `trainer.train()` are shared out. Only the proportions count: `(1, 2, 1)` in a run of four epochs
    is one dense epoch, two of annealing and one of settling.

    Args:
        dense: ordinary fine-tuning, nothing is dropped. 0 for a model that is fine-tuned already.
        static: weights are cut first, where a method does that (`InforCoef`).
        anneal: gates are learned while the budget tightens.
        settle: the selection is fixed and the weights get used to it, exactly as at inference.

    Raises:
        ConfigError: a share is negative or not finite, or there is no annealing.

    Example:
        >>> Schedule(dense=1, anneal=2, settle=1).at(step=30, total=40)
        Moment(phase='settle', progress=0.0)
    """

    dense: float = 1.0
    static: float = 0.0
    anneal: float = 1.5
    settle: float = 1.5

    def __post_init__(self):
        for name in PHASES:
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise ConfigError(f"Schedule({name}={share!r}): a phase's share is a number, 0 or more.")
        if self.anneal == 0:
            raise ConfigError("Schedule(anneal=0): without annealing nothing is learned about which tokens to drop.")

    def steps(self, total):
        """By phase, how many of `total` steps it has. Annealing has one or more."""
        whole = self.dense + self.static + self.anneal + self.settle
        dense = min(round(total * self.dense / whole), max(total - 1, 0))
        static = min(round(total * (self.dense + self.static) / whole), max(total - 1, 0))
        anneal = max(round(total * (self.dense + self.static + self.anneal) / whole), static + 1)
        return {"dense": dense, "static": static - dense, "anneal": anneal - static, "settle": max(total - anneal, 0)}

    def at(self, step, total):
        """The `Moment` of step `step` (from 0) in a run of `total` steps."""
        begun = 0
        for phase, steps in self.steps(total).items():
            if step < begun + steps:
                return Moment(phase, (step - begun) / steps)
            begun += steps
        return Moment("settle", 1.0)

    def start(self, phase, total):
        """The step with which a phase begins."""
        steps = self.steps(total)
        return sum(steps[earlier] for earlier in PHASES[: PHASES.index(phase)])


def ramp(progress, start, end, *, warm=1.0):
    """From `start` to `end`, linearly over the first `warm` of the way, then constant."""
    return start + (end - start) * min(progress / warm, 1.0)
