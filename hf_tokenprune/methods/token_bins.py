"""Gates on bins of relative rank, which say what tokens a site keeps."""

import torch
from torch.nn.functional import logsigmoid

from ..gates import log_alpha_for
from ..modeling.ranking import relative_rank
from .parts import Part


class TokenBins(Part):
    """Gates on bins of relative rank: per site, `bins` gates, and perhaps one that says whether the site prunes at all.

    Args:
        model: the model, attached, with `RankBins` at the sites.
        sites: their layers.
        bins: bins per site.
        in_order: start in the order of rank, rather than all open and alike, where no information could be measured.
        site_gates: is there a gate for the whole site?
    """

    if_missed = (
        " Where all texts are about equally long, with fewer tokens than there are bins at a site, fewer bins come closer: "
        "ToP(rank_bins=8), for instance."
    )
    OPEN = 0.97  # probability with which a gate starts open
    SLOPE = 8.0  # in order: log-odds of the bin of highest rank, and minus those of the lowest
    # What dropped tokens have said is lost; what cut weights have done, others learn to do. On the held-out split of STS-B (one
    # seed, 6.6 times fewer MACs) both together cost 7.7 points with 0, 3.4 with 1.5, 1.5 with 3; with 5 none, as weights alone do.
    lasting = 5.0

    def __init__(self, model, sites, bins, in_order, site_gates=True):
        self.pruner, self.sites, self.bins, self.in_order = model.token_pruner, sites, bins, in_order
        self.gates = bins + site_gates
        self.size = len(sites) * self.gates

    def start(self):
        table = torch.full((len(self.sites), self.gates), log_alpha_for(self.OPEN))
        if self.in_order:
            table[:, : self.bins] = self.SLOPE * torch.linspace(1, -1, self.bins)
        return table.flatten()

    def shifted(self):
        mask = torch.ones(len(self.sites), self.gates, dtype=torch.bool)
        mask[:, self.bins :] = False
        return mask.flatten()

    def even_out(self, information):
        """A bin is worth no less than those ranked below it. Where texts have fewer tokens than there are bins, some have met none,
        and are worth what their neighbours are; but for the last ones, which go first."""
        table = information.view(len(self.sites), self.gates).clone()
        for row in table:
            row[: self.bins] = never_rising(row[: self.bins])
        return table.flatten()

    def worth(self):
        """Information is measured while all tokens are there. When a bin's turn comes, those ranked below are gone and the softmax
        has given their share to the rest: with a part `m` left, a token's influence is `1 / m` times as large."""
        table = torch.zeros(len(self.sites), self.gates)
        table[:, : self.bins] = -2 * ((torch.arange(self.bins) + 0.5) / self.bins).log()
        return table.flatten()

    def scores(self, probability):
        table = probability.unflatten(-1, (len(self.sites), self.gates))
        if self.gates == self.bins:
            return table.flatten(-2)
        return (1 - table[..., -1:] * (1 - table[..., :-1])).flatten(-2)

    def score_log_odds(self, log_odds):
        table = log_odds.unflatten(-1, (len(self.sites), self.gates))
        if self.gates == self.bins:
            return table.flatten(-2)
        dropped = logsigmoid(table[..., -1:]) + logsigmoid(-table[..., :-1])  # the logarithm of its probability
        return (torch.log(-torch.expm1(dropped)) - dropped).flatten(-2)

    def tie_break(self):
        """Where gates are equal, as at the start, the more important bin survives."""
        return 1e-6 * torch.linspace(1, 0, self.bins, dtype=torch.float64).repeat(len(self.sites))

    def expect(self, scores, outlook):
        shares = scores.unflatten(-1, (len(self.sites), self.bins)).mean(-1)
        outlook.kept.update(zip(self.sites, shares.unbind(-1), strict=True))

    def open(self, gates, alive):
        weights = self.scores(gates).view(len(self.sites), self.bins)
        for site, row in zip(self.sites, weights, strict=True):
            if site in alive:  # without attention nothing can be ranked
                row = 1 - alive[site] * (1 - row)
            self.pruner.soft[site] = SoftBins(self.pruner.site(site), row)

    def close(self):
        self.pruner.soft = {}

    def harden(self, kept, alive):
        for site, row in zip(self.sites, kept.view(len(self.sites), self.bins), strict=True):
            self.pruner.site(site).set_kept(row if alive.get(site, 1) else torch.ones_like(row))


def never_rising(values):
    """The sequence nearest to `values` (least squares) that never rises: rising neighbours are pooled.

    Example:
        >>> never_rising(torch.tensor([5.0, 0.0, 2.0, 4.0, 1.0]))
        tensor([5., 2., 2., 2., 1.])
    """
    pools = []
    for value in values.double().tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (last, many), (before, more) = pools.pop(), pools.pop()
            pools.append(((last * many + before * more) / (many + more), many + more))
    return torch.tensor([mean for mean, count in pools for _ in range(count)], dtype=values.dtype)


class SoftBins:
    """A site's gates in training: the weight of each token is that of the bin its relative rank falls in."""

    def __init__(self, selector, weights):
        self.selector, self.weights = selector, weights

    def __call__(self, importance, batch, protected):
        _, relative = relative_rank(importance, batch, protected)
        weights = self.weights[self.selector.bin_of(relative)]
        return torch.where(protected, torch.ones_like(weights), weights)
