"""ToP: constraint-aware and ranking-distilled token pruning (Li et al., KDD 2023, arXiv 2306.14393)."""

import math
from dataclasses import dataclass

from transformers.utils import logging

from ..budget import Budget
from ..cost import layer_costs
from ..errors import ConfigError
from ..modeling.modeling_token_pruned import attach, is_token_pruned
from ..modeling.pruner import TokenPruner
from ..modeling.pruning_config import make_config
from ..modeling.selection import RankBins
from .budgeted import BudgetedGates
from .gated import GatedMethod, GatedObjective
from .ranking import RankingLoss
from .saliency import SaliencyLoss
from .token_bins import TokenBins

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ToP(GatedMethod):
    """Learn which ranks of tokens to drop in which layer, for a given share of the dense model's MACs.

    The paper: at each site the tokens of a text are ranked by the attention they receive; `rank_bins` gates say which bins of
    relative rank survive, and one gate says whether the site prunes at all (section 4.2). The expected MACs of all gates are held to
    a target that tightens linearly to `target_macs` (section 4.3), by a Lagrangian. The teacher's logits are distilled, and its last
    layer's ranking of the tokens, with LambdaARP2, into the early layers (section 4.1).

    By default this is otherwise: importance is learned, there is no ranking loss, no gate of the whole site, the target is held by
    projection, and hidden states are distilled, too. In as many steps the paper's own form loses more (README has its numbers). It
    is `ToP(importance="attention", rank_weight=1.0, site_gates=True, constraint="lagrangian",
    layer_weight=0.0)`. The target tightens over four fifths of the annealing, or of what is left of it after measuring, see below.

    Attention received does not tell which tokens an answer is made of. Learned importance adds to its logarithm, at each site,
    what linear maps read from a token's hidden state and from what attention has just brought to it, and from the mean of both over
    its neighbours.
    From the start of the annealing to the end of the run these maps are taught to foresee the teacher's saliency: the norm of the
    gradient of what it says with respect to each token's hidden state, in the layer of the site and in all later ones. That takes a
    backward pass through the teacher in each step.

    Two ways to hold the target. "lagrangian" is the paper's: all gates start open and alike, and multipliers are learned that
    press on all of them; they follow with a lag. "projected" holds it exactly in every step: a common shift of all
    gates is solved for, and the gates' gradient is projected onto the plane of equal cost, so that the task only moves tokens
    from one bin or layer to another. In the first 15 % of the annealing nothing is dropped, and each gate's Fisher information is
    measured; the gates start in the order of information per MAC, so that each site gets its share, and get steeper (under
    DeepSpeed, which does not let the optimizer forget, nothing is measured: they start in the order of rank). A gate of a site that
    is half open lets more tokens through than is expected of it, so that while annealing the soft model spends more than the target;
    the hard one does not.

    Args:
        target_macs: MACs to spend on the real tokens, as a share of the dense model's. It must be given; 0.4 is 2.5 times fewer.
        teacher: "self" (the model as it is after the dense phase of this run), a folder or Hub id, a model, or None. It has to have
            been fine-tuned for the same task, with the same tokenizer.
        sites: layers that may drop tokens; None = all but the first (and the last, where a pooled head reads one token). The first
            is among them where importance is learned.
        rank_bins: gates per site. More are finer and slower to learn.
        rank_topk: how many of the teacher's most important tokens the ranking loss looks at.
        rank_weight: weight of the ranking loss at the start; it falls to 1 % of this over the annealing. 0 = none.
        importance: what tokens are ranked by: "attention", the attention they receive (the paper's), or "learned", what a small
            scorer says. None = learned, where there is a teacher to learn it from and no `rank_weight`; or what it is already in
            a model that ToP has pruned before.
        importance_weight: weight of the loss that teaches a learned importance.
        neighbours: how many tokens to either side a learned importance reads, besides the one it is of: what matters lies together.
            None = 16, or as many as in a model that ToP has pruned before.
        site_gates: is there a gate per site that says whether it prunes at all (the paper's)? While it is half open, the model in
            training keeps more tokens than the one it becomes. None = only where importance is the attention received, where it
            makes no difference that we could measure.
        distill_weight: weight of the teacher's logits against the task's own loss of weight 1.
        layer_weight: weight of the teacher's hidden states, layer by layer, on the tokens that are left (the paper has none).
        constraint: "projected" or "lagrangian", which hold the expected cost to the target. Both are explained above.
        gate_lr: how far a gate (a log-odds) moves per step of an Adam-like optimizer at the peak of its schedule.
            None = 20 / steps of the anneal phase, at least 0.01 and at most 0.2. Gates are in one of the optimizer's ordinary
            groups: weight decay pulls them to where they started, too.
        schedule: how the run's steps are shared out.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> from hf_tokenprune import Schedule
        >>> ToP(target_macs=0.4, schedule=Schedule(dense=0, anneal=1, settle=1)).rank_bins
        50
    """

    name, option, title, papers = "top", "top", "ToP", ("2306.14393",)
    NEIGHBOURS = 16  # what SQuAD's answers are made of lies together; on short texts 0 does as well

    sites: tuple[int, ...] | None = None
    rank_bins: int = 50
    rank_topk: int = 20
    rank_weight: float = 0.0
    importance: str | None = None
    importance_weight: float = 1.0
    neighbours: int | None = None
    site_gates: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.sites is not None and (
            not isinstance(self.sites, (tuple, list)) or not self.sites or any(type(s) is not int or s < 0 for s in self.sites)
        ):
            self.refuse("sites", "numbers of layers (0 is the first), or None")
        for name in ("rank_bins", "rank_topk"):
            if type(getattr(self, name)) is not int or not 2 <= getattr(self, name) <= 10_000:
                self.refuse(name, "a whole number from 2 to 10000")
        self.check_weights("rank_weight", "importance_weight")
        if self.site_gates is not None and type(self.site_gates) is not bool:
            self.refuse("site_gates", "True, False or None")
        if self.importance not in ("attention", "learned", None):
            self.refuse("importance", '"attention", "learned" or None')
        if self.neighbours is not None and (type(self.neighbours) is not int or not 0 <= self.neighbours <= 10_000):
            self.refuse("neighbours", "a whole number from 0 to 10000, or None")
        for name in ("importance_weight", "neighbours"):
            if self.importance == "attention" and getattr(self, name) != getattr(type(self), name):
                self.refuse(name, 'for importance="learned" only, and here it is "attention"')
        if self.importance == "learned" and self.teacher is None:
            self.refuse("importance", "it is learned from a teacher, and there is none")
        if self.importance == "learned" and self.rank_weight:
            self.refuse("rank_weight", 'for importance="attention" only: a learned one has a loss of its own')

    def attach(self, model):
        """Pack the model, put rank-bin selectors at the sites and gates beside them.

        Returns:
            The `Objective` that trains them.

        Raises:
            UnsupportedModelError, ConfigError: as `hf_tokenprune.attach`; or the sites cannot reach `target_macs`.
        """
        self.need_target()
        sites = self.place(model, self.target_macs)
        bins = self.bins(model, sites, in_order=self.constraint == "projected")
        gates = BudgetedGates(
            model, [bins], Budget(model),
            target=self.target_macs, constraint=self.constraint, gate_lr=self.gate_lr,
        )  # fmt: skip
        return ToPObjective(model, self, gates, helpers=[
            *self.layer_distillation(model, gates.state, matched=False), *self.ranking(model, sites), *self.saliency(model),
        ])  # fmt: skip

    def learns(self, model):
        """Is importance learned, in this model?"""
        if self.importance is not None:
            return self.importance == "learned"
        site = _pruned_before(model)
        if site is not None:  # it goes on as it was pruned
            return site.scorer is not None
        return self.teacher is not None and not self.rank_weight

    def bins(self, model, sites, in_order):
        """The gates at the sites."""
        return TokenBins(model, sites, self.rank_bins, in_order, self._gates_sites(model))

    def _gates_sites(self, model):
        return not self.learns(model) if self.site_gates is None else self.site_gates

    def place(self, model, target, within=lambda own: own):
        """Attach selectors to the model. Returns the sites, in order of layers.

        Args:
            model: the model.
            target: share of the dense model's MACs that tokens alone are to reach, or None.
            within: makes of ToP's own settings those of the whole run.
        """
        probe = TokenPruner(model, make_config())
        possible = probe.possible_sites()
        learned = self.learns(model)  # then tokens rank well in the first layer, too, where attention does not tell yet
        usual = [site for site in possible if site or learned]
        if self.sites is None and not usual:
            raise ConfigError(
                f"{type(model).__name__} has {probe.layer_count} layers, too few to drop tokens after the first: "
                "name the layers yourself, ToP(sites=(0,))."
            )
        sites = sorted(set(usual if self.sites is None else self.sites))
        probe.check_sites(sites)
        least = math.ceil(1000 * Budget(model, probe, sites).least()) / 1000
        if target is not None and target < least:
            raise ConfigError(
                f"ToP(target_macs={target}) is out of reach with sites {sites}: with every token dropped at the first of "
                f"them, {least} of the dense model's MACs are left. Ask for that or more, or add earlier sites."
            )
        selectors = {site: RankBins(self.rank_bins, **self._reads(model, probe, site)) for site in sites}
        protected = []
        if is_token_pruned(model):
            protected = model.token_pruner.protected_ids
            _take_over(model.token_pruner.sites, selectors)
        # What was left open, as it is in this model.
        own = {
            **self.settings(), "sites": sites, "importance": "learned" if learned else "attention",
            "neighbours": self._near(model) if learned else 0, "site_gates": self._gates_sites(model),
        }  # fmt: skip
        attach(model, selectors, protected, method=within(own))
        return sites

    def _reads(self, model, probe, site):
        """The sizes of what the scorer at a site reads, if importance is learned."""
        if not self.learns(model):
            for name in ("importance_weight", "neighbours"):
                if getattr(self, name) != getattr(type(self), name):
                    self.refuse(
                        name,
                        "for a learned importance only, which there is not here: it wants a teacher and no rank_weight",
                    )
            return {}
        return {"hidden": probe.hidden_size, "width": layer_costs(model)[site].attention // 2, "near": self._near(model)}

    def _near(self, model):
        if self.neighbours is not None:
            return self.neighbours
        site = _pruned_before(model)
        return self.NEIGHBOURS if site is None or site.scorer is None else site.near

    def saliency(self, model):
        """What teaches the scorers, if there are any."""
        if not self.learns(model):
            return []
        model.token_pruner.sites.requires_grad_(True)
        return [SaliencyLoss(model, self.importance_weight)] if self.importance_weight > 0 else []

    def ranking(self, model, sites):
        """The ranking loss, if it has any weight."""
        return [RankingLoss(model.token_pruner, sites, self.rank_weight, self.rank_topk)] if self.rank_weight > 0 else []


def _pruned_before(model):
    """One of the sites with which ToP has pruned a model before, or None."""
    sites = model.token_pruner.sites.values() if is_token_pruned(model) else ()
    return next((site for site in sites if isinstance(site, RankBins)), None)


def _take_over(old, selectors):
    """A model that is pruned already keeps its selection until it is trained anew: it may be here to be evaluated only."""
    if sorted(map(int, old)) == sorted(selectors):
        for site, selector in selectors.items():
            known = old[str(site)]
            if isinstance(known, RankBins) and known.settings() == selector.settings():
                selector.load_state_dict(known.state_dict())


class ToPObjective(GatedObjective):
    """See `ToP`."""

    def tell_out_of_reach(self, spent):
        logger.warning(
            f"ToP(target_macs={self.config.target_macs}) cannot be reached on texts as short as these: with nothing but "
            f"protected tokens left after the first site, {spent:.3f} of the dense model's MACs are spent. Add earlier sites."
        )
