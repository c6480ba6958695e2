"""Two methods in one run under one budget, which shares itself out between tokens and weights."""

from dataclasses import dataclass, replace

from ..budget import Budget
from ..errors import ConfigError
from .budgeted import BudgetedGates
from .gated import GatedMethod
from .structured import StructuredObjective, StructuredPruning, WeightGates
from .top import ToP

PARTS = {"weights": StructuredPruning, "tokens": ToP}


def own_settings(kind):
    """The settings that a method keeps for itself inside of a `Compose`: those that are not of the whole run."""
    return tuple(name for name in kind.__dataclass_fields__ if name not in (*GatedMethod.__dataclass_fields__, "target_params"))


@dataclass(frozen=True)
class Compose(GatedMethod):
    """Prune weights and tokens at once, under one budget that shares itself out.

    Nobody has to say how much comes from which: the gates of both start in the order of what each is worth per MAC, by its Fisher
    information (with `constraint="projected"`). Tokens count 150 times what was measured of them: of that the model makes up for
    less, as it trains on, than of weights. On short texts nearly all is then saved by weights.

    Args:
        weights: a `StructuredPruning`; only its `parts` count.
        tokens: a `ToP`; only its `sites`, `rank_bins`, `rank_topk`, `rank_weight`, `importance`, `importance_weight`,
            `neighbours` and `site_gates` count.
        target_macs, teacher, distill_weight, layer_weight, constraint, gate_lr, schedule: of the run, as for `ToP`.

    Raises:
        ConfigError: a setting is out of range, or one of the run was given to `weights` or `tokens`.

    Example:
        >>> method = Compose(StructuredPruning(), ToP(rank_bins=20), target_macs=0.25)
        >>> method.tokens.rank_bins
        20
    """

    name, option, title = "compose", "structured+top", "Structured pruning (CoFi) and ToP under one budget"
    papers = (*StructuredPruning.papers, *ToP.papers)
    cuts_weights = True

    weights: StructuredPruning
    tokens: ToP

    def __post_init__(self):
        super().__post_init__()
        for part, kind in PARTS.items():
            method = getattr(self, part)
            if not isinstance(method, kind):
                raise ConfigError(f"Compose({part}={method!r}): give a {kind.__name__} there.")
            plain, own = kind(), own_settings(kind)
            given = [
                name for name in kind.__dataclass_fields__ if name not in own and getattr(method, name) != getattr(plain, name)
            ]
            if given:
                raise ConfigError(f"{kind.__name__}({given[0]}=...) inside of Compose has no effect: give it to Compose.")
        if self.teacher is None:
            for name in ("importance", "importance_weight", "neighbours"):
                if getattr(self.tokens, name) not in (getattr(ToP, name), "attention"):
                    raise ConfigError(f"ToP({name}=...) inside of Compose(teacher=None): importance is learned from a teacher.")
            object.__setattr__(self, "tokens", replace(self.tokens, importance="attention"))

    def settings(self):
        """The settings as plain values, for `config.token_pruning`."""
        return {**super().settings(), **{name: getattr(self, name).settings() for name in PARTS}}

    def attach(self, model):
        """Pack the model, and put gates on its weights and on ranks of its tokens.

        Returns:
            The `Objective` that trains them.

        Raises:
            UnsupportedModelError, ConfigError: as those of the two methods.
        """
        self.need_target()
        self.weights.prepare(model, self.settings())
        sites = self.tokens.place(model, None, within=lambda own: {**self.settings(), "tokens": own})
        projected = self.constraint == "projected"
        weights = WeightGates(model, self.weights.layout(model))
        bins = self.tokens.bins(model, sites, in_order=projected)
        gates = BudgetedGates(
            model, [weights, bins], Budget(model),
            target=self.target_macs, constraint=self.constraint, gate_lr=self.gate_lr,
        )  # fmt: skip
        return StructuredObjective(model, self, gates, helpers=[
            *self.layer_distillation(model, gates.state, matched=True),
            *self.tokens.ranking(model, sites), *self.tokens.saliency(model),
        ])  # fmt: skip
