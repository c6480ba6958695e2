"""Hard-concrete gates, on tokens or weights or both, held to one budget.

What is gated is a list of `Part`s, which know what their gates mean; `BudgetedGates` learns them all under one expected cost.
"""

import torch
from torch import nn

from ..budget import Lengths
from ..gates import keep_log_odds, keep_probability, sample_hard_concrete, scale_rate
from ..losses import lagrangian
from ..modeling.cutting import cut_parameter
from ..modeling.selection import OnHost
from ..modeling.sizes import sizes_of
from ..processes import agreed, mean_of, whole
from ..schedule import ramp
from .parts import Outlook


class Gates(nn.Module):
    """Everything of a gated method that is learned or counted besides the weights; saved in every checkpoint.

    The parameters start at 0: a gate's log-odds are `start + scale * parameter`.
    """

    def __init__(self, count, sizes):
        super().__init__()
        self.log_odds = nn.Parameter(torch.zeros(count), requires_grad=count > 0)  # FSDP2 cannot reduce an empty gradient
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.register_buffer("start", torch.zeros(count))
        self.register_buffer("information", torch.zeros(count))
        self.register_buffer("lengths", torch.zeros(6, dtype=torch.int64))
        self.register_buffer("teacher", torch.tensor(0))
        self.register_buffer("total", torch.tensor(0))  # steps of the run as it was begun: where its phases end
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
    In the first steps, while all gates are 1, their Fisher information is measured (squared gradients of the loss, summed over
    batches: how much the loss would rise without the part, as in Kwon et al. 2022, arXiv 2204.09656), and the gates start in the
    order of information per MAC. At the optimum of separable losses that is what decides, whatever the part is: so one budget
    shares itself out among layers, and among tokens, heads, units and blocks. Training then goes on, and what it makes up for is
    worth less than that (`Part.worth`, `Part.lasting`).

    Args:
        model: the model, attached.
        parts: the `Part`s, weights before tokens.
        budget: the `Budget`.
        target: the share of cost to end at.
        constraint: "projected" or "lagrangian".
        gate_lr: see `ToP`.
        cost: "macs", or "params" of the layers.
    """

    STEEPEST = 4.0  # "projected": by how much log-odds are multiplied at the end
    WAY = 20.0  # log-odds that a gate may go in a phase
    MEASURE = 0.15  # the part of the phase in which information is measured
    PER_NEPER = 2.0  # log-odds per factor e of information per cost
    FARTHEST = 12.0  # log-odds of a gate at most, at first
    TRIED, ROUNDS = 16, 8  # to find the shift: values tried at once, and how often

    def __init__(self, model, parts, budget, *, target, constraint, gate_lr, cost="macs"):
        self.parts, self.budget = parts, budget
        self.final, self.constraint, self.gate_lr, self.cost = target, constraint, gate_lr, cost
        self.projected = constraint == "projected"
        self.sizes = [part.size for part in parts]
        cuts = any(part.cuts_weights for part in parts)
        self.state = Gates(sum(self.sizes), sizes_of(model) if cuts else None).to(model.device)
        self.restarted = False
        self.shifted = torch.cat([torch.zeros(0, dtype=torch.bool), *(part.shifted() for part in parts)])
        self.on_host, self.found = OnHost(), OnHost()
        self.now = None  # log-odds of the running forward, None while nothing is gated softly
        self.noise = None  # of the running step: all its micro-batches and processes draw the same gates
        self.gradient = None  # of the running step, with respect to gates that are all 1
        self.progress = 0.0
        self.solved = None, None  # what the latest shift was solved for, and the shift
        self.loss_scale = lambda: 1.0
        self.forgets = True  # the optimizer can forget the gates as they were while information was measured

    def start_run(self, learning_rate, steps):
        """Begin anew: gates at their start, moving `gate_lr` per step, from the optimizer's own learning rate."""
        with torch.no_grad():
            for parameter in self.state.parameters():
                parameter.zero_()
            self.state.start.copy_(torch.cat([torch.zeros(0), *(part.start() for part in self.parts)]))
            self.state.information.zero_()
            self.state.lengths.zero_()
        self.state.scale.fill_(self.rate(steps) / learning_rate)

    def rate(self, steps):
        """By how much log-odds are to move per step of a phase of so many."""
        return self.gate_lr if self.gate_lr is not None else min(max(self.WAY / max(steps, 1), 0.01), 0.2)

    # The budget.

    def seen(self):
        """`Lengths` of the training texts so far; of one text of 100 tokens before the first."""
        seen = self.on_host.of(self.state.lengths)
        return Lengths(*seen) if seen[0] else Lengths.of([100 + self.budget.protected], self.budget.protected)

    def share(self, scores, lengths=None):
        """The share of the dense model's cost that is spent if things are kept with these probabilities."""
        outlook = Outlook()
        for part, piece in zip(self.parts, scores, strict=True):
            part.expect(piece, outlook)
        if self.cost == "params":
            return self.budget.parameters(outlook.costs)
        kept = [outlook.kept.get(site, 1.0) for site in self.budget.sites]
        alive = [outlook.alive.get(site, 1.0) for site in self.budget.sites]
        kept = [1 - a * (1 - k) for a, k in zip(alive, kept, strict=True)]
        return self.budget.share(kept, lengths or self.seen(), outlook.costs)

    def scores(self, probability):
        """Per part, the probabilities that things are kept."""
        return [part.scores(piece) for part, piece in zip(self.parts, probability.split(self.sizes, dim=-1), strict=True)]

    def everything(self):
        """The share that is spent while every gate is open."""
        return float(self.share(self.scores(torch.ones(sum(self.sizes)))))

    def least(self):
        """The smallest share that these gates can bring the model down to, on the texts seen."""
        nothing = self.scores(torch.zeros(sum(self.sizes)))
        kept = [part.choose(piece, float("inf")) for part, piece in zip(self.parts, nothing, strict=True)]
        return float(self.share([piece.double() for piece in kept]))

    @property
    def measured(self):
        """Is information measured before the gates start?"""
        return self.projected and bool(self.parts) and self.forgets

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
        """`(gates,)` log-odds as the optimizer moves them; on the CPU, where so few numbers are at home."""
        return (self.state.start + scale_rate(whole(self.state.log_odds), self.state.scale)).cpu()

    def log_alpha(self):
        """`(gates,)` learned log-odds; if they are projected, steeper and shifted onto the target."""
        log_alpha = self.learned()
        if not self.projected:
            return log_alpha
        steeper = ramp(self._way(), 1.0, self.STEEPEST)
        return steeper * (log_alpha + self.shifted * self._shift(log_alpha.detach(), steeper))

    def _shift(self, log_alpha, steeper):
        """What to add to the shifted gates so that the expected share is the target: by bisection, into `TRIED` parts at a time. All
        forwards of a step ask the same, and so has whoever made the hard model after the step before."""
        target, lengths = self.target(), self.seen()
        known, shift = self.solved
        if known is not None and known[1:] == (steeper, target, lengths) and torch.equal(known[0], log_alpha):
            return shift
        low, high = -100.0, 100.0
        for _ in range(self.ROUNDS):
            tried = torch.linspace(low, high, self.TRIED)
            probability = keep_probability(steeper * (log_alpha + self.shifted * tried[:, None]))
            share = torch.as_tensor(self.share(self.scores(probability), lengths))
            fits = int((share <= target).sum())  # the first so many: the share grows with the shift
            low, high = tried[max(fits - 1, 0)].item(), tried[min(fits, self.TRIED - 1)].item()
        self.solved = (log_alpha.clone(), steeper, target, lengths), low
        return low

    def begin_step(self):
        """Draw the noise of an optimizer step."""
        self.noise = None if self.measuring else agreed(torch.rand_like(self.state.start)).cpu()

    def open(self):
        """Put gates in force for one forward in training."""
        if self.measuring:
            self.now = None
            gates = torch.ones_like(self.state.start, requires_grad=True)
            gates.register_hook(self._measure)
            if self.gradient is None:
                self.gradient = torch.zeros_like(gates)
        else:
            self._start_in_order()
            self.now = log_alpha = self.log_alpha()
            if self.projected and log_alpha.requires_grad:
                log_alpha.register_hook(self._along_budget(log_alpha.detach()))
            if self.noise is None:  # nobody has said that a step begins
                self.begin_step()
            gates = sample_hard_concrete(log_alpha, noise=self.noise).to(self.state.start.device)
        alive = {}
        for part, piece in zip(self.parts, gates.split(self.sizes), strict=True):
            alive = part.open(piece, alive) or alive

    def close(self):
        """Take them out of force."""
        self.now = None
        for part in self.parts:
            part.close()

    def end_step(self):
        """An optimizer step is over. What was measured is the gradient of its whole batch."""
        self.noise = None
        if self.gradient is not None:
            gradient, self.gradient = mean_of(self.gradient), None
            information = self.state.information + gradient.square()
            if information.isfinite().all():
                self.state.information.copy_(information)

    def _measure(self, gradient):
        self.gradient += gradient.detach() / self.loss_scale()

    def _start_in_order(self):
        """Once information has been measured: let the gates start in the order of information per cost."""
        if not self.measured or not any(self.found.of(self.state.information)):
            return
        with torch.enable_grad():
            ones = torch.ones(sum(self.sizes), requires_grad=True)
            (saved,) = torch.autograd.grad(self.share(self.scores(ones)), ones)
        pieces = self.state.information.cpu().split(self.sizes)
        information = torch.cat([part.even_out(piece) for part, piece in zip(self.parts, pieces, strict=True)])
        matters = self.shifted & (saved > 0)
        gain = (information + 1e-12 * information.max()).log() - saved.clamp(min=1e-20).log()
        gain = gain + torch.cat([part.worth() for part in self.parts])
        gain = self.PER_NEPER * (gain - gain[matters].median())
        near = gain.clamp(-self.FARTHEST, self.FARTHEST)
        ahead = self.PER_NEPER * torch.cat([torch.full((part.size,), part.lasting) for part in self.parts])
        start = near + 0.01 * (gain - near) + ahead - ahead[matters].median()  # so that no two are the same
        start = torch.where(matters, start, self.state.start.cpu())
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
        first, second = scale_rate(self.state.multipliers, self.state.scale).cpu().unbind()
        return {"lagrangian": lagrangian(expected, self.target(), first, second).to(self.state.start.device)}

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
                kept = self._most_probable(keep_log_odds(self.log_alpha().double()))
            alive = {}
            for part, piece in zip(self.parts, kept, strict=True):
                alive = part.harden(piece, alive) or alive
            return float(self.share([piece.double() for piece in kept]))

    def _most_probable(self, log_odds):
        pieces = zip(self.parts, log_odds.split(self.sizes), strict=True)
        scores = [part.score_log_odds(piece) + part.tie_break() for part, piece in pieces]
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


def _flat(sizes):
    hidden, heads, units = sizes
    return [hidden, *heads, *units]
