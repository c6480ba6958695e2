"""Selectors: who survives a site. (Not named selectors.py: beside a script it would hide the standard library's.)

A selector sees the importance of the tokens of a packed batch and says which of them stay. All of them are deterministic,
look at one sequence at a time, and never drop a protected token.
"""

import math

import torch
from torch import nn

from .cutting import cut_parameter
from .errors import ConfigError
from .ranking import most_important, relative_rank, relative_ranks
from .scoring import Scorer

SELECTORS = {}

INCOMPLETE = (
    "Load a complete checkpoint; or, if the plain class of transformers has written this one, which trains and saves all but that, "
    "take token_pruning and auto_map out of its config.json: its weights are of a model that drops nothing."
)


def register_selector(cls):
    """Make a `Selector` known under its `kind`, the word that stands for it in `config.token_pruning`."""
    SELECTORS[cls.kind] = cls
    return cls


class OnHost:
    """What a buffer holds as plain numbers, fetched from the device only when it has changed."""

    def __init__(self):
        self.state, self.numbers = None, None

    def of(self, buffer):
        """`buffer.tolist()`."""
        if buffer.is_inference():
            return buffer.tolist()
        state = id(buffer), buffer.data_ptr(), buffer._version
        if self.state != state:
            self.state, self.numbers = state, buffer.tolist()
        return self.numbers


class Selector(nn.Module):
    """Base class. A selector says which tokens of a packed batch survive its site; `keep` is all it must define."""

    kind: str
    before = False  # `Skim`: tokens leave before the layer rather than after its attention
    needs_importance = True

    def keep(self, importance, batch, protected):
        """`(T,)` bool: which tokens stay. `importance` `(T,)` is None if `needs_importance` is False."""
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "keep" in vars(cls) and "counts" not in vars(cls):
            cls.counts = Selector.counts

    def counts(self, droppable):
        """How many tokens `keep` lets stay in sequences of so many droppable ones (a list), if it depends on that alone; else None.
        The host need not wait for the device then."""
        return None

    def settings(self):
        """What `config.token_pruning` says of this selector besides its kind."""
        return {}

    def reset(self):
        """Give buffers that a checkpoint did not hold a defined value."""

    def macs(self, tokens):
        """MACs this selector itself spends on `tokens` tokens."""
        return 0

    def cut_hidden(self, index, on_cut=None):
        """The model's hidden units are cut down to those at `index`: cut what reads them, after telling `on_cut`."""

    def cut_context(self, index, on_cut=None):
        """What the layer's attention brings together is cut down to what is at `index`: the same."""


