"""The phases of a training run, as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from .errors import ConfigError

PHASES = ("dense", "anneal", "settle")


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
        anneal: gates are learned while the budget tightens.
        settle: the selection is fixed and the weights get used to it, exactly as at inference.

    Raises:
        ConfigError: a share is negative or not finite, or there is no annealing.

    Example:
        >>> Schedule(dense=1, anneal=2, settle=1).at(step=30, total=40)
        Moment(phase='settle', progress=0.0)
    """

    dense: float = 1.0
    anneal: float = 1.5
    settle: float = 1.5

    def __post_init__(self):
        for name in PHASES:
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise ConfigError(f"Schedule({name}={share!r}): a phase's share is a number, 0 or more.")
        if self.anneal == 0:
            raise ConfigError("Schedule(anneal=0): without annealing nothing is learned about which tokens to drop.")

    def ends(self, total):
        """`(dense, anneal)`: the steps at which these phases end; settling ends at `total`. Annealing has one step or more."""
        whole = self.dense + self.anneal + self.settle
        dense = min(round(total * self.dense / whole), max(total - 1, 0))
        anneal = round(total * (self.dense + self.anneal) / whole)
        return dense, max(anneal, dense + 1)

    def at(self, step, total):
        """The `Moment` of step `step` (from 0) in a run of `total` steps."""
        dense, anneal = self.ends(total)
        if step < dense:
            return Moment("dense", step / dense)
        if step < anneal:
            return Moment("anneal", (step - dense) / (anneal - dense))
        return Moment("settle", (step - anneal) / max(total - anneal, 1))


def ramp(progress, start, end, *, warm=1.0):
    """From `start` to `end`, linearly over the first `warm` of the way, then constant."""
    return start + (end - start) * min(progress / warm, 1.0)
