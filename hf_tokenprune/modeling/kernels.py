"""What torch has no operator for, in one kernel each, where Triton and a GPU are there: what tokens receive, how they rank, which
rows stay.

A site would otherwise launch some sixty operations, and on a GPU that soon has nothing left to do, launching is what takes the time.
"""

from contextlib import nullcontext
from functools import cache

import torch
from transformers.utils import logging

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)


@cache
def has_kernels(device):
    """Do these kernels run on this device? Triton may be there and miss something all the same, a C compiler for instance."""
    if device.type != "cuda" or torch.version.hip or triton is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        _try(device)
    except torch.OutOfMemoryError:  # another time there may be more
        raise
    except Exception as error:
        logger.warning(
            f"Triton's kernels do not run here, so that dropping tokens takes longer and, with long texts, much memory: {error}"
        )
        return False
    return True


def _try(device):
    """Run each kernel on one token."""
    bounds, head = torch.tensor([0, 1], dtype=torch.int32, device=device), torch.zeros(1, 1, 16, device=device)
    received(head.half(), head.half(), head[0, :, :1], bounds, 1, 1.0)
    ranks(head[0, 0, :1], bounds[1:] > 0, bounds, 1)
    kept_rows(bounds[1:] > 0, bounds[:1].long(), bounds, bounds[:1], bounds[1:], 1)


def _at_hand(*tensors):
    """Tensors as the kernels read them: of one device, without gaps."""
    if len({tensor.device for tensor in tensors}) > 1:
        raise RuntimeError(f"Tensors of a packed batch are on several devices: {', '.join(str(t.device) for t in tensors)}.")
    return [tensor.contiguous() for tensor in tensors]


