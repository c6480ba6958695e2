"""Learned importance: what a scorer adds to the attention that tokens receive."""

import torch
from torch import nn
from torch.nn.functional import avg_pool1d, layer_norm


class Standardize(nn.Module):
    """LayerNorm without weights, in float32. Gates on what it reads count in its mean and variance, as in any LayerNorm."""

    eps, weight, bias = 1e-5, None, None

    def forward(self, states):
        return layer_norm(states.float(), states.shape[-1:], eps=self.eps)


class Scorer(nn.Module):
    """Importance that is learned: the logarithm of the attention received, and what is read from a token's states, and perhaps from
    those of its neighbours: what an answer is made of lies together.

    Until it is trained it orders tokens as the attention received does.

    Args:
        hidden: the model's hidden size.
        width: heads x head size.
        near: how many neighbours to either side are read, 0 = none.
    """

    GAIN = 30.0  # it has to learn within an epoch, at the learning rate of the weights

    def __init__(self, hidden, width, near=0):
        super().__init__()
        self.near = near
        self.received = nn.Parameter(torch.full((1,), 1 / self.GAIN))
        maps = 2 if near else 1  # of the token itself; of its neighbours
        self.entered = nn.Parameter(torch.zeros(maps, hidden))
        self.context = nn.Parameter(torch.zeros(maps, width))
        self.norms = nn.ModuleDict({"entered": Standardize(), "context": Standardize()})

    def forward(self, received, batch, entered, context):
        """`(T,)` scores in float32.

        Args:
            received: `(T,)` the attention received.
            batch: the `PackedBatch` the tokens belong to.
            entered: `(T, hidden)` hidden states with which they entered the layer.
            context: `(T, width)` what its attention has brought together for them.
        """
        score = self.received.float() * received.float().clamp(min=1e-9).log()
        with torch.autocast(received.device.type, enabled=False):  # ranks want more bits than half precision has
            told = self.entered.float() @ self.norms["entered"](entered).T
            told = told + self.context.float() @ self.norms["context"](context).T
        score = score + told[0]
        if self.near:
            score = score + mean_around(told[1], batch, self.near)
        return self.GAIN * score


def mean_around(values, batch, reach):
    """`(T,)` for each token, the mean of `values` `(T,)` over the tokens of its sequence that are at most `reach` places away.

    Example:
        >>> from .packing import PackedBatch
        >>> batch = PackedBatch.from_mask(None, batch_size=2, seq_len=3, device="cpu")
        >>> mean_around(torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0]), batch, 1)
        tensor([ 1.5000,  2.0000,  2.5000, 10.0000, 20.0000, 25.0000])
    """
    rows, width = len(batch.lengths), max(batch.lengths)
    around = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach}
    if batch.total == rows * width:
        return avg_pool1d(values.view(rows, 1, width), **around, count_include_pad=False).view(-1)
    cells = batch.sequence_ids, batch.places
    nothing = values.new_zeros(rows, width)
    told, there = nothing.index_put(cells, values), nothing.index_put(cells, torch.ones_like(values))
    told, there = (avg_pool1d(table[:, None], **around)[:, 0] for table in (told, there))
    return told[cells] / there[cells]
