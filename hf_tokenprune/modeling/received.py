"""A kernel that sums what each token receives of attention, where Triton is there to compile it (with a C compiler beside it)."""

import torch

try:
    import triton
    from triton import language as tl
except ImportError:  # a CPU, or Windows
    triton = None

BLOCK = 64


def sums_over_queries(queries, keys, logs, bounds, longest, scaling):
    """For each key the sum over the queries of its sequence of `exp(scaling * query . key - log)`.

    Args:
        queries, keys: `(T, heads, head_dim)`, of half precision, contiguous.
        logs: `(heads, T)` float32, a number per query.
        bounds: `(sequences + 1,)` int32, where each sequence begins, and where the last ends.
        longest: tokens of the longest sequence.

    Returns:
        `(heads, T)` float32.
    """
    total, heads, size = keys.shape
    sums = torch.empty(heads, total, dtype=torch.float32, device=keys.device)
    grid = (len(bounds) - 1, triton.cdiv(longest, BLOCK), heads)
    _kernel[grid](
        queries, keys, logs, sums, bounds, scaling, total, heads, size, max(triton.next_power_of_2(size), 16), BLOCK,
    )  # fmt: skip
    return sums


if triton is not None:

    @triton.jit
    def _kernel(
        queries, keys, logs, sums, bounds, scaling, total, heads,
        SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        sequence, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        begin, end = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
        first = begin + block * ROWS
        if first < end:
            rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
            mine = first + rows
            where = (mine[None, :].to(tl.int64) * heads + head) * SIZE + columns[:, None]
            key = tl.load(keys + where, mask=(mine < end)[None, :] & (columns < SIZE)[:, None], other=0.0)
            sum_of = tl.zeros([ROWS], dtype=tl.float32)
            for start in range(begin, end, ROWS):
                asking = start + rows
                where = (asking[:, None].to(tl.int64) * heads + head) * SIZE + columns[None, :]
                query = tl.load(queries + where, mask=(asking < end)[:, None] & (columns < SIZE)[None, :], other=0.0)
                log = tl.load(logs + head * total + asking, mask=asking < end, other=float("inf"))
                sum_of += tl.sum(tl.exp(tl.dot(query, key) * scaling - log[:, None]), 0)
            tl.store(sums + head * total + mine, sum_of, mask=mine < end)
