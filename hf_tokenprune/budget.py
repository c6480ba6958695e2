"""Expected MACs of an encoder as a differentiable function of the share of tokens that each site keeps.

A sample with `c` protected and `m` droppable tokens has `n = c + m * F` tokens after sites that together keep the share `F` of
its droppable ones. A layer's MACs are linear in `n` (the Linears) and quadratic (attention), so six sums over a data set
say everything about it: how many samples, and the sums of `c`, `m`, `c^2`, `c m` and `m^2`.
"""

from dataclasses import dataclass, replace

from .cost import dense_layer_costs, layer_costs


@dataclass(frozen=True)
class Lengths:
    """A data set's lengths as far as MACs depend on them, see above."""

    samples: float
    protected: float
    droppable: float
    protected_squares: float
    products: float
    squares: float

    @classmethod
    def of(cls, lengths, protected):
        """From a list of lengths, with so many protected tokens in each: a number, or a list of them."""
        counts = [protected] * len(lengths) if isinstance(protected, int) else protected
        texts = [(min(n, c), max(n - c, 0)) for n, c in zip(lengths, counts, strict=True) if n]
        return cls(
            samples=len(texts),
            protected=sum(c for c, _ in texts),
            droppable=sum(m for _, m in texts),
            protected_squares=sum(c * c for c, _ in texts),
            products=sum(c * m for c, m in texts),
            squares=sum(m * m for _, m in texts),
        )


class Budget:
    """Turns shares kept per site into the share of the dense model's MACs that is spent.

    Args:
        model: a transformers encoder of a supported family, dense or not.
        pruner: a `TokenPruner` made for it; by default the one it has.
        sites: layers that may drop tokens; by default the pruner's.
    """

    def __init__(self, model, pruner=None, sites=None):
        pruner = model.token_pruner if pruner is None else pruner
        self.costs, self.dense_costs = layer_costs(model), dense_layer_costs(model)
        self.sites = sorted(map(int, pruner.sites if sites is None else sites))
        sites = {layer: pruner.site(layer) for layer in self.sites}  # at the size they have now, also where weights are gated
        self.scorers = {layer: site.reads for layer, site in sites.items() if getattr(site, "scorer", None) is not None}
        self.protected = pruner.family.summary_tokens
        self.pooled_head = pruner.pooled_head
        self.asks_alone = pruner.pooled_asks_alone

    def share(self, kept, lengths, costs=None):
        """The share of the dense model's MACs on the real tokens (full last layer) that is spent.

        Args:
            kept: per site, in order of layers, the share of the droppable tokens that enter it and survive: a tensor `(sites,)` or
                a list of floats.
            lengths: `Lengths` of the data.
            costs: a `LayerCost` per layer, of numbers or tensors, if weights are gated; by default the model's own.

        Returns:
            A scalar like the entries of `kept`: a tensor, differentiable in `kept`, or a float.
        """
        kept = dict(zip(self.sites, kept, strict=True))
        alive, spent = 1.0, 0.0
        dense = sum(self._layer(cost, 1.0, 1.0, lengths) for cost in self.dense_costs)
        costs = self.costs if costs is None else costs
        for layer, cost in enumerate(costs):
            if layer in self.scorers:  # they read every token that enters
                cost = replace(cost, before=cost.before + self.scorers[layer])
            entering, alive = alive, alive * kept.get(layer, 1.0)
            if self.pooled_head and layer == len(costs) - 1:
                tokens = self._tokens(entering, lengths)
                queries = tokens if self.asks_alone else self._pairs(entering, lengths)
                spent = spent + cost.before * tokens + cost.attention * queries + cost.after * lengths.samples
            else:
                spent = spent + self._layer(cost, entering, alive, lengths)
        return spent / dense

    def parameters(self, costs):
        """The share of the weights of the dense model's layers that `LayerCost`s of numbers or tensors have left."""
        return sum(s.before + s.after for s in costs) / sum(s.before + s.after for s in self.dense_costs)

    def least(self):
        """The smallest share that long texts could be brought down to: everything dropped at the first site."""
        whole = sum(s.before + s.after for s in self.dense_costs)
        first = self.sites[0]
        return (
            sum(s.before + s.after for s in self.costs[:first]) + self.costs[first].before + self.scorers.get(first, 0)
        ) / whole

    def _layer(self, cost, entering, surviving, lengths):
        tokens = cost.before * self._tokens(entering, lengths) + cost.after * self._tokens(surviving, lengths)
        return tokens + cost.attention * self._pairs(entering, lengths)

    def _pairs(self, alive, lengths):
        return lengths.protected_squares + 2 * alive * lengths.products + alive * alive * lengths.squares

    def _tokens(self, alive, lengths):
        return lengths.protected + alive * lengths.droppable
