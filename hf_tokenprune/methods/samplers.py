"""InforCoef's samplers in training: what they draw, what they learn first, and what they would spend."""

import torch

from ..cost import layer_costs
from ..gates import sample_straight_through
from ..modeling.ranking import most_important, relative_rank
from ..modeling.selection import Skim
from .base import Helper


class SoftSkim:
    """A sampler in training: weights of 0 and 1, with the gradient of the keep probability. Remembers what it saw.

    Args:
        sampler: the `Skim`.
        sharp: by how much its logits outweigh the noise of sampling; 1 is the paper's. The gradient becomes as much steeper: it is
            for tokens near the threshold, which are those that can go either way.
        one_each: as for `Skim.keep`.
    """

    def __init__(self, sampler, sharp=1.0, one_each=True):
        self.sampler, self.sharp, self.one_each = sampler, sharp, one_each
        self.states = self.logits = self.batch = self.protected = self.alive = None

    def __call__(self, states, batch, protected):
        self.states, self.batch, self.protected = states, batch, protected
        self.alive = torch.ones_like(protected) if batch.weights is None else batch.weights.detach() > 0
        self.logits = self.sampler.logits(states)
        guarded = protected
        if self.one_each:
            margin = (self.logits[:, 1] - self.logits[:, 0]).detach().masked_fill(~self.alive, float("-inf"))
            guarded = protected | most_important(margin, batch, protected)
        sample = sample_straight_through(self.sharp * self.logits)
        return torch.where(guarded, torch.ones_like(sample), sample)

    @property
    def margin(self):
        """`(T,)` by how much keeping wins, without the offset; infinite for protected tokens."""
        margin = (self.logits[:, 1] - self.logits[:, 0]).detach() - self.sampler.offset_value()
        return margin.masked_fill(self.protected, float("inf"))


class Foresight(Helper):
    """Teaches samplers, while every token is there, to foresee which tokens their layer will attend to.

    The margin by which keeping wins is to fall with a token's relative rank, from twice what it is at first to 0: all are kept
    still, the least important the most barely.
    """

    FIRST = 2 * Skim.START

    def prepare(self, objective):
        if objective.foresees:
            objective.pruner.remembers = True
            objective.pruner.watched = frozenset(
                layer for layer in objective.samplers() if objective.pruner.with_attention[layer]
            )

    def losses(self, objective):
        if not objective.foresees:
            return {}
        terms = []
        for layer in objective.pruner.watched:
            call = objective.pruner.last_forward.calls[layer]
            _, rank = relative_rank(call.importance, call.batch, call.summary)
            logits = objective.samplers()[layer].logits(call.entered[0].detach())
            missed = logits[:, 1] - logits[:, 0] - 2 * self.FIRST * (1 - rank)
            missed = missed[~call.summary]
            terms.append(missed.square().sum() / max(len(missed), 1) / self.FIRST**2)
        return {"foresight": torch.stack(terms).mean()} if terms else {}


class SamplingCost:
    """What the samplers would spend at inference on a batch, as a function of their offset.

    Args:
        model: the model.
        dense_costs: the `LayerCost`s of the dense model.
        looks: by layer, what its sampler saw of the batch: a `SoftSkim`, every token still there.
    """

    FARTHEST = 30.0  # log-odds; nobody's logits are that far apart

    def __init__(self, model, dense_costs, looks):
        first = next(iter(looks.values()))
        self.model, self.costs = model, layer_costs(model)
        # On the CPU at once: the bisection looks at single numbers.
        self.margins = torch.stack([looks[layer].margin for layer in sorted(looks)]).cpu()
        lengths = first.batch.lengths
        self.sequence, self.least = first.batch.sequence_ids.cpu(), torch.tensor(lengths).clamp(max=1)
        self.dense = sum(cost.whole(lengths) for cost in dense_costs)

    def share(self, offset):
        """The share of the dense model's MACs on this batch that is spent with an offset."""
        alive = (self.margins + offset > 0).cumprod(0)
        spent, arrived, pruner = 0, self.margins.shape[1], self.model.token_pruner
        for layer, cost in enumerate(self.costs):
            counts = torch.bincount(self.sequence, weights=alive[layer].double(), minlength=len(self.least))
            counts = counts.maximum(self.least)
            pooled = pruner.pooled_head and layer == len(self.costs) - 1
            total = counts.sum().item()
            pairs = total if pooled and pruner.pooled_asks_alone else (counts * counts).sum().item()
            after = self.least.sum().item() if pooled else total
            spent += cost.before * total + cost.after * after + cost.attention * pairs + pruner.macs(layer, arrived)
            arrived = total
        return spent / self.dense

    def offset_for(self, target):
        """The offset at which the target is spent, or the nearest to it: by bisection. Where the target is more than there is to
        spend, it is the one that just keeps everything, so that the way back is short."""
        low, high = -self.FARTHEST, max(-self.margins.min().item(), 0.0)
        for _ in range(20):
            middle = (low + high) / 2
            if self.share(middle) > target:
                high = middle
            else:
                low = middle
        return low
