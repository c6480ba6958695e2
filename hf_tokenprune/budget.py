"""Expected MACs of an encoder as a differentiable function of the share of tokens that each site keeps.

A sample with `c` protected and `m` droppable tokens has `n = c + m * F` tokens after sites that together keep the share `F` of
its droppable ones. A layer's MACs are linear in `n` (the Linears) and quadratic (attention), so three sums over a data set
say everything about it: how many samples, the sum of `m` and the sum of `m^2`.
"""

from dataclasses import dataclass

import torch

from .cost import layer_shapes


@dataclass(frozen=True)
class Lengths:
    """A data set's lengths as far as MACs depend on them: `samples`, `droppable` = sum of m, `squares` = sum of m^2."""

    samples: float
    droppable: float
    squares: float

    @classmethod
    def of(cls, lengths, protected):
        """From a list of lengths, with so many protected tokens in each."""
        droppable = [max(n - protected, 0) for n in lengths if n]
        return cls(len(droppable), sum(droppable), sum(m * m for m in droppable))


class Budget:
    """Turns shares kept per site into the share of the dense model's MACs that is spent.

    Args:
        model: a model with a `token_pruner` that has its sites.
    """

    def __init__(self, model):
        pruner = model.token_pruner
        self.shapes = layer_shapes(model)
        self.sites = sorted(map(int, pruner.sites))
        self.protected = pruner.family.summary_tokens
        self.pooled_head = pruner.pooled_head

    def share(self, kept, lengths):
        """The share of the dense model's MACs on the real tokens (full last layer) that is spent.

        Args:
            kept: `(sites,)` share of the droppable tokens that enter a site and survive it, in order of layers.
            lengths: `Lengths` of the data.

        Returns:
            Scalar tensor, differentiable in `kept`.
        """
        return self._macs(kept, lengths) / self._macs(None, lengths)

    def least(self):
        """The smallest share that long texts could be brought down to: everything dropped at the first site."""
        whole = sum(s.before + s.after for s in self.shapes)
        first = self.sites[0]
        return (sum(s.before + s.after for s in self.shapes[:first]) + self.shapes[first].before) / whole

    def _macs(self, kept, lengths):
        def tokens(alive):
            return lengths.samples * self.protected + alive * lengths.droppable

        def pairs(alive):
            return (
                lengths.samples * self.protected**2
                + 2 * self.protected * alive * lengths.droppable
                + alive**2 * lengths.squares
            )

        alive = torch.ones((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for layer, shape in enumerate(self.shapes):
            entering = alive
            if kept is not None and layer in self.sites:
                alive = alive * kept[self.sites.index(layer)].double()
            if kept is not None and self.pooled_head and layer == len(self.shapes) - 1:
                total = total + shape.before * tokens(entering) + (shape.after + 0.0) * lengths.samples
                total = total + shape.attention * tokens(entering)
            else:
                total = (
                    total + shape.before * tokens(entering) + shape.after * tokens(alive) + shape.attention * pairs(entering)
                )
        return total