@register_selector
class RankBins(Selector):
    """ToP's selector (arXiv 2306.14393, section 4.2): keep or drop whole bins of relative rank.

    A droppable token with relative rank `u` falls in bin `floor(u * bins)` and stays if that bin is kept.

    Args:
        bins: number of bins; bin 0 holds the most important tokens of every sequence.
        hidden, width: the model's hidden size, and heads x head size, for an importance that is learned (see `Scorer`); None =
            importance is the attention received.
        near: how many neighbours to either side a learned importance reads, too.

    Example:
        >>> selector = RankBins(bins=4)
        >>> selector.set_kept([True, True, False, False])   # keep the more important half
    """

    kind = "rank_bins"

    def __init__(self, bins=50, hidden=None, width=None, near=0):
        super().__init__()
        if not isinstance(bins, int) or isinstance(bins, bool) or not 1 <= bins <= 10_000:
            raise ConfigError(f"RankBins(bins={bins!r}): bins is a whole number from 1 to 10000.")
        for name, value in (("hidden", hidden), ("width", width)):
            if (hidden, width) != (None, None) and (type(value) is not int or not 1 <= value <= 1_000_000):
                raise ConfigError(
                    f"RankBins({name}={value!r}): {name} is a whole number from 1 to a million, or both are None."
                )
        if type(near) is not int or not 0 <= near <= 10_000 or (near and hidden is None):
            raise ConfigError(f"RankBins(near={near!r}): near is a whole number from 0 to 10000, 0 without hidden and width.")
        self.bins, self.hidden, self.width, self.near = bins, hidden, width, near
        self.scorer = None if hidden is None else Scorer(hidden, width, near).requires_grad_(False)  # until somebody teaches it
        self.register_buffer("kept", torch.ones(bins, dtype=torch.int8))
        self.on_host, self.known = OnHost(), (None, {})

    def set_kept(self, kept):
        """Say which bins are kept: `bins` booleans, bin 0 (most important) first."""
        kept = torch.as_tensor(kept)
        if kept.shape != (self.bins,) or ((kept != 0) & (kept != 1)).any():
            raise ConfigError(f"RankBins(bins={self.bins}).set_kept({kept.tolist()}): give {self.bins} booleans.")
        self.kept.copy_(kept.to(torch.int8), non_blocking=self.kept.device.type == "cuda")  # others read it when it is gone

    def keep(self, importance, batch, protected):
        pattern = self.pattern()
        if not {0, 1}.issuperset(pattern):
            raise ConfigError(
                "This checkpoint does not say which tokens its sites keep (a `token_pruner.sites.*.kept` tensor is missing "
                f"from its safetensors file, or damaged). {INCOMPLETE}"
            )
        _, relative = relative_rank(importance, batch, protected)
        return self.kept[self.bin_of(relative)].bool() | protected

    def counts(self, droppable):
        pattern = self.pattern()
        if self.known[0] != pattern:
            self.known = (pattern, {})
        known = self.known[1]
        for n in set(droppable) - known.keys():
            known[n] = sum(pattern[i] for i in self.bin_of(relative_ranks(n)).tolist())
        return [known[n] for n in droppable]

    def pattern(self):
        """The kept bins as a list of 1, 0 (or -1 = unknown)."""
        return self.on_host.of(self.kept)

    @property
    def needs_importance(self):
        return self.pattern() != [1] * self.bins

    def bin_of(self, relative):
        """`(T,)` bin of each relative rank."""
        # A rank on the edge of a bin must not fall below it because `relative` is rounded.
        return ((relative + 5e-7) * self.bins).long().clamp(max=self.bins - 1)

    def settings(self):
        learned = {} if self.scorer is None else {"hidden": self.hidden, "width": self.width}
        near = {"near": self.near} if self.near else {}
        return {"bins": self.bins, **learned, **near}

    @property
    def reads(self):
        """MACs of the scorer per token."""
        return 0 if self.scorer is None else (self.hidden + self.width) * (2 if self.near else 1)

    def macs(self, tokens):
        return tokens * self.reads if self.needs_importance else 0

    def reset(self):
        self.kept.fill_(-1)

    def cut_hidden(self, index, on_cut=None):
        if self.scorer is not None:
            cut_parameter(self.scorer.entered, 1, index, on_cut)
            self.hidden = len(index)

    def cut_context(self, index, on_cut=None):
        if self.scorer is not None:
            cut_parameter(self.scorer.context, 1, index, on_cut)
            self.width = len(index)


@register_selector
class TopK(Selector):
    """Keep the most important tokens: a share of them, or a number.

    Args:
        keep: a float in (0, 1] keeps that share of the droppable tokens of every sequence, rounded; a whole number keeps so
            many of them.

    Example:
        >>> TopK(keep=0.5), TopK(keep=32)
        (TopK(keep=0.5), TopK(keep=32))
    """

    kind = "top_k"

    def __init__(self, keep=0.5):
        super().__init__()
        whole = isinstance(keep, int) and not isinstance(keep, bool) and 1 <= keep <= 1_000_000
        share = isinstance(keep, float) and 0 < keep <= 1
        if not (whole or share):
            raise ConfigError(
                f"TopK(keep={keep!r}): keep is a share in (0, 1] (a float) or a number of tokens from 1 to a million (an int)."
            )
        self.share, self.known = keep, {}

    def counts(self, droppable):
        for n in set(droppable) - self.known.keys():
            few = isinstance(self.share, int)
            self.known[n] = min(self.share, n) if few else int((relative_ranks(n) < self.share).sum())
        return [self.known[n] for n in droppable]

    def keep(self, importance, batch, protected):
        rank, relative = relative_rank(importance, batch, protected)
        stays = rank < self.share if isinstance(self.share, int) else relative < self.share
        return stays | protected

    def settings(self):
        return {"keep": self.share}

    def extra_repr(self):
        return f"keep={self.share}"


