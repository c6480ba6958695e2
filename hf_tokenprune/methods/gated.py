"""Hard-concrete gates, on tokens or weights or both, held to one budget.

A method says what is gated by a list of `Part`s. `BudgetedGates` learns all their gates under one expected cost;
`GatedObjective` runs them in training.
"""

import math
import os
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from ..budget import Lengths
from ..errors import ConfigError, TrainingError
from ..gates import keep_probability, sample_hard_concrete, scale_rate
from ..losses import lagrangian
from ..modeling.shapes import cut_parameter, sizes_of
from ..schedule import Schedule, ramp
from .base import Objective
from .layers import LayerDistillation


@dataclass(frozen=True, kw_only=True)
class GatedMethod:
    """What the configs of all gated methods share; see `ToP` for the arguments."""

    single_process = False  # several processes at a time cannot train it yet

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


def plain_settings(method, name):
    """A method's settings as plain values, for `config.token_pruning`."""
    teacher = method.teacher
    if isinstance(teacher, nn.Module):
        teacher = type(teacher).__name__
    elif teacher is not None:
        teacher = os.path.basename(str(teacher))
    fields = {key: getattr(method, key) for key in method.__dataclass_fields__}
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {"name": name, **fields, "teacher": teacher, "schedule": asdict(method.schedule)}


class Outlook:
    """What is expected to be left: of the tokens at each site, of each layer's weights.

    Attributes:
        kept: by site, the share of its droppable tokens that survive.
        shapes: a `LayerShape` per layer, or None if weights are not gated.
        alive: by layer, how far its attention is there (1 = it is); a site without attention cannot rank and keeps all.
    """

    def __init__(self):
        self.kept, self.shapes, self.alive = {}, None, {}


class Part:
    """Something that is gated. `size` gates, at `shifted` of which the budget may push."""

    size: int
    cuts_weights = False

    def start(self):
        """`(size,)` log-odds with which the gates start."""
        raise NotImplementedError

    def shifted(self):
        """`(size,)` bool: the gates that move with the budget."""
        return torch.ones(self.size, dtype=torch.bool)

    def scores(self, probability):
        """From the probabilities that gates are open, how probable it is that each thing gated by them is kept."""
        return probability

    def tie_break(self):
        """A little to add to the scores where equal ones have an order all the same."""
        return 0.0

    def worth(self):
        """What to add to the logarithm of measured information: how much more a thing is worth by the time its turn comes."""
        return torch.zeros(self.size)

    def choose(self, scores, level):
        """`(scores,)` bool: what is kept if all is to be kept whose score reaches a level."""
        return scores >= level

    def expect(self, scores, outlook):
        """Enter into the outlook what is left if each thing is kept with these probabilities."""
        raise NotImplementedError

    def open(self, gates, alive):
        """Put sampled gates in force for one forward. Returns what `Outlook.alive` says of them."""
        raise NotImplementedError

    def close(self):
        """Take them out of force."""

    def harden(self, kept, alive):
        """Put in force, for evaluation, what is kept: `(scores,)` bool. Returns as `open`."""
        raise NotImplementedError


