"""Attention as it runs on a GPU: one kernel for sequences of all lengths, or few padded calls. Without a GPU the arguments of the
kernel are checked by a slow stand-in for it, and the padded calls against one call per length."""

import itertools

import pytest
import torch
from families import CASES, build, make_inputs, outputs_of

import hf_tokenprune as tp
from hf_tokenprune.modeling import attention, varlen
from hf_tokenprune.modeling.packing import PackedBatch

LENGTHS = (3, 1, 11, 0, 9, 3, 10, 2, 5)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def batch_of(lengths=LENGTHS, size=12):
    mask = torch.arange(size)[None] < torch.tensor(lengths)[:, None]
    return PackedBatch.from_mask(mask, batch_size=len(lengths), seq_len=size, device="cpu")


def heads(total, dtype=torch.float32):
    return [torch.randn(1, count, total, 8).to(dtype).requires_grad_() for count in (4, 2, 2)]


OPTIONS = [
    (causal, window, importance, weights, asks)
    for causal, window, importance, weights, asks in itertools.product(
        (False, True), (None, 3), (False, True), (None, "soft", "masked"), (False, True)
    )
    if not (importance and asks)
]


@pytest.mark.parametrize(("causal", "window", "importance", "weights", "asks"), OPTIONS)
def test_padded_bundles_give_what_runs_of_equal_length_give(monkeypatch, causal, window, importance, weights, asks):
    torch.manual_seed(0)
    batch, found = batch_of(), []
    q, k, v = heads(batch.total)
    inputs, chosen = [q, k, v], batch
    if weights:
        weight = torch.rand(batch.total) + 0.1
        if weights == "masked":
            weight = weight * (torch.rand(batch.total) < 0.7)
            weight[batch.first_rows] = 1.0
        inputs.append(weight.requires_grad_())
        chosen = batch.with_weights(weight, masked=weights == "masked")
    rows = (batch.last_rows if causal else batch.first_rows) if asks else None
    bundles = PackedBatch.bundles
    for waste in (0, 0.6):
        monkeypatch.setattr(PackedBatch, "bundles", lambda batch, _, waste=waste: bundles(batch, waste))
        context, received = attention.packed_attention(
            q, k, v, chosen, causal=causal, window=window, importance=importance, asking=rows
        )
        loss = (context * torch.arange(context.numel()).view_as(context).cos()).sum()
        if importance:
            loss = loss + (received * torch.arange(batch.total).cos()).sum()
        parts = [context, received] if importance else [context]
        found.append([*parts, *torch.autograd.grad(loss, inputs)])
    assert len(bundles(batch, 0.6)) < len(bundles(batch, 0)) == 7
    for padded, exact in zip(*found, strict=True):
        torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-5)


def test_bundles_waste_no_more_than_they_may():
    batch = batch_of([10, 9, 5, 2, 1, 0, 12], 12)
    assert batch.bundles(0.2) == [(0, [1]), (1, [2]), (3, [5]), (8, [9, 10, 12])]
    assert batch.bundles(0) == [(start, [length] * count) for start, count, length in batch.runs]


def test_bundles_stay_small(monkeypatch):
    monkeypatch.setattr("hf_tokenprune.modeling.packing.CELLS", 200)
    assert [len(lengths) for _, lengths in batch_of([10] * 5, 12).bundles(0.2)] == [2, 2, 1]


def slow_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False, return_aux=None
):
    """What torch documents of `varlen_attn`, one sequence at a time; logs of sums as its kernel gives them, `(heads, T)`."""
    assert query.is_contiguous()
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert (query.shape[1] != key.shape[1]) == enable_gqa
    sizes = [ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k)]
    assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
    out, logs = [], []
    for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        apart = torch.arange(len(k)) - torch.arange(len(k))[-len(q) :, None]  # the last queries ask
        left, right = window_size
        seen = torch.ones_like(apart, dtype=torch.bool)
        seen = seen if left < 0 else seen & (apart >= -left)
        seen = seen if right < 0 else seen & (apart <= right)
        scores = scores.masked_fill(~seen, float("-inf"))
        logs.append(scores.logsumexp(-1))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.float()).to(q.dtype))
    return torch.cat(out) if return_aux is None else (torch.cat(out), torch.cat(logs, 1))


@pytest.fixture
def kernel(monkeypatch):
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        return slow_kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", called)
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    return calls


@pytest.mark.parametrize(("causal", "window", "asks"), [(False, None, False), (True, None, False), (False, 3, False),
                                                        (True, 3, False), (False, None, True)])  # fmt: skip
def test_the_kernel_is_called_right(kernel, monkeypatch, causal, window, asks):
    torch.manual_seed(0)
    batch = batch_of()
    q, k, v = heads(batch.total, torch.bfloat16)
    options = {"causal": causal, "window": window, "asking": batch.first_rows if asks else None}
    by_kernel, _ = attention.packed_attention(q, k, v, batch, **options)
    assert len(kernel) == 1
    monkeypatch.setattr(varlen, "varlen_attn", None)
    otherwise, _ = attention.packed_attention(q, k, v, batch, **options)
    torch.testing.assert_close(by_kernel, otherwise, rtol=0.02, atol=0.02)


