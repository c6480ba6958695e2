"""Infor-Coef: cut weights, then a token sampler before every layer (Tan 2023, arXiv 2305.12458)."""

from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..budget import Budget
from ..cost import trace_macs
from ..errors import ConfigError
from ..losses import information_norm, negative_entropy
from ..modeling.modeling_token_pruned import attach, is_token_pruned
from ..modeling.selection import Skim
from ..processes import total_of
from ..schedule import Schedule, ramp
from .budgeted import BudgetedGates
from .gated import GatedMethod, check_schedule, is_number
from .samplers import Foresight, SamplingCost, SoftSkim
from .structured import StructuredObjective, StructuredPruning, WeightGates

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class InforCoef(GatedMethod):
    """Cut weights out, then learn samplers that look at each token before each layer and drop it or not.

    Static stage: `StructuredPruning` down to `static_macs`, in the schedule's static phase; at its end the weights are cut.
    Dynamic stage: before each layer a small network says from a token's hidden state whether it stays; sampled by Gumbel-softmax
    with a straight-through gradient in training, the more probable at inference. A dropped token stays dropped; padding is never
    seen, the first token never dropped. The loss gets `norm_weight` times the mean over layers of the norm of (hidden
    state x keep probability), the paper's bound of the information that passes, and `entropy_weight` times the mean negative
    entropy of the keep probability.

    The paper has no budget for the tokens: what is saved is what the coefficients happen to give. Here `target_macs` may be
    asked for. The logit of keeping then gets one offset. In each step it goes a part of the way to where what would be kept at
    inference spends the target, which tightens linearly over four fifths of the annealing; while settling it follows slowly.
    So the target is met about, not exactly.

    Under a budget, a sampler that cannot tell tokens apart can only drop all or none. So samplers first learn to foresee the
    attention that each token will receive in their layer, while everything is kept: in the static phase, or in the first fifth of
    the annealing. And their logits then count four times in sampling: with the paper's noise, samplers that have learned to foresee
    drop about one token in ten before each layer at random, and the model is taught by what it says without them. The norm and
    entropy terms see the keep probability without that factor.

    Args:
        target_macs: MACs to spend on the real tokens, as a share of the dense model's, weights and tokens together; None = what
            the coefficients give.
        static_macs: share of the dense model's MACs to spend after the static stage; None = weights stay as they are, for a model
            that was cut already.
        norm_weight: weight of the norm term. The norm is divided by the root of the hidden size, so that the term is about the
            share of tokens kept.
        entropy_weight: weight of the entropy term.
        width: units of a sampler's network.
        parts: of the static stage, as for `StructuredPruning`.
        teacher, distill_weight, layer_weight, constraint, gate_lr: as for `ToP`.
        schedule: by default `Schedule(dense=1, static=2, anneal=0.75, settle=2.25)`: weights that were cut want time to recover more
            than samplers want it to learn. Without `static_macs`, `Schedule(dense=1, anneal=1.5, settle=1)`.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> InforCoef(static_macs=0.5, target_macs=0.25).schedule.static
        2
    """

    name, option, title, papers = "infor_coef", "infor-coef", "Infor-Coef", ("2305.12458",)
    needs_budget = False

    static_macs: float | None = 0.4
    norm_weight: float = 0.1
    entropy_weight: float = 0.01
    width: int = 16
    parts: tuple[str, ...] | None = None
    schedule: Schedule | None = None

    def __post_init__(self):
        if self.schedule is None:
            alone = self.static_macs is None
            plan = Schedule(dense=1, anneal=1.5, settle=1) if alone else Schedule(dense=1, static=2, anneal=0.75, settle=2.25)
            object.__setattr__(self, "schedule", plan)
        super().__post_init__()
        if self.static_macs is not None and (not is_number(self.static_macs) or not 0 < self.static_macs < 1):
            self.refuse("static_macs", "a share of the dense model's MACs, above 0 and below 1, or None")
        if self.static_macs is not None and self.target_macs is not None and self.target_macs >= self.static_macs:
            self.refuse(
                "target_macs",
                f"less than static_macs={self.static_macs}, which cutting weights alone reaches; set that to more, too, or to None",
            )
        if bool(self.schedule.static) != (self.static_macs is not None):
            self.refuse(
                "schedule",
                "weights are cut in a static phase, and static_macs says down to what. Give both, e.g. Schedule(static=2, ...) and "
                "static_macs=0.4 (its default), or neither: static_macs=None",
            )
        self.check_weights("norm_weight", "entropy_weight")
        if type(self.width) is not int or not 1 <= self.width <= 10_000:
            self.refuse("width", "a whole number from 1 to 10000")
        self._static()

    @property
    def cuts_weights(self):
        """Is there a static stage?"""
        return self.static_macs is not None

    def check_schedule(self):
        check_schedule(self, static=True)

    def _static(self):
        return StructuredPruning(target_macs=self.static_macs or 0.5, parts=self.parts)

    def attach(self, model):
        """Pack the model, put a sampler before every layer, and gates on its weights.

        Returns:
            The `Objective` that trains them.

        Raises:
            UnsupportedModelError: the weights of this family cannot be cut.
            ConfigError: the model drops tokens already by other selectors.
        """
        old = dict(model.token_pruner.sites.items()) if is_token_pruned(model) else {}
        if not all(isinstance(selector, Skim) for selector in old.values()):
            raise ConfigError("This model drops tokens already. InforCoef starts from one that does not, or from its own.")
        static = self._static()
        if not old:
            static.prepare(model, self.settings())
        pruner = model.token_pruner
        samplers = {layer: old.get(str(layer)) or Skim(pruner.hidden_size, self.width) for layer in range(pruner.layer_count)}
        attach(model, samplers, pruner.protected_ids, method=self.settings())
        weights = [] if self.static_macs is None else [WeightGates(model, static.layout(model))]
        gates = BudgetedGates(
            model, weights, Budget(model, sites=[]),
            target=self.static_macs, constraint=self.constraint, gate_lr=self.gate_lr,
        )  # fmt: skip
        helpers = [*self.layer_distillation(model, gates.state, matched=bool(weights)), Foresight()]
        return InforCoefObjective(model, self, gates, helpers=helpers)


