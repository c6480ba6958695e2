"""ToP: constraint-aware and ranking-distilled token pruning (Li et al., KDD 2023, arXiv 2306.14393)."""

import math
import os
from dataclasses import asdict, dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from ..budget import Budget, Lengths
from ..errors import ConfigError
from ..gates import keep_probability, log_alpha_for, sample_hard_concrete, scale_rate
from ..losses import lagrangian, ranking_distillation
from ..modeling.modeling_token_pruned import attach, is_token_pruned, make_config
from ..modeling.pruner import TokenPruner
from ..modeling.selection import RankBins, relative_rank
from ..schedule import Schedule, ramp
from .base import Objective

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ToP:
    """Learn which ranks of tokens to drop in which layer, for a given share of the dense model's MACs.

    At each site the tokens of a text are ranked by the attention they receive; `rank_bins` gates say which bins of relative rank
    survive, and one gate says whether the site prunes at all (section 4.2). The expected MACs of all gates are held to a target
    that tightens linearly from what the packed model spends to `target_macs` over four fifths of the annealing (section 4.3).
    The teacher's logits are distilled, and its last layer's ranking of the tokens, with LambdaARP2, into the early layers
    (section 4.1).

    Two ways to hold the target. "lagrangian" is the paper's: all gates start open and alike, and multipliers are learned that
    press on all of them; they need thousands of steps to follow. "projected" holds it exactly in every step: a common shift of all
    gates is solved for, and the gates' gradient is projected onto the plane of equal cost, so that the task only moves tokens
    from one bin or layer to another. The gates start in the order of rank and get steeper over the annealing, so that the
    soft model ends as the hard one.

    Args:
        target_macs: MACs to spend on the real tokens, as a share of the dense model's. 0.4 is 2.5 times fewer.
        teacher: "self" (the model as it is after the dense phase of this run), a folder or Hub id, a model, or None.
        sites: layers that may drop tokens; None = all but the first (and the last, where a pooled head reads one token).
        rank_bins: gates per site. More are finer and slower to learn.
        rank_topk: how many of the teacher's most important tokens the ranking loss looks at.
        rank_weight: weight of the ranking loss at the start; it falls to 1 % of this over the annealing. 0 = none.
        distill_weight: weight of the teacher's logits against the task's own loss of weight 1.
        constraint: "projected" or "lagrangian", see above.
        gate_lr: how far a gate (a log-odds) moves per step of an Adam-like optimizer at the peak of its schedule.
            None = 20 / steps of the anneal phase, at least 0.01 and at most 0.2. Gates are in one of the optimizer's ordinary
            groups: weight decay pulls them to where they started, too.
        schedule: how the run's steps are shared out.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> ToP(target_macs=0.4, schedule=Schedule(dense=0, anneal=1, settle=1)).rank_bins
        50
    """

    target_macs: float
    teacher: object = "self"
    sites: tuple[int, ...] | None = None
    rank_bins: int = 50
    rank_topk: int = 20
    rank_weight: float = 0.0
    distill_weight: float = 1.0
    constraint: str = "projected"
    gate_lr: float | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        def refuse(name, allowed):
            raise ConfigError(f"ToP({name}={getattr(self, name)!r}): {allowed}.")

        if not _number(self.target_macs) or not 0 < self.target_macs < 1:
            refuse("target_macs", "a share of the dense model's MACs, above 0 and below 1")
        if self.sites is not None and (
            not isinstance(self.sites, (tuple, list)) or not self.sites or any(type(s) is not int or s < 0 for s in self.sites)
        ):
            refuse("sites", "numbers of layers (0 is the first), or None")
        for name in ("rank_bins", "rank_topk"):
            if type(getattr(self, name)) is not int or not 2 <= getattr(self, name) <= 10_000:
                refuse(name, "a whole number from 2 to 10000")
        for name in ("rank_weight", "distill_weight"):
            if not _number(getattr(self, name)) or getattr(self, name) < 0:
                refuse(name, "a number, 0 or more")
        if self.constraint not in ("projected", "lagrangian"):
            refuse("constraint", '"projected" or "lagrangian"')
        if self.gate_lr is not None and (not _number(self.gate_lr) or self.gate_lr <= 0):
            refuse("gate_lr", "a number above 0, or None")
        if self.teacher == "" or not isinstance(self.teacher, (str, os.PathLike, nn.Module, type(None))):
            refuse("teacher", '"self", a folder or Hub id, a model, or None')
        if not isinstance(self.schedule, Schedule):
            refuse("schedule", "a hf_tokenprune.Schedule")

    def settings(self):
        """The settings as plain values, for `config.token_pruning`."""
        teacher = (
            type(self.teacher).__name__
            if isinstance(self.teacher, nn.Module)
            else self.teacher and os.path.basename(str(self.teacher))
        )
        sites = None if self.sites is None else list(self.sites)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"name": "top", **fields, "teacher": teacher, "sites": sites, "schedule": asdict(self.schedule)}

    def attach(self, model):
        """Pack the model, put rank-bin selectors at the sites and gates beside them.

        Returns:
            The `Objective` that trains them.

        Raises:
            UnsupportedModelError, ConfigError: as `hf_tokenprune.attach`; or the sites cannot reach `target_macs`.
        """
        probe = TokenPruner(model, make_config())
        if self.sites is None and probe.highest_site < 1:
            raise ConfigError(
                f"{type(model).__name__} has {probe.layer_count} layers, too few to drop tokens after the first: "
                "name the layers yourself, ToP(sites=(0,))."
            )
        sites = sorted(set(range(1, probe.highest_site + 1) if self.sites is None else self.sites))
        probe.check_sites(sites)
        least = math.ceil(1000 * Budget(model, probe, sites).least()) / 1000
        if self.target_macs < least:
            raise ConfigError(
                f"ToP(target_macs={self.target_macs}) is out of reach with sites {sites}: with every token dropped at the first of "
                f"them, {least} of the dense model's MACs are left. Ask for that or more, or add earlier sites."
            )
        selectors = {site: RankBins(self.rank_bins) for site in sites}
        protected = []
        if is_token_pruned(model):
            protected = model.token_pruner.protected_ids
            _take_over(model.token_pruner.sites, selectors)
        attach(model, selectors, protected, method=self.settings())
        pruner = model.token_pruner
        pruner.training_state = Gates(len(sites), self.rank_bins, self.constraint).to(model.device)
        pruner.objective = ToPObjective(model, self)
        return pruner.objective


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _take_over(old, selectors):
    """A model that is pruned already keeps its selection until it is trained anew: it may be here to be evaluated only."""
    if sorted(map(int, old)) == sorted(selectors):
        for site, selector in selectors.items():
            known = old[str(site)]
            if isinstance(known, RankBins) and known.bins == selector.bins:
                selector.set_kept(known.kept.cpu())