class Gates(nn.Module):
    """Everything of a gated method that is learned or counted besides the weights; saved in every checkpoint.

    The parameters start at 0: a gate's log-odds are `start + scale * parameter`.
    """

    def __init__(self, count, sizes):
        super().__init__()
        self.log_odds = nn.Parameter(torch.zeros(count))
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.register_buffer("start", torch.zeros(count))
        self.register_buffer("information", torch.zeros(count))
        self.register_buffer("lengths", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("teacher", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("sizes", None if sizes is None else torch.tensor(_flat(sizes)))  # what is left of the weights
        self.register_parameter("transform", None)  # of layer-wise distillation: student's hidden units to the teacher's

    def cut_hidden(self, index, on_cut=None):
        """The model's hidden units are cut down to those at `index`."""
        if self.transform is not None:
            cut_parameter(self.transform, 1, index, on_cut)


class BudgetedGates:
    """Learns the gates of several parts under one budget.

    "projected" holds the expected cost exactly: in each step all gates are shifted by what meets the target, and what would
    change the cost is taken from their gradient. They get steeper towards the end, so that the soft model ends as the hard one.
    Weights have no order to start in as ranks of tokens have. So in the first steps, while all gates are 1, their Fisher
    information is measured (squared gradients of the loss, summed over batches: how much the loss would rise without the part,
    as in Kwon et al. 2022, arXiv 2204.09656), and the gates start in the order of information per MAC. At the
    optimum of separable losses that is what decides, whatever the part is: so one budget shares itself out among tokens,
    heads, units and blocks.

    Args:
        model: the model, attached.
        parts: the `Part`s, weights before tokens.
        budget: the `Budget`.
        target: the share of cost to end at.
        constraint: "projected" or "lagrangian".
        gate_lr: see `ToP`.
        measured: measure information first.
        cost: "macs", or "params" of the layers.
    """

    STEEPEST = 4.0  # "projected": by how much log-odds are multiplied at the end
    MEASURE = 0.15  # the part of the phase in which information is measured
    PER_NEPER = 2.0  # log-odds per factor e of information per cost
    FARTHEST = 12.0  # log-odds of a gate at most, at first

    def __init__(self, model, parts, budget, *, target, constraint, gate_lr, measured, cost="macs"):
        self.parts, self.budget = parts, budget
        self.final, self.constraint, self.gate_lr, self.cost = target, constraint, gate_lr, cost
        self.projected = constraint == "projected"
        self.measured = measured and self.projected
        self.sizes = [part.size for part in parts]
        cuts = any(part.cuts_weights for part in parts)
        self.state = Gates(sum(self.sizes), sizes_of(model) if cuts else None).to(model.device)
        self.restarted = False
        self.shifted = torch.cat([torch.zeros(0, dtype=torch.bool), *(part.shifted() for part in parts)])
        self.now = None  # log-odds of the running forward, None while nothing is gated softly
        self.progress = 0.0
        self.loss_scale = lambda: 1.0

    def start_run(self, learning_rate, steps):
        """Begin anew: gates at their start, moving `gate_lr` per step, from the optimizer's own learning rate."""
        with torch.no_grad():
            for parameter in self.state.parameters():
                parameter.zero_()
            self.state.start.copy_(torch.cat([torch.zeros(0), *(part.start() for part in self.parts)]))
            self.state.information.zero_()
            self.state.lengths.zero_()
        rate = self.gate_lr if self.gate_lr is not None else min(max(20 / max(steps, 1), 0.01), 0.2)
        self.state.scale.fill_(rate / learning_rate)

    # The budget.

    def seen(self):
        """`Lengths` of the training texts so far; of one text of 100 tokens before the first."""
        seen = self.state.lengths.tolist()
        return Lengths(*seen) if seen[0] else Lengths(1, 100, 10_000)

    def share(self, scores, lengths=None):
        """The share of the dense model's cost that is spent if things are kept with these probabilities."""
        outlook = Outlook()
        for part, piece in zip(self.parts, scores, strict=True):
            part.expect(piece, outlook)
        if self.cost == "params":
            return self.budget.parameters(outlook.shapes)
        kept = [outlook.kept.get(site, 1.0) for site in self.budget.sites]
        alive = [outlook.alive.get(site, 1.0) for site in self.budget.sites]
        kept = [1 - a * (1 - k) for a, k in zip(alive, kept, strict=True)]
        return self.budget.share(kept, lengths or self.seen(), outlook.shapes)

    def scores(self, probability):
        """Per part, the probabilities that things are kept."""
        return [part.scores(piece) for part, piece in zip(self.parts, probability.split(self.sizes), strict=True)]

    def everything(self):
        """The share that is spent while every gate is open."""
        return float(self.share(self.scores(torch.ones(sum(self.sizes)))))

    def least(self):
        """The smallest share that these gates can bring the model down to, on the texts seen."""
        nothing = self.scores(torch.zeros(sum(self.sizes)))
        kept = [part.choose(piece, float("inf")) for part, piece in zip(self.parts, nothing, strict=True)]
        return float(self.share([piece.double() for piece in kept]))

    @property
    def measuring(self):
        """Is information being measured, so that everything is open?"""
        return self.measured and self.progress < self.MEASURE

    def _way(self):
        begun = self.MEASURE if self.measured else 0.0
        return max(self.progress - begun, 0.0) / (1 - begun)

    def target(self):
        """The share that the gates are held to at this moment."""
        return max(ramp(self._way(), self.everything(), self.final, warm=0.8), self.final)

    # The gates as they stand.

    def learned(self):
        """`(gates,)` log-odds as the optimizer moves them."""
        return self.state.start + scale_rate(self.state.log_odds, self.state.scale)

    def log_alpha(self):
        """`(gates,)` learned log-odds; if they are projected, steeper and shifted onto the target."""
        log_alpha = self.learned()
        if not self.projected:
            return log_alpha
        steeper = ramp(self._way(), 1.0, self.STEEPEST)
        shifted = self.shifted.to(log_alpha.device)
        return steeper * (log_alpha + shifted * self._shift(log_alpha.detach().cpu(), steeper))

    def _shift(self, log_alpha, steeper):
        """What to add to the shifted gates so that the expected share is the target: by bisection."""
        target, lengths = self.target(), self.seen()
        low, high = -100.0, 100.0
        for _ in range(32):
            middle = (low + high) / 2
            probability = keep_probability(steeper * (log_alpha + self.shifted * middle))
            if float(self.share(self.scores(probability), lengths)) > target:
                high = middle
            else:
                low = middle
        return low

    def open(self):
        """Put gates in force for one forward in training."""
        if self.measuring:
            self.now = None
            gates = torch.ones_like(self.state.start, requires_grad=True)
            gates.register_hook(self._measure)
        else:
            self._start_in_order()
            self.now = log_alpha = self.log_alpha()
            if self.projected and log_alpha.requires_grad:
                log_alpha.register_hook(self._along_budget(log_alpha.detach()))
            gates = sample_hard_concrete(log_alpha)
        alive = {}
        for part, piece in zip(self.parts, gates.split(self.sizes), strict=True):
            alive = part.open(piece, alive) or alive

    def close(self):
        """Take them out of force."""
        self.now = None
        for part in self.parts:
            part.close()

    def _measure(self, gradient):
        gradient = gradient.detach() / self.loss_scale()
        if torch.isfinite(gradient).all():
            self.state.information += gradient.square()

    def _start_in_order(self):
        """Once information has been measured: let the gates start in the order of information per cost."""
        if not self.measured or not self.state.information.any():
            return
        with torch.enable_grad():
            ones = torch.ones(sum(self.sizes), requires_grad=True)
            (saved,) = torch.autograd.grad(self.share(self.scores(ones)), ones)
        information = self.state.information.cpu()
        matters = self.shifted & (saved > 0)
        gain = (information + 1e-12 * information.max()).log() - saved.clamp(min=1e-20).log()
        gain = gain + torch.cat([part.worth() for part in self.parts])
        gain = self.PER_NEPER * (gain - gain[matters].median())
        near = gain.clamp(-self.FARTHEST, self.FARTHEST)
        start = torch.where(matters, near + 0.01 * (gain - near), self.state.start.cpu())  # so that no two are the same
        with torch.no_grad():
            self.state.start.copy_(start)
            self.state.information.zero_()
        self.restarted = True

    def _along_budget(self, log_alpha):
        """A hook that takes from a gradient its part that would change the expected share."""
        with torch.enable_grad():
            log_alpha.requires_grad_()
            share = self.share(self.scores(keep_probability(log_alpha)))
            (normal,) = torch.autograd.grad(share, log_alpha)
        length = (normal * normal).sum().clamp(min=1e-20)
        return lambda gradient: gradient - (gradient * normal).sum() / length * normal

    def losses(self, lengths, note):
        """Terms of the loss after a forward on texts of these `Lengths`."""
        if self.now is None:
            return {}
        expected = self.share(self.scores(keep_probability(self.now)), lengths)
        note("macs_expected" if self.cost == "macs" else "params_expected", expected)
        if self.projected:
            return {}
        first, second = (scale_rate(self.state.multipliers, self.state.scale)).unbind()
        return {"lagrangian": lagrangian(expected, self.target(), first, second)}

    # The hard model.

    def harden(self, gated):
        """Keep what is most probably kept, as much as the target allows on texts as long as those seen so far. The hard model thus
        spends the target, whatever the probabilities add up to.

        Args:
            gated: False keeps everything.

        Returns:
            The share that the hard model spends.
        """
        with torch.no_grad():
            if not gated or self.measuring:
                kept = [scores.bool() for scores in self.scores(torch.ones(sum(self.sizes)))]
            else:
                self._start_in_order()
                kept = self._most_probable(keep_probability(self.log_alpha()).cpu())
            alive = {}
            for part, piece in zip(self.parts, kept, strict=True):
                alive = part.harden(piece, alive) or alive
            return float(self.share([piece.double() for piece in kept]))

    def _most_probable(self, probability):
        scores = [s.double() + part.tie_break() for s, part in zip(self.scores(probability), self.parts, strict=True)]
        levels = torch.cat(scores).unique().tolist()  # ascending: the higher the level, the less is kept
        lengths, target = self.seen(), self.target()

        def kept(level):
            return [part.choose(piece, level) for part, piece in zip(self.parts, scores, strict=True)]

        low, high = 0, len(levels)
        while low < high:
            middle = (low + high) // 2
            if float(self.share([piece.double() for piece in kept(levels[middle])], lengths)) <= target:
                high = middle
            else:
                low = middle + 1
        return kept(levels[low] if low < len(levels) else float("inf"))


class GatedObjective(Objective):
    """Trains a model with budgeted gates.

    Args:
        model: the model, attached.
        config: the method's config.
        gates: its `BudgetedGates`, which are in force in the phase `phase`.
        helpers: objects with `start_run()`, `prepare(objective)` before a forward, and `losses(objective)` after it.
    """

    def __init__(self, model, config, gates, *, helpers=(), phase="anneal"):
        super().__init__(model, config.distill_weight)
        self.config, self.gates, self.helpers, self.gated_phase = config, gates, helpers, phase
        self.pruner.training_state = gates.state
        self.told = False

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
        self.told = False

    def target(self):
        if self.moment.phase == "dense":
            return 1.0
        self._tell_time()
        return self.gates.target()

    def _tell_time(self):
        self.gates.progress = self.moment.progress if self.moment.phase == self.gated_phase else 1.0
        self.gates.loss_scale = self.loss_scale

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
        return Lengths.of(self.pruner.trace[0].arrived, self.gates.budget.protected)

    def observe(self):
        seen = self.lengths()
        counts = self.gates.state.lengths
        counts += counts.new_tensor([seen.samples, seen.droppable, seen.squares])

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
        spent = self.gates.harden(gated=self.moment.phase != "dense")
        if self.moment.phase != "dense" and spent > self.gates.target() + 1e-5 and not self.told:
            self.told = True
            self.tell_out_of_reach(spent)

    def tell_out_of_reach(self, spent):
        """The texts are too short, or the model too small, for the target: say so."""


def _flat(sizes):
    hidden, heads, units = sizes
    return [hidden, *heads, *units]