class InforCoefObjective(StructuredObjective):
    """See `InforCoef`."""

    FORESEES = 0.2  # the part of the annealing in which samplers only learn to foresee, where there is no static phase
    SHARP = 4.0  # under a budget, by how much logits outweigh the noise of sampling

    def __init__(self, model, config, gates, helpers):
        super().__init__(model, config, gates, helpers=helpers, phase="static")
        self.looks = {}
        self.moves = []  # how far each micro-batch of the step would move the offset
        self.spent = None  # the share of MACs that the latest batches of the settle phase spent

    @property
    def foresees(self):
        """Do samplers only look on?"""
        if self.config.target_macs is None:
            return False
        if self.gates.parts:
            return self.moment.phase == "static"
        return self.moment.phase == "anneal" and self.moment.progress < self.FORESEES

    def samplers(self):
        """The samplers by layer."""
        return {int(layer): sampler for layer, sampler in self.pruner.sites.items()}

    def start_run(self, learning_rate, steps):
        super().start_run(learning_rate, steps)
        self._set_offset(float("inf"))

    def _offset(self):
        """The offset that all samplers have."""
        return next(iter(self.samplers().values())).offset_value()

    def _set_offset(self, value):
        for sampler in self.samplers().values():
            sampler.offset.fill_(value)

    def target(self):
        if self.moment.phase == "dense":
            return 1.0
        if self.moment.phase == "static":
            return super().target()
        final = self.config.target_macs
        if final is None:
            return None
        progress = self.moment.progress if self.moment.phase == "anneal" else 1.0
        if not self.gates.parts:
            progress = max(progress - self.FORESEES, 0.0) / (1 - self.FORESEES)
        return max(ramp(progress, self.config.static_macs or self.gates.everything(), final, warm=0.8), final)

    def open_gates(self):
        super().open_gates()
        self.looks = {}
        if self.moment.phase == "anneal" and not self.foresees:
            samplers = self.samplers()
            if self._offset() == float("inf"):
                self._set_offset(0.0)
            sharp = 1.0 if self.config.target_macs is None else self.SHARP
            one_each = not self.pruner.family.summary_tokens
            self.looks = {layer: SoftSkim(sampler, sharp, one_each) for layer, sampler in samplers.items()}
            self.pruner.soft = dict(self.looks)

    def close_gates(self):
        super().close_gates()
        self.looks, self.pruner.soft = {}, {}

    def losses(self, model, kwargs):
        terms = super().losses(model, kwargs)
        if self.moment.phase == "settle" and self.config.target_macs is not None:
            self._hold_budget()
        if not self.looks:
            return terms
        norms, entropies = [], []
        for look in self.looks.values():
            free = look.alive & ~look.protected
            keep = torch.sigmoid(look.logits[free, 1] - look.logits[free, 0])
            norms.append(information_norm(look.states[free], keep))
            entropies.append(negative_entropy(keep))
        terms["information_norm"] = self.config.norm_weight * torch.stack(norms).mean()
        terms["negative_entropy"] = self.config.entropy_weight * torch.stack(entropies).mean()
        if self.config.target_macs is not None:
            self._meet_budget()
        return terms

    # Each as it is in a long phase, its most, and in how many steps it must be able to get anywhere.
    FORGETS = 0.2, 1.0, 5  # how much of the offset is that of the latest batch
    HOLDS = 0.5, 1.5, 40  # log-odds by which the offset moves while settling, per share of MACs spent too much or too little
    MISSED = 0.1  # what is spent above the target, as a share of it, at which to say so

    def _rate(self, rate):
        usual, most, steps = rate
        return min(max(usual, steps / max(self.steps[self.moment.phase], 1)), most)

    def _meet_budget(self):
        """Move the offset towards the one at which this batch would spend the target at inference."""
        cost = SamplingCost(self.model, self.gates.budget.dense_costs, self.looks)
        if not (cost.margins > float("-inf")).all():  # the forward came out NaN, or overflowed
            return
        solved = cost.offset_for(self.target())
        least = cost.share(-cost.FARTHEST)
        if least > self.config.target_macs and not self.told:
            self.told = True
            logger.warning(
                f"InforCoef(target_macs={self.config.target_macs}) cannot be reached on texts like these: with nothing but protected "
                f"tokens left, {least:.3f} of the dense model's MACs are spent. Cut more weights: static_macs."
            )
        now = self._offset()
        self.moves.append(self._rate(self.FORGETS) * (solved - now))
        self.note("macs_expected", cost.share(now))

    def _hold_budget(self):
        """While settling the weights go on moving, and with them what the samplers see: the offset follows, slowly."""
        if not all(x.isfinite().all() for x in self.outputs.values() if isinstance(x, torch.Tensor)):
            return  # who has survived says nothing then
        lengths = self.pruner.trace[0].arrived
        dense = sum(cost.whole(lengths) for cost in self.gates.budget.dense_costs)
        spent = sum(trace_macs(self.model)) / dense
        self.moves.append(-self._rate(self.HOLDS) * (spent - self.config.target_macs))
        self.spent = spent if self.spent is None else 0.8 * self.spent + 0.2 * spent

    def end_run(self, spent, best_spent=None):
        target, now, who = self.config.target_macs, self.spent, "the last batches"
        if best_spent is not None:  # while settling the offset moves: not every checkpoint spends the same
            now, who = best_spent, "the best model, which was loaded,"
        if target is not None and now is not None and now > (1 + self.MISSED) * target:
            logger.warning(
                f"InforCoef(target_macs={target}) was missed: {who} spent {now:.3f} of the dense model's MACs. The "
                f"samplers had {self.steps['anneal']} steps to learn in, and {self.steps['settle']} to settle: train for longer, or "
                "let static_macs be nearer to the target."
            )

    def end_step(self):
        super().end_step()
        if self.config.target_macs is None:
            return
        # A process whose batches came out NaN has no moves, but is waited for.
        moved, batches = total_of([sum(self.moves), len(self.moves)], self.model.device)
        self.moves = []
        if batches:
            self._set_offset(self._offset() + moved / batches)

    def harden(self):
        if self.moment.phase in ("dense", "static"):
            if self.gates.parts:
                super().harden()
            self._set_offset(float("inf"))

    def tell_idle(self, met):
        logger.warning(f"InforCoef: static_macs{met} The static phase will cut nothing.")

    def end_phase(self, phase, optimizer):
        if phase == "static" and self.pruner.structure is not None:
            self.gates.progress = 1.0
            self.gates.harden(gated=True)
            return super().end_phase(phase, optimizer)
        return False