class Gates(nn.Module):
    """Everything of ToP that is learned or counted besides the weights; saved in every checkpoint.

    Parameters start at 0 and mean `initial + scale * parameter`.
    """

    OPEN = 0.97  # probability with which a gate starts open
    SLOPE = 8.0  # "projected": log-odds of the bin of highest rank, and minus those of the lowest

    def __init__(self, sites, bins, constraint):
        super().__init__()
        self.bins = nn.Parameter(torch.zeros(sites, bins))
        self.sites = nn.Parameter(torch.zeros(sites))
        self.multipliers = nn.Parameter(torch.zeros(2))
        self.register_buffer("lengths", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("teacher", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(1.0))
        flat = torch.full((bins,), log_alpha_for(self.OPEN))
        start = self.SLOPE * torch.linspace(1, -1, bins) if constraint == "projected" else flat
        self.register_buffer("start", start, persistent=False)

    def log_alpha(self):
        """`(sites, bins + 1)` log-odds: that a bin is kept where its site prunes; in the last column, that the site prunes."""
        bins = self.start + scale_rate(self.bins, self.scale)
        sites = log_alpha_for(self.OPEN) + scale_rate(self.sites, self.scale)
        return torch.cat([bins, sites[:, None]], dim=1)

    def first_and_second(self):
        """The two Lagrange multipliers."""
        return scale_rate(self.multipliers, self.scale)


def survival(log_alpha):
    """`(sites, bins)` probability that a token of this bin survives this site."""
    probability = keep_probability(log_alpha)
    return 1 - probability[:, -1:] * (1 - probability[:, :-1])


class ToPObjective(Objective):
    """See `ToP`."""

    STEEPEST = 4.0  # "projected": by how much log-odds are multiplied at the end of the annealing

    def __init__(self, model, config):
        super().__init__(model, config.distill_weight)
        self.config = config
        self.gates = self.pruner.training_state
        self.budget = Budget(model)
        self.sites = self.budget.sites
        early = range(max(1, self.pruner.layer_count // 3 + 1))
        self.early = [site for site in self.sites if site in early] or self.sites[:1]
        self.ranks = config.rank_weight > 0
        self.current = None
        self.told = False

    def start_run(self, learning_rate, anneal_steps):
        """Begin anew: gates at their start, and how fast they move, from the optimizer's own learning rate."""
        with torch.no_grad():
            for parameter in self.gates.parameters():
                parameter.zero_()
        self.gates.lengths.zero_()
        self.told = False
        rate = self.config.gate_lr if self.config.gate_lr is not None else min(max(20 / max(anneal_steps, 1), 0.01), 0.2)
        self.gates.scale.fill_(rate / learning_rate)

    def target(self):
        """The share of MACs that the gates are held to at this moment."""
        if self.moment.phase == "dense":
            return 1.0
        progress = self.moment.progress if self.moment.phase == "anneal" else 1.0
        start = self.budget.share([1.0] * len(self.sites), self.seen())
        return max(ramp(progress, start, self.config.target_macs, warm=0.8), self.config.target_macs)

    def log_alpha(self):
        """The gates as they stand at this moment: learned log-odds, steeper and shifted onto the target if that is projected."""
        log_alpha = self.gates.log_alpha()
        if self.config.constraint == "lagrangian":
            return log_alpha
        progress = self.moment.progress if self.moment.phase == "anneal" else 1.0
        steeper = ramp(progress, 1.0, self.STEEPEST)
        bins = log_alpha[:, :-1] + self._shift(log_alpha.detach(), steeper)
        return steeper * torch.cat([bins, log_alpha[:, -1:]], dim=1)

    def _shift(self, log_alpha, steeper):
        """What to add to all bins' log-odds so that the expected share of MACs is the target: by bisection."""
        lengths, target = self.seen(), self.target()
        low, high = -2 * self.gates.SLOPE - 40.0, 2 * self.gates.SLOPE + 40.0
        bins, sites = log_alpha[:, :-1].cpu(), log_alpha[:, -1:].cpu()
        for _ in range(30):
            middle = (low + high) / 2
            kept = survival(steeper * torch.cat([bins + middle, sites], dim=1)).mean(1).tolist()
            if self.budget.share(kept, lengths) > target:
                high = middle
            else:
                low = middle
        return low

    def seen(self):
        """`Lengths` of the training texts so far; of one text of 100 tokens before the first."""
        seen = self.gates.lengths.tolist()
        return Lengths(*seen) if seen[0] else Lengths(1, 100, 10_000)

    def open_gates(self):
        if self.ranks and self.teacher is not None:
            self.pruner.watched = frozenset(self.early)
            self.teacher.token_pruner.watched = frozenset({self.teacher.token_pruner.layer_count - 1})
        self.current = log_alpha = self.log_alpha()
        if self.config.constraint == "projected" and log_alpha.requires_grad:
            log_alpha.register_hook(self._along_budget(log_alpha.detach()))
        gates = sample_hard_concrete(log_alpha)
        weights = 1 - gates[:, -1:] * (1 - gates[:, :-1])
        self.pruner.soft = {site: SoftBins(self.pruner.site(site), weights[i]) for i, site in enumerate(self.sites)}

    def _along_budget(self, log_alpha):
        """A hook that takes from a gradient its part that would change the expected MACs."""
        with torch.enable_grad():
            log_alpha.requires_grad_()
            share = self.budget.share(survival(log_alpha).mean(1), self.seen())
            (normal,) = torch.autograd.grad(share, log_alpha)
        length = (normal * normal).sum().clamp(min=1e-20)
        return lambda gradient: gradient - (gradient * normal).sum() / length * normal

    def observe(self):
        seen = Lengths.of(self.pruner.trace[0].entered, self.budget.protected)
        self.gates.lengths += self.gates.lengths.new_tensor([seen.samples, seen.droppable, seen.squares])

    def losses(self, model, kwargs):
        if self.moment.phase != "anneal":
            return {}
        lengths = Lengths.of(self.pruner.trace[0].entered, self.budget.protected)
        expected = self.budget.share(survival(self.current).mean(1), lengths)
        self.note("macs_expected", expected)
        terms = {}
        if self.config.constraint == "lagrangian":
            first, second = self.gates.first_and_second()
            terms["lagrangian"] = lagrangian(expected, self.target(), first, second)
        if self.ranks and self.taught is not None:
            weight = ramp(self.moment.progress, self.config.rank_weight, 0.01 * self.config.rank_weight)
            terms["ranking"] = weight * self._ranking()
        return terms

    def _ranking(self):
        """Ranking loss of the early layers against the order of the teacher's last layer, mean over layers."""
        last = self.teacher.token_pruner.last_forward.calls[-1]
        target, _ = _to_padded(last)
        losses = []
        for layer in sorted(self.early):
            call = self.pruner.last_forward.calls[layer]
            scores, mask = _to_padded(call)
            losses.append(ranking_distillation(scores, target, mask, top_k=self.config.rank_topk))
        return torch.stack(losses).mean()

    def harden(self):
        """Keep the most probable bins, as many as the target allows on texts as long as those seen so far.

        The hard model thus spends the target, whatever the gates' probabilities add up to.
        """
        with torch.no_grad():
            if self.moment.phase == "dense":
                pattern = torch.ones_like(self.gates.bins, dtype=torch.bool)
            else:
                pattern = self._most_probable(survival(self.log_alpha()).cpu(), self.seen(), self.target())
                self._tell_if_out_of_reach(pattern)
            for i, site in enumerate(self.sites):
                self.pruner.site(site).set_kept(pattern[i])

    def _tell_if_out_of_reach(self, pattern):
        spent = self.budget.share(pattern.double().mean(1).tolist(), self.seen())
        if spent > self.target() + 1e-9 and not self.told:
            self.told = True
            logger.warning(
                f"ToP(target_macs={self.config.target_macs}) cannot be reached on texts as short as these: with nothing but "
                f"protected tokens left after the first site, {spent:.3f} of the dense model's MACs are spent. Add earlier sites."
            )

    def _most_probable(self, kept, lengths, target):
        # Where gates are equal, as at the start, the more important bin survives.
        kept = kept.double() + 1e-6 * torch.linspace(1, 0, kept.shape[1], dtype=torch.float64)
        levels = kept.flatten().unique().tolist()  # ascending: the higher the level, the fewer bins survive
        low, high = 0, len(levels)
        while low < high:
            middle = (low + high) // 2
            if self.budget.share((kept >= levels[middle]).double().mean(1).tolist(), lengths) <= target:
                high = middle
            else:
                low = middle + 1
        return kept >= levels[low] if low < len(levels) else torch.zeros_like(kept, dtype=torch.bool)


def _to_padded(call):
    """A layer's importance as `(B, S)`, and which of these entries are droppable tokens that it saw."""
    batch, protected = call.batch, call.pruner.family.summary_tokens
    size = batch.batch_size * batch.seq_len
    flat = call.importance.new_zeros(size).index_copy(0, batch.index, call.importance)
    mask = torch.zeros(size, dtype=torch.bool, device=flat.device)
    mask[batch.index[batch.places >= protected]] = True
    return flat.view(batch.batch_size, -1), mask.view(batch.batch_size, -1)


class SoftBins:
    """A site's gates in training: the weight of each token is that of the bin its relative rank falls in."""

    def __init__(self, selector, weights):
        self.selector, self.weights = selector, weights

    def __call__(self, importance, batch, protected):
        _, relative = relative_rank(importance, batch, protected)
        weights = self.weights[self.selector.bin_of(relative)]
        return torch.where(protected, torch.ones_like(weights), weights)