@register_selector
class Skim(Selector):
    """Infor-Coef's token sampler (arXiv 2305.12458): a small network looks at each token before a layer and says whether it stays.

    LayerNorm, Linear to `width`, LayerNorm, GELU, Linear to two logits: drop and keep. At inference a token stays if keep wins.

    Args:
        hidden: the model's hidden size.
        width: units of the small network. With 16 it costs less than 1 % of a layer.

    Example:
        >>> sampler = Skim(hidden=384, width=16)
        >>> sampler.macs(1)  # keeps everything so far, without looking
        0
        >>> _ = sampler.offset.fill_(0.0)
        >>> sampler.macs(1)
        6176
    """

    kind = "skim"
    before = True
    needs_importance = False
    START = 1.75  # logit of keeping at first, and minus that of dropping: kept with probability 0.97
    GAIN = 10.0  # of the last Linear: a sampler has to learn within an epoch, at the learning rate of the weights

    def __init__(self, hidden, width=16):
        super().__init__()
        for name, value, most in (("hidden", hidden, 1_000_000), ("width", width, 10_000)):
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"Skim({name}={value!r}): {name} is a whole number from 1 to {most}.")
        self.hidden, self.width = hidden, width
        self.net = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 2)
        )
        with torch.no_grad():
            self.net[4].weight.zero_()
            self.net[4].bias.copy_(torch.tensor([-self.START, self.START]) / self.GAIN)
        # Added to the logit of keeping; infinite while everything is kept. Training moves it to meet a budget.
        self.register_buffer("offset", torch.tensor(float("inf")))
        self.on_host = OnHost()

    def logits(self, states):
        """`(T, H)` hidden states -> `(T, 2)` logits of dropping and of keeping."""
        with torch.autocast(states.device.type, enabled=False):  # as in `Scorer`
            logits = self.GAIN * self.net(states.to(self.net[0].weight.dtype)).float()
        offset = self.offset_value()
        return logits if math.isinf(offset) else torch.stack([logits[:, 0], logits[:, 1] + self.offset], dim=1)

    def keep(self, states, batch, protected, one_each=True):
        """`(T,)` bool: which tokens stay, from their hidden states `(T, H)`. `one_each`: of a sequence without a protected token one
        stays all the same."""
        if math.isnan(self.offset_value()):
            raise ConfigError(
                "This checkpoint does not hold its token samplers (a `token_pruner.sites.*` tensor is missing from its "
                f"safetensors file). {INCOMPLETE}"
            )
        logits = self.logits(states)
        stays = ~(logits[:, 1] <= logits[:, 0]) | protected  # where they are NaN, nothing is dropped
        return stays | most_important(logits[:, 1] - logits[:, 0], batch, protected) if one_each else stays

    def offset_value(self):
        """The offset as a float."""
        return self.on_host.of(self.offset)

    @property
    def idle(self):
        """Does every token stay, so that nobody has to look?"""
        return self.offset_value() == math.inf

    def settings(self):
        return {"hidden": self.hidden, "width": self.width}

    def reset(self):
        self.offset.fill_(float("nan"))

    def macs(self, tokens):
        return 0 if self.idle else tokens * (self.hidden * self.width + 2 * self.width)

    def cut_hidden(self, index, on_cut=None):
        for parameter, dim in ((self.net[0].weight, 0), (self.net[0].bias, 0), (self.net[1].weight, 1)):
            cut_parameter(parameter, dim, index, on_cut)
        self.hidden = len(index)
        self.net[0].normalized_shape, self.net[1].in_features = (self.hidden,), self.hidden