def test_a_kernel_that_knows_no_shared_heads(kernel, monkeypatch):
    """That of torch 2.11."""
    batch = batch_of()
    q, k, v = heads(batch.total, torch.bfloat16)
    with torch.no_grad():
        context, received = attention.packed_attention(q, k, v, batch, importance=True)
        monkeypatch.setattr(varlen, "KNOWN", {})
        otherwise, same = attention.packed_attention(q, k, v, batch, importance=True)
    torch.testing.assert_close((otherwise, same), (context, received))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("strength", "offset"), [(1.0, 0.0), (100.0, 0.0), (1.0, 100.0)])
def test_importance_without_the_matrices_of_attention(kernel, monkeypatch, dtype, strength, offset):
    """Also where attention is sharp, or the scores of a query all large, which the softmax does not see."""
    torch.manual_seed(0)
    batch = batch_of()
    q, k, v = heads(batch.total, dtype)
    with torch.no_grad():
        k[..., 0] = 1.0
        q = q * strength * torch.rand(1, 4, batch.total, 1)
        q[..., 0] += offset * torch.randn(1, 4, batch.total)
        q = q.to(dtype)
        context, received = attention.packed_attention(q, k, v, batch, importance=True)
        assert len(kernel) == 2
        monkeypatch.setattr(varlen, "varlen_attn", None)
        otherwise, expected = attention.packed_attention(*(x.float() for x in (q, k, v)), batch, importance=True)
    torch.testing.assert_close(context.float(), otherwise, rtol=0.02, atol=0.02)
    torch.testing.assert_close(received, expected, rtol=0.001, atol=1e-5)
    sums = torch.zeros(len(batch.lengths)).index_add(0, batch.sequence_ids, received)
    torch.testing.assert_close(sums, (torch.tensor(batch.lengths) > 0).float(), rtol=0.001, atol=0)


def test_the_kernel_is_left_alone_where_it_would_be_wrong(kernel):
    batch = batch_of()
    thin = batch.select(torch.arange(batch.total)[::2])
    half, full = heads(batch.total, torch.bfloat16), heads(batch.total)
    attention.packed_attention(*full, batch)
    attention.packed_attention(*half, batch, importance=True)  # with gradients
    with torch.no_grad():
        attention.packed_attention(*half, batch, importance=True, training=True)
        attention.packed_attention(*half, batch.with_weights(torch.ones(batch.total)), importance=True)
        attention.packed_attention(*half, batch, importance=True, causal=True)
        attention.packed_attention(*half, batch, importance=True, say=torch.ones(4))
    attention.packed_attention(*half, batch, dropout=0.1)
    attention.packed_attention(*half, batch, causal=True, asking=batch.last_rows)
    attention.packed_attention(*half, batch, window=3, asking=batch.first_rows)
    attention.packed_attention(*(x[:, :, ::2] for x in half), thin, window=3)
    assert not kernel
    attention.packed_attention(*(x[:, :, ::2] for x in half), thin)
    assert len(kernel) == 1


def test_a_window_knows_of_holes_in_the_mask():
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2] = 0
    holes = PackedBatch.from_mask(mask, batch_size=2, seq_len=6, device="cpu")
    left = PackedBatch.from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), batch_size=2, seq_len=4, device="cpu")
    assert (holes.gapless, left.gapless, left.select(torch.arange(3)).gapless) == (False, True, False)


@needs_gpu
@pytest.mark.parametrize(("name", "head"), [case for case in CASES if case[1] in ("Model", "ForSequenceClassification")])
def test_keep_all_equals_dense_on_a_gpu(name, head):
    dense, inputs = build(name, head).cuda(), {key: value.cuda() for key, value in make_inputs(name, head).items()}
    expected = outputs_of(dense, inputs)
    found = outputs_of(tp.pack(dense), inputs)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_gives_what_the_cpu_gives(dtype):
    torch.manual_seed(0)
    config = {"hidden_size": 64, "num_attention_heads": 4}  # a head size that the kernel takes
    model = build("bert", "ForSequenceClassification", **config)
    inputs = make_inputs("bert", "ForSequenceClassification", lengths=(17, 5, 30, 17, 1))
    tp.attach(model, {1: tp.TopK(0.5), 2: tp.TopK(0.5)})
    expected = outputs_of(model, inputs)
    model.cuda().to(dtype)
    found = outputs_of(model, {key: value.cuda() for key, value in inputs.items()})
    torch.testing.assert_close(found["logits"].float().cpu(), expected["logits"], rtol=0.1, atol=0.1)


@needs_gpu
def test_importance_by_the_kernel_is_what_the_matrices_give():
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (32,)).tolist()
    batch = PackedBatch.from_mask(
        torch.arange(200)[None].cuda() < torch.tensor(lengths)[:, None].cuda(), batch_size=32, seq_len=200, device="cuda"
    )
    q, k, v = (torch.randn(1, count, batch.total, 64, device="cuda", dtype=torch.bfloat16) for count in (4, 2, 2))
    with torch.no_grad():
        context, received = attention.packed_attention(q, k, v, batch, importance=True)
        otherwise, expected = attention.packed_attention(*(x.float() for x in (q, k, v)), batch, importance=True)
    torch.testing.assert_close(context.float(), otherwise, rtol=0.05, atol=0.05)
    torch.testing.assert_close(received, expected, rtol=0.02, atol=1e-4)


@needs_gpu
def test_training_on_a_gpu(tmp_path):
    from training_helpers import top, trainer_for

    trainer = trainer_for(tmp_path, top(), use_cpu=False, bf16=True)
    trainer.train()
    assert trainer.model.device.type == "cuda"
    assert sum(int(site.kept.sum()) for site in trainer.model.token_pruner.sites.values()) < 3 * 8
