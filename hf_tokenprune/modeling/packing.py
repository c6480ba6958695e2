"""The packed batch: all real tokens of a batch laid end to end, without padding.

A padded batch `(B, S, H)` becomes `(1, T, H)` with `T` real tokens. The sequences lie shortest first, so that sequences
of equal length are neighbours and attention can treat them in one call.

    >>> import torch
    >>> mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    >>> batch = PackedBatch.from_mask(mask, batch_size=2, seq_len=4, device="cpu")
    >>> batch.lengths, batch.index.tolist()
    ([2, 3], [4, 5, 0, 1, 2])
    >>> batch.pack(torch.arange(8.0).view(2, 4, 1)).view(-1).tolist()
    [4.0, 5.0, 0.0, 1.0, 2.0]
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from .errors import UnsupportedInputError
from .kernels import has_kernels, kept_rows

CELLS = 2**24  # pairs of tokens in one padded call of attention at most, so that its memory does not grow with the batch


def sent(numbers, device, dtype=torch.int64):
    """A list of numbers as a tensor on a device. CUDA, which takes such a copy at once, need not be waited for."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=torch.device(device).type == "cuda")


def check_not_empty(batch_size, seq_len):
    """Raise `UnsupportedInputError` if a padded batch has no place for a token."""
    if not batch_size * seq_len:
        raise UnsupportedInputError(
            f"The batch is empty: {batch_size} sequences of {seq_len} tokens. transformers' layers cannot compute it, packed or "
            "not. Leave it out, or pass at least one token."
        )