def _on(device):
    """A context in which Triton launches on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def received(queries, keys, sums, bounds, longest, scaling, say=None):
    """The attention that each token receives, mean over heads and queries, without the matrices of attention ever being there.

    Args:
        queries, keys: `(T, heads, head_dim)` in half precision.
        sums: `(heads, T)` float32, for each query the log of its sum over keys, as attention kernels give it.
        bounds: `(sequences + 1,)` int32, where each sequence begins, and where the last ends.
        longest: tokens of the longest sequence.
        scaling: what the products of queries and keys are multiplied by.
        say: `(heads,)` float32, how much each head counts in the mean; None = all alike.

    Returns:
        `(T,)` float32.
    """
    queries, keys = (x if x.stride(2) == 1 else x.contiguous() for x in (queries, keys))
    sums, bounds = _at_hand(sums, bounds)
    total, heads, size = queries.shape
    out = torch.empty(total, dtype=torch.float32, device=queries.device)
    wide = max(triton.next_power_of_2(size), 16)
    block = 64 if wide <= 128 else 32
    with _on(queries.device):
        _received[len(bounds) - 1, triton.cdiv(longest, block)](
            queries, keys, sums, sums if say is None else say / say.sum(), bounds, out, scaling,
            queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1), sums.stride(0),
            heads=heads, said=say is not None, size=size, wide=wide, block=block,
        )  # fmt: skip
    return out


def ranks(importance, protected, bounds, longest):
    """`(rank, relative)` as `ranking.relative_rank` has them.

    Args:
        importance: `(T,)` float32.
        protected: `(T,)` bool.
        bounds, longest: as for `received`.
    """
    importance, protected, bounds = _at_hand(importance, protected, bounds)
    rank = torch.empty(importance.shape, dtype=torch.int64, device=importance.device)
    relative = torch.empty(importance.shape, dtype=torch.float32, device=importance.device)
    block = 64
    with _on(importance.device):
        _ranks[len(bounds) - 1, triton.cdiv(longest, block)](
            importance, protected.view(torch.uint8), bounds, rank, relative, block=block
        )
    return rank, relative


def kept_rows(stays, index, bounds, left, right, total):
    """The rows where a mask is True, ascending, and their `index`.

    Args:
        stays: `(T,)` bool.
        index: `(T,)` int64.
        bounds: as for `received`.
        left, right: int32, where those of each sequence are to begin, and where to end.
        total: how many there are.
    """
    stays, index, bounds, left, right = _at_hand(stays, index, bounds, left, right)
    even = total + total % 2  # so that both rows begin where Triton likes it
    chosen = torch.zeros(2, even, dtype=torch.int64, device=index.device)[:, :total]
    with _on(index.device):
        _kept_rows[(len(left),)](stays.view(torch.uint8), index, bounds, left, right, chosen[0], chosen[1], block=512)
    return chosen[0], chosen[1]


if triton is not None:

    @triton.jit(do_not_specialize=["s_head"])
    def _received(
        queries, keys, sums, say, bounds, out, scaling, q_row, q_head, k_row, k_head, s_head,
        heads: tl.constexpr, said: tl.constexpr, size: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        start, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
        first = start + tl.program_id(1) * block
        if first < end:
            places, dims = tl.arange(0, block), tl.arange(0, wide)
            mine = first + places
            taken = tl.zeros((block,), tl.float32)
            for head in range(heads):
                here = (mine < end)[:, None] & (dims < size)[None, :]
                key = tl.load(
                    keys + mine.to(tl.int64)[:, None] * k_row + tl.cast(head, tl.int64) * k_head + dims[None, :],
                    mask=here,
                    other=0.0,
                )
                of_head = tl.zeros((block,), tl.float32)
                for begin in range(start, end, block):
                    theirs = begin + places
                    asks = theirs < end
                    there = asks[:, None] & (dims < size)[None, :]
                    query = tl.load(
                        queries + theirs.to(tl.int64)[:, None] * q_row + tl.cast(head, tl.int64) * q_head + dims[None, :],
                        mask=there,
                        other=0.0,
                    )
                    total = tl.load(sums + head * s_head + theirs, mask=asks, other=float("inf"))
                    scores = tl.dot(query, tl.trans(key)) * scaling - total[:, None]
                    of_head += tl.sum(tl.exp(scores), 0)
                weight = tl.load(say + head) if said else 1.0 / heads
                taken += of_head * weight
            tl.store(out + mine, taken / (end - start), mask=mine < end)

    @triton.jit
    def _ranks(importance, protected, bounds, rank, relative, block: tl.constexpr):
        start, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
        first = start + tl.program_id(1) * block
        if first < end:
            places = tl.arange(0, block)
            mine = first + places
            score = tl.load(importance + mine, mask=mine < end, other=0.0)
            score = tl.where(score != score, float("inf"), score)
            before = tl.zeros((block,), tl.int32)
            droppable = tl.zeros((block,), tl.int32)
            for begin in range(start, end, block):
                theirs = begin + places
                there = theirs < end
                free = there & (tl.load(protected + theirs, mask=there, other=1) == 0)
                other = tl.load(importance + theirs, mask=there, other=0.0)
                other = tl.where(other != other, float("inf"), other)
                tie = (other[None, :] == score[:, None]) & (theirs[None, :] < mine[:, None])
                above = ((other[None, :] > score[:, None]) | tie) & free[None, :]
                before += tl.sum(above.to(tl.int32), 1)
                droppable += free.to(tl.int32)
            among = tl.maximum(tl.sum(droppable, 0), 1).to(tl.float32)
            tl.store(rank + mine, before.to(tl.int64), mask=mine < end)
            # To the last bit what the host makes of these numbers.
            share = tl.div_rn(before.to(tl.float32) + 0.5, tl.zeros((block,), tl.float32) + among)
            tl.store(relative + mine, share, mask=mine < end)

    @triton.jit
    def _kept_rows(stays, index, bounds, left, right, chosen, chosen_index, block: tl.constexpr):
        start, end = tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)
        place, stop = tl.load(left + tl.program_id(0)), tl.load(right + tl.program_id(0))
        for begin in range(start, end, block):
            mine = begin + tl.arange(0, block)
            keep = tl.load(stays + mine, mask=mine < end, other=0).to(tl.int32)
            target = place + tl.cumsum(keep, 0) - 1
            fits = (keep != 0) & (target < stop)  # whatever a selector counts
            tl.store(chosen + target, mine.to(tl.int64), mask=fits)
            tl.store(chosen_index + target, tl.load(index + mine, mask=mine < end, other=0), mask=fits)
            place += tl.sum(keep, 0)
