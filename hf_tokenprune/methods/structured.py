"""Structured pruning: which heads, FFN units, hidden units and blocks are needed (CoFi, Xia et al. 2022, arXiv 2204.00408)."""

import math
from dataclasses import dataclass

import torch
from transformers.utils import logging

from ..budget import Budget
from ..cost import block_costs
from ..errors import ConfigError
from ..gates import log_alpha_for
from ..modeling.architectures import find_encoder
from ..modeling.modeling_token_pruned import attach, is_token_pruned
from ..processes import agreed, count, renew
from ..structure import PARTS, Layout, StructureGates
from ..surgery import operate
from .budgeted import BudgetedGates
from .gated import GatedMethod, GatedObjective, is_number
from .parts import Part

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class StructuredPruning(GatedMethod):
    """Learn which weights to cut out, for a given share of the dense model's MACs or parameters; then cut them out.

    Hard-concrete gates stand on hidden units, attention heads, FFN units, and whole attention and FFN blocks (CoFi, section
    3.1). Their expected cost is held to a target that tightens linearly; "projected" and "lagrangian" are explained at
    `ToP` (see `methods.budgeted.BudgetedGates`, too). The
    teacher's logits are distilled, and its layers' hidden states into whichever layers of the student are nearest (section
    3.2). At the end of the annealing the weights are cut: smaller matrices, blocks and layers gone. The rest of the run
    trains the small model.

    Until then a checkpoint holds all weights, and `macs_realised` counts them; but what is evaluated is the model as it would be cut.

    Args:
        target_macs: MACs to spend on the real tokens, as a share of the dense model's.
        target_params: weights of the layers to keep, as a share of the dense model's; embeddings and heads are not counted. Give
            one of the two.
        parts: what may be cut, of "hidden", "heads", "units" and "blocks"; None = all that the family allows. Hidden units of a
            base model without a head (that of a SentenceTransformer, or of a module of one's own) only if they are named: what reads
            them outside has sizes of its own, which nobody would cut. Where it is a module around the model, they are refused.
        teacher, distill_weight, layer_weight, constraint, gate_lr, schedule: as for `ToP`.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> StructuredPruning(target_macs=0.4, parts=("heads", "units")).parts
        ('heads', 'units')
    """

    name, option, title, papers = "structured", "structured", "Structured pruning (CoFi)", ("2204.00408",)
    cuts_weights = True

    target_params: float | None = None
    parts: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.target_params is not None:
            if not is_number(self.target_params) or not 0 < self.target_params < 1:
                self.refuse("target_params", "a share of the dense model's weights, above 0 and below 1")
            if self.target_macs is not None:
                self.refuse("target_params", "give target_macs or target_params, not both")
        if self.parts is not None and (
            not isinstance(self.parts, (tuple, list)) or not self.parts or not all(part in PARTS for part in self.parts)
        ):
            self.refuse("parts", f"a tuple of some of {', '.join(PARTS)}, as in ('heads', 'units'), or None")

    def attach(self, model):
        """Pack the model and put gates on its weights.

        Returns:
            The `Objective` that trains them.

        Raises:
            UnsupportedModelError: the family's weights cannot be cut, or not in all `parts`.
            ConfigError: no budget, a share of weights that cannot be reached, or a model that drops tokens already.
        """
        if self.target_params is None:
            self.need_target()
        self.prepare(model)
        weights = WeightGates(model, self.layout(model))
        gates = BudgetedGates(
            model, [weights], Budget(model),
            target=self.target_macs or self.target_params, constraint=self.constraint, gate_lr=self.gate_lr,
            cost="macs" if self.target_params is None else "params",
        )  # fmt: skip
        if self.target_params is not None and self.target_params < (least := gates.least()):  # MACs depend on the texts
            self.refuse("target_params", f"out of reach, {math.ceil(1000 * least) / 1000} are left with all of these parts cut")
        return StructuredObjective(model, self, gates, helpers=self.layer_distillation(model, gates.state, matched=True))

    def prepare(self, model, settings=None):
        """Pack a model that drops no tokens yet."""
        if is_token_pruned(model) and len(model.token_pruner.sites):
            raise ConfigError(
                "This model drops tokens already. Cut its weights first, or both at once: "
                "Compose(StructuredPruning(...), ToP(...), target_macs=...). To resume a run, make the model as it was when the run "
                "began; opened from a checkpoint it drops tokens."
            )
        protected = model.token_pruner.protected_ids if is_token_pruned(model) else []
        attach(model, protected_token_ids=protected, method=settings or self.settings())

    def layout(self, model):
        """Which gates there are."""
        family, encoder = find_encoder(model)
        parts = self.parts or [part for part in PARTS if part != "hidden" or (family.hidden and encoder is not model)]
        return Layout(model, parts)