@dataclass
class PackedBatch:
    """Which token of the padded batch stands where in the packed one.

    Args:
        batch_size: `B` of the padded batch.
        seq_len: `S` of the padded batch.
        lengths: tokens per sequence, in packed order; sequences without a token are listed with 0.
        samples: for each sequence in packed order, its row in the padded batch.
        index: `(T,)` position of each packed token in the padded batch flattened to `B * S`.
        dense: the packed batch is the padded batch, reshaped (no padding, nothing dropped).
        weights: `(T,)` or None. Soft gates of a training step: how much each token still counts as a key.
        masked: weights may be 0: such tokens are as good as gone, but wait here for a gradient.
        between: relative positions of these tokens, as `padded.py` has made them.
        thinned: tokens have been dropped from among these.
        begins: every sequence has a token at its first position in the padded batch; not known of thinned ones.
    """

    batch_size: int
    seq_len: int
    lengths: list[int]
    samples: list[int]
    index: torch.Tensor
    dense: bool = False
    weights: torch.Tensor | None = field(default=None, repr=False)
    masked: bool = False
    between: dict = field(default_factory=dict, repr=False)
    thinned: bool = False
    begins: bool = True

    @classmethod
    def from_mask(cls, mask, *, batch_size, seq_len, device):
        """Lay out a padded batch from its 2-D mask `(B, S)` (1 or True = real token), or None for no padding."""
        check_not_empty(batch_size, seq_len)
        everything = torch.arange(batch_size * seq_len, device=device)
        samples = list(range(batch_size))
        if mask is None:
            return cls(batch_size, seq_len, [seq_len] * batch_size, samples, everything, dense=True)
        if mask.shape != (batch_size, seq_len):
            raise UnsupportedInputError(
                f"attention_mask has the shape {tuple(mask.shape)}, but the inputs are {(batch_size, seq_len)}. A packed "
                "model takes a 2-D mask with one entry per token; 3-D and 4-D masks cannot be packed."
            )
        mask = mask.to(device=device, dtype=torch.bool)
        lengths, begin = torch.stack([mask.sum(1), mask[:, 0]]).tolist()
        if not any(lengths):  # layers cannot run on no token at all: let one stand for the empty batch
            mask = mask.clone()
            mask[0, 0], lengths[0], begin[0] = True, 1, 1
        if min(lengths, default=0) == seq_len:
            return cls(batch_size, seq_len, lengths, samples, everything, dense=True)
        order = sorted(samples, key=lengths.__getitem__)
        batch = cls(batch_size, seq_len, [lengths[i] for i in order], order, everything)
        batch.begins = all(begin[i] for i in samples if lengths[i])
        flat, total = mask.reshape(-1), sum(lengths)
        if has_kernels(mask.device):
            bounds, places = range(0, batch_size * seq_len + 1, seq_len), [(0, 0)] * batch_size
            for sample, place in zip(order, pairwise(batch.starts), strict=True):
                places[sample] = place
            bounds, left, right = (
                sent(list(numbers), mask.device, torch.int32) for numbers in (bounds, *zip(*places, strict=True))
            )
            batch.index, _ = kept_rows(flat, everything, bounds, left, right, total)
            return batch
        batch.index = rows_of(flat, total)
        if order != samples:
            starts = [0, *accumulate(lengths)]
            batch.index = batch.index[sent([starts[i] for i in order], mask.device)[batch.sequence_ids] + batch.places]
        return batch

    @property
    def total(self):
        """`T`, the number of tokens in the packed batch."""
        return self.index.shape[0]

    @cached_property
    def starts(self):
        """Where each sequence begins in the packed batch; one entry more than there are sequences."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def runs(self):
        """Neighbouring sequences of equal length: `(start, count, length)` with `start` a packed position."""
        runs = []
        for start, length in zip(self.starts, self.lengths, strict=False):
            if length == 0:
                continue
            if runs and runs[-1][2] == length:
                runs[-1][1] += 1
            else:
                runs.append([start, 1, length])
        return [tuple(run) for run in runs]

    def bundles(self, waste):
        """Neighbouring sequences for one call of attention, each padded to the longest of its bundle.

        Args:
            waste: the share of a bundle's cells that may be padding. With 0 these are the `runs`. No bundle has more than
                `CELLS` pairs of cells, but for one of a single sequence.

        Returns:
            `[(start, lengths)]`, `start` a packed position.
        """
        if waste == 0:
            return [(start, [length] * count) for start, count, length in self.runs]
        bundles = []
        for start, length in zip(self.starts, self.lengths, strict=False):
            if length == 0:
                continue
            with_it = [*bundles[-1][1], length] if bundles else []
            cells = len(with_it) * max(with_it, default=0)
            if with_it and sum(with_it) >= (1 - waste) * cells and cells * max(with_it) <= CELLS:
                bundles[-1][1].append(length)
            else:
                bundles.append((start, [length]))
        return bundles

    @cached_property
    def counts(self):
        """`(number of sequences,)` the lengths, on the device."""
        return sent(self.lengths, self.index.device)

    @cached_property
    def bounds(self):
        """`(number of sequences + 1,)` int32, where each sequence begins, on the device, and where the last ends."""
        return sent(self.starts, self.index.device, torch.int32)

    @cached_property
    def ends(self):
        """`bounds` of the sequences that are not empty."""
        return self.bounds if all(self.lengths) else sent(list(dict.fromkeys(self.starts)), self.index.device, torch.int32)

    @cached_property
    def gapless(self):
        """Are neighbours in a packed sequence neighbours in the padded one, too? (False if that is not known for sure.)"""
        if self.dense or self.thinned:
            return self.dense
        spans = self.positions[self.last_rows] - self.positions[self.first_rows] + 1
        return spans.tolist() == [length for length in self.lengths if length]

    @cached_property
    def sequence_ids(self):
        """`(T,)` for each token, the number of its sequence in packed order."""
        numbers = torch.arange(len(self.lengths), device=self.index.device)
        return torch.repeat_interleave(numbers, self.counts, output_size=self.total)

    @cached_property
    def places(self):
        """`(T,)` for each token, its place within its own sequence as it is now: 0, 1, 2, ..."""
        return torch.arange(self.total, device=self.index.device) - self.bounds[self.sequence_ids]

    @cached_property
    def positions(self):
        """`(T,)` for each token, its position in the padded sequence it came from."""
        return self.index % self.seq_len

    @cached_property
    def first_rows(self):
        """`(number of non-empty sequences,)` packed row of the first token of each sequence."""
        return self.ends[:-1].long()

    @cached_property
    def last_rows(self):
        """`(number of non-empty sequences,)` packed row of the last token of each sequence."""
        return self.ends[1:].long() - 1

    def pack(self, padded):
        """`(B, S, *rest)` or, for something all samples share, `(1, S, *rest)` -> `(1, T, *rest)`."""
        if padded.shape[0] == 1 and self.batch_size > 1:
            return padded[:, self.positions]
        flat = padded.reshape(1, self.batch_size * self.seq_len, *padded.shape[2:])
        return flat if self.dense else flat[:, self.index]

    def unpack(self, packed, before=(), onto=None):
        """`(1, T, H)` -> `(B, S, H)`; zeros where nothing is known.

        Args:
            packed: hidden states of the tokens of this batch.
            before: pairs `(index, states)` of earlier states, oldest first: flat positions `(D,)` and `(1, D, H)`, in the first pair
                of all tokens there are. A token has the latest that is known of it.
            onto: `(B * S, H)` earlier states as they are to be, or None; they are written over.
        """
        if self.dense:
            return packed.reshape(self.batch_size, self.seq_len, packed.shape[-1])
        index, rows = self.index, packed[0]
        if before:  # one selection of rows, whose gradient costs no more than they do
            known = [*(earlier for earlier, _ in before), index]
            latest = torch.zeros(self.batch_size * self.seq_len, dtype=torch.long, device=index.device)
            for some, start in zip(known, accumulate(map(len, known), initial=0), strict=False):
                latest[some] = torch.arange(start, start + len(some), device=index.device)
            index = known[0]
            rows = torch.cat([*(states[0].to(rows.dtype) for _, states in before), rows]).index_select(0, latest[index])
        flat = rows.new_zeros(self.batch_size * self.seq_len, rows.shape[-1]) if onto is None else onto.to(rows.dtype)
        return flat.index_copy_(0, index, rows).view(self.batch_size, self.seq_len, -1)

    @cached_property
    def lengths_by_token(self):
        """`(T,)` how long the sequence of each token is."""
        return self.counts[self.sequence_ids]

    def choose(self, stays, weights=None, lengths=None):
        """The tokens that stay, `(T,)` bool, with their `weights` `(T,)` if they are soft.

        Returns:
            `(rows, batch)`: their rows `(K,)`, ascending, and the batch of them alone. The device is asked once, for the `lengths`,
            unless these are known.
        """
        if lengths is None:
            lengths = torch.zeros_like(self.counts).index_add_(0, self.sequence_ids, stays.to(self.counts.dtype)).tolist()
        if not has_kernels(stays.device):
            rows = rows_of(stays, sum(lengths))
            return rows, self._of(rows, lengths, weights)
        bounds = sent([0, *accumulate(lengths)], stays.device, torch.int32)
        rows, index = kept_rows(stays, self.index, self.bounds, bounds[:-1], bounds[1:], sum(lengths))
        chosen = self._of(rows, lengths, weights, index)
        chosen.__dict__["bounds"] = bounds
        return rows, chosen

    def one_each(self, rows):
        """The batch of one token of each sequence, those at `rows`."""
        return self._of(rows, [min(length, 1) for length in self.lengths])

    def _of(self, rows, lengths, weights=None, index=None):
        return PackedBatch(
            self.batch_size, self.seq_len, lengths, self.samples, self.index[rows] if index is None else index,
            weights=None if weights is None else weights[rows], masked=self.masked, thinned=True,
        )  # fmt: skip

    def with_weights(self, weights, masked=False):
        """The same tokens, with other `weights` `(T,)`."""
        return replace(self, weights=weights, masked=masked)


def rows_of(mask, count):
    """`(count,)` ascending, the rows where a mask `(T,)` is True, which are `count` many. The device need not be asked how many.

    Example:
        >>> rows_of(torch.tensor([False, True, True]), 2)
        tensor([1, 2])
    """
    if mask.device.type == "cpu":
        rows = mask.nonzero().squeeze(1)
        if len(rows) != count:
            raise RuntimeError(
                f"{len(rows)} tokens stay, not {count}: what a selector keeps is not what it counts, or has changed."
            )
        return rows
    return scattered_rows(mask, count)


def scattered_rows(mask, count):
    """As `rows_of`, without looking at how many there are."""
    everyone = torch.arange(len(mask), device=mask.device)
    target = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return everyone.new_zeros(count + 1).scatter_(0, target, everyone)[:count]