class WeightGates(Part):
    """Gates on weights.

    Args:
        model: the model, packed.
        layout: which gates there are.
    """

    OPEN = 0.97  # probability with which a gate starts open
    cuts_weights = True

    def __init__(self, model, layout):
        self.pruner, self.layout = model.token_pruner, layout
        self.size = layout.size
        self.blocks = block_costs(model)
        self.pruner.structure = StructureGates(model, layout)

    def start(self):
        return torch.full((self.size,), log_alpha_for(self.OPEN))

    def expect(self, scores, outlook):
        layout = self.layout
        hidden = layout.share(scores, "hidden")
        outlook.costs = []
        for layer, block in enumerate(self.blocks):
            attention = layout.share(scores, ("attention", layer))
            heads = attention * layout.share(scores, ("heads", layer))
            units = layout.share(scores, ("ffn", layer)) * layout.share(scores, ("units", layer))
            outlook.costs.append(block.scaled(hidden, heads, units))
            outlook.alive[layer] = attention

    def open(self, gates, alive):
        if self.pruner.structure is None:
            return {}
        self.pruner.structure.soft = gates
        return {layer: self.layout.share(gates, ("attention", layer)) for layer in range(len(self.blocks))}

    def close(self):
        if self.pruner.structure is not None:
            self.pruner.structure.soft = None

    def harden(self, kept, alive):
        if self.pruner.structure is None:
            return {}
        # Gates that are all open are none: training without them is as fast as ever, and the same after a resume.
        hard = None if kept.all() else kept.float().to(self.pruner.training_state.start.device)
        self.pruner.structure.hard = hard
        if hard is None:
            return {}
        return {layer: self.layout.share(hard, ("attention", layer)) > 0 for layer in range(len(self.blocks))}

    def tie_break(self):
        """Where gates are equal, as at the start, every layer keeps as large a share of its heads and units, and blocks stay."""
        order = [torch.linspace(1, 0, where.stop - where.start, dtype=torch.float64) for where in self.layout.parts.values()]
        return 1e-6 * torch.cat(order)

    MULTIPLE = 16  # matrix products are up to 1.4 times slower on sizes between

    def choose(self, scores, level):
        """What is kept, made whole: large groups (hidden units, a layer's FFN units) are filled up to a multiple of 16; a block
        without a single head or unit is gone, one that cannot go keeps one, and so do hidden units and the whole model."""
        kept, parts = scores >= level, self.layout.parts
        for name, where in parts.items():
            if name == "hidden" or name[0] == "units":
                size, count = where.stop - where.start, int(kept[where].sum())
                wanted = max(count, 1) if name == "hidden" else count
                if size >= 8 * self.MULTIPLE:
                    wanted = min(-(-wanted // self.MULTIPLE) * self.MULTIPLE, size)
                if wanted > count:
                    kept[where] = self._top(scores[where], wanted)
        for part, block in (("heads", "attention"), ("units", "ffn")):
            for layer in range(len(self.blocks)):
                where = parts.get((part, layer))
                if where is None or kept[where].any():
                    continue
                if (block, layer) in parts:
                    kept[parts[block, layer]] = False
                else:
                    kept[where] = self._top(scores[where], 1)
        self._keep_one_block(kept, scores)
        return kept

    def _keep_one_block(self, kept, scores):
        """Without any block there is no model. The last to go stays, with the best of its heads or units."""
        parts = self.layout.parts
        blocks = [name for name in parts if name[0] in ("attention", "ffn")]
        if len(blocks) < self.layout.blocks or any(kept[parts[name]].any() for name in blocks):
            return
        within = {name: parts.get(({"attention": "heads", "ffn": "units"}[name[0]], name[1])) for name in blocks}
        last = max(blocks, key=lambda name: min(scores[where].max().item() for where in (parts[name], within[name]) if where))
        for where in (parts[last], within[last]):
            if where:
                kept[where] |= self._top(scores[where], 1)

    @staticmethod
    def _top(scores, count):
        return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(count).indices, True)


class StructuredObjective(GatedObjective):
    """See `StructuredPruning`."""

    @property
    def cost(self):
        return self.gates.cost

    def end_phase(self, phase, optimizer):
        if phase != self.gated_phase or self.pruner.structure is None:
            return False
        layout, hard = self.pruner.structure.layout, self.pruner.structure.hard
        hard = torch.ones_like(self.gates.state.start[: layout.size]) if hard is None else hard
        hidden, heads, units = layout.left(agreed(hard))
        self.close_gates()
        cut_weights(self, optimizer, hidden=hidden, heads=heads, units=units)
        if count() > 1:
            renew(self.wrapper)
        return True

    def tell_out_of_reach(self, spent):
        logger.warning(
            f"The budget cannot be reached: with all gates closed, {spent:.3f} of the dense model's {self.cost} are spent."
        )


def cut_weights(objective, optimizer, *, hidden, heads, units):
    """Cut the model of an objective, and what the objective keeps beside it, down to the parts that are left."""
    model, state = objective.model, objective.gates.state
    if optimizer is not None:
        for parameter in model.parameters():
            parameter.grad = None
    operate(model, hidden=hidden, heads=heads, units=units, optimizer=optimizer)
    counts = [model.token_pruner.hidden_size, *map(len, heads), *map(len, units)]
    state.sizes.copy_(state.sizes.new_tensor(counts))
