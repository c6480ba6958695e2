"""Attention as it runs on a GPU: one kernel for sequences of all lengths, or few padded calls. Without a GPU the arguments of the
kernel are checked by a slow stand-in for it, and the padded calls against one call per length."""

import itertools
import warnings

import pytest
import torch
from families import CASES, build, make_inputs, outputs_of

import hf_tokenprune as tp
from hf_tokenprune.modeling import attention, kernels, packing, ranking, varlen
from hf_tokenprune.modeling.packing import PackedBatch, scattered_rows
from hf_tokenprune.modeling.varlen import takes_varlen

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
            q, k, v, chosen, causal=causal, window=window, importance=importance, asking=rows, differentiable=importance
        )
        loss = (context * torch.arange(context.numel()).view_as(context).cos()).sum()
        if importance:
            loss = loss + (received * torch.arange(batch.total).cos()).sum()
        parts = [context, received] if importance else [context]
        found.append([*parts, *torch.autograd.grad(loss, inputs)])
    assert len(bundles(batch, 0.6)) < len(bundles(batch, 0)) == 7
    for padded, exact in zip(*found, strict=True):
        torch.testing.assert_close(padded, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_importance_has_a_gradient_only_where_it_is_to(causal):
    batch = batch_of()
    batch = batch.with_weights((torch.rand(batch.total) + 0.1).requires_grad_())
    for wanted in (True, False):
        context, received = attention.packed_attention(
            *heads(batch.total), batch, causal=causal, importance=True, differentiable=wanted
        )
        assert context.requires_grad
        assert received.requires_grad == wanted


def test_bundles_waste_no_more_than_they_may():
    batch = batch_of([10, 9, 5, 2, 1, 0, 12], 12)
    assert batch.bundles(0.2) == [(0, [1]), (1, [2]), (3, [5]), (8, [9, 10, 12])]
    assert batch.bundles(0) == [(start, [length] * count) for start, count, length in batch.runs]


def test_bundles_stay_small(monkeypatch):
    monkeypatch.setattr("hf_tokenprune.modeling.packing.CELLS", 200)
    assert [len(lengths) for _, lengths in batch_of([10] * 5, 12).bundles(0.2)] == [2, 2, 1]


def slow_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale, window_size_left, window_size_right,
):  # fmt: skip
    """What torch's operator does, one sequence at a time, in numbers of full width; it gives logs of sums as `(heads, T)`."""
    assert query.is_contiguous()
    assert key.is_contiguous()
    assert value.is_contiguous()
    assert query.shape[1:] == key.shape[1:] == value.shape[1:]
    assert query.dtype == key.dtype == value.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert is_causal == (window_size_left == -1 and window_size_right == 0)
    assert not return_debug_mask
    sizes = [ends.diff().tolist() for ends in (cu_seq_q, cu_seq_k)]
    assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
    out, logs = [], []
    for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
        apart = torch.arange(len(k)) - torch.arange(len(k))[-len(q) :, None]  # the last queries ask
        seen = torch.ones_like(apart, dtype=torch.bool)
        seen = seen if window_size_left < 0 else seen & (apart >= -window_size_left)
        seen = seen if window_size_right < 0 else seen & (apart <= window_size_right)
        scores = scores.masked_fill(~seen, float("-inf"))
        logs.append(scores.logsumexp(-1))
        shares = torch.nn.functional.dropout(scores.softmax(-1), dropout_p)
        out.append(torch.einsum("hqk,khd->qhd", shares, v.float()).to(q.dtype))
    return torch.cat(out), torch.cat(logs, 1)


def slow_received(queries, keys, sums, bounds, longest, scaling, say=None):
    """What `kernels.received` does, one sequence at a time."""
    assert bounds.dtype == torch.int32
    assert sums.dtype == torch.float32
    sizes, taken = bounds.diff().tolist(), []
    assert max(sizes) == longest
    for q, k, logs in zip(queries.split(sizes), keys.split(sizes), sums.split(sizes, 1), strict=True):
        shares = (torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scaling - logs[..., None]).exp().sum(1) / max(len(q), 1)
        taken.append(shares.mean(0) if say is None else (say / say.sum()) @ shares)
    return torch.cat(taken)


@pytest.fixture
def kernel(monkeypatch):
    calls = []

    def called(*args, **kwargs):
        calls.append(args)
        return slow_kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "flash", called)
    monkeypatch.setattr(varlen, "DEVICE", "cpu")
    monkeypatch.setattr(varlen, "has_kernels", lambda _: True)
    monkeypatch.setattr(varlen, "received", slow_received)
    return calls


def test_the_operator_of_this_torch_takes_what_it_is_given():
    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert [a.name for a in schema.arguments if not a.kwarg_only] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= {a.name for a in schema.arguments if a.kwarg_only}


def test_a_build_without_the_operator_takes_bundles(monkeypatch):
    """As those of torch for Windows: the operator has a name there, and no kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for there in (False, True):
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda there=there: there)
        assert varlen.has_flash.__wrapped__(torch.device("cuda", 0)) is there


@pytest.mark.parametrize("name", ["bert", "nomic_bert", "qwen3"])
def test_mixed_precision_takes_the_kernel_in_every_family(kernel, name):
    """Rotary tables are in full precision, and make queries and keys of it."""
    model = tp.pack(build(name, "ForTokenClassification", hidden_dropout_prob=0.0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**make_inputs(name, ""))
    assert len(kernel) == 4


@pytest.mark.parametrize(("causal", "window", "asks"), [(False, None, False), (True, None, False), (False, 3, False),
                                                        (True, 3, False), (False, None, True)])  # fmt: skip
def test_the_kernel_is_called_right(kernel, monkeypatch, causal, window, asks):
    torch.manual_seed(0)
    batch = batch_of()
    q, k, v = heads(batch.total, torch.bfloat16)
    options = {"causal": causal, "window": window, "asking": batch.first_rows if asks else None}
    by_kernel, _ = attention.packed_attention(q, k, v, batch, **options)
    assert len(kernel) == 1
    monkeypatch.setattr(varlen, "DEVICE", "nowhere")
    otherwise, _ = attention.packed_attention(q, k, v, batch, **options)
    torch.testing.assert_close(by_kernel, otherwise, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("say", [None, (0.5, 1.0), (0.5, 1.0, 0.0, 0.3)])
@pytest.mark.parametrize(("strength", "offset"), [(1.0, 0.0), (100.0, 0.0), (1.0, 100.0)])
def test_importance_without_the_matrices_of_attention(kernel, monkeypatch, dtype, weighted, say, strength, offset):
    """Also where attention is sharp, or the scores of a query all large, which the softmax does not see."""
    torch.manual_seed(0)
    batch = batch_of()
    batch = batch.with_weights(torch.rand(batch.total) + 1e-3) if weighted else batch
    q, k, v = heads(batch.total, dtype)
    with torch.no_grad():
        k[..., 0] = 1.0
        q = q * strength * torch.rand(1, 4, batch.total, 1)
        q[..., 0] += offset * torch.randn(1, 4, batch.total)
        q = q.to(dtype)
        options = {"importance": True, "say": None if say is None else torch.tensor(say)}
        context, received = attention.packed_attention(q, k, v, batch, **options)
        assert len(kernel) == 1
        monkeypatch.setattr(varlen, "DEVICE", "nowhere")
        otherwise, expected = attention.packed_attention(*(x.float() for x in (q, k, v)), batch, **options)
    torch.testing.assert_close(context.float(), otherwise, rtol=0.02, atol=0.02)
    torch.testing.assert_close(received, expected, rtol=0.001, atol=1e-5)
    if not weighted:
        sums = torch.zeros(len(batch.lengths)).index_add(0, batch.sequence_ids, received)
        torch.testing.assert_close(sums, (torch.tensor(batch.lengths) > 0).float(), rtol=0.001, atol=0)


def test_soft_gates_in_the_kernel_have_the_gradients_of_the_matrices(kernel, monkeypatch):
    torch.manual_seed(0)
    batch, found = batch_of(), []
    weights = (torch.rand(batch.total) + 1e-3).requires_grad_()
    q, k, v = heads(batch.total, torch.bfloat16)
    for device in ("cpu", "nowhere"):
        monkeypatch.setattr(varlen, "DEVICE", device)
        context, _ = attention.packed_attention(q, k, v, batch.with_weights(weights), importance=True)
        loss = (context.float() * torch.arange(context.numel()).view_as(context).cos()).sum()
        found.append(torch.autograd.grad(loss, (q, k, v, weights)))
    assert len(kernel) == 1
    for by_kernel, otherwise in zip(*found, strict=True):
        assert (by_kernel - otherwise).norm() < 0.02 * otherwise.norm()


def test_a_learned_importance_trains_in_the_kernel(kernel):
    model = build("bert", "ForTokenClassification", hidden_size=64, num_attention_heads=4).to(torch.bfloat16).train()
    sites = {layer: tp.RankBins(10, 64, 64, near=2) for layer in range(4)}
    for site in sites.values():
        site.set_kept([True] * 7 + [False] * 3)
        for parameter in site.scorer.requires_grad_(True).parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    tp.attach(model, sites)
    model.token_pruner.remembers = True
    model(**make_inputs("bert", "ForTokenClassification", lengths=(17, 5, 30, 17, 1)))
    assert len(kernel) == 4
    sum(call.importance.square().sum() for call in model.token_pruner.last_forward.calls).backward()
    for site in sites.values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in site.scorer.parameters())
    first = model.bert.encoder.layer[0].attention.self.value.weight
    assert first.grad.abs().sum() > 0, "the encoder learns, too, through what attention brings together"


def test_the_kernel_is_left_alone_where_it_would_be_wrong(kernel):
    batch = batch_of()
    _, thin = batch.choose(torch.arange(batch.total) % 2 == 0)
    half, full = heads(batch.total, torch.bfloat16), heads(batch.total)
    attention.packed_attention(*full, batch)
    attention.packed_attention(*half, batch, importance=True, differentiable=True)
    attention.packed_attention(*half, batch.with_weights(torch.ones(batch.total), masked=True))
    attention.packed_attention(*half, batch, importance=True, causal=True)
    attention.packed_attention(*half, batch, importance=True, window=3)
    attention.packed_attention(*half, batch, causal=True, asking=batch.last_rows)
    attention.packed_attention(*half, batch, window=3, asking=batch.first_rows)
    attention.packed_attention(*(x[:, :, ::2] for x in half), thin, window=3)
    assert not kernel
    attention.packed_attention(*(x[:, :, ::2] for x in half), thin, dropout=0.1)
    assert len(kernel) == 1


def test_where_triton_cannot_launch_we_do_without(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_try", no_compiler)
    assert not kernels.has_kernels.__wrapped__(torch.device("cuda", 0))
    assert "Failed to find C compiler" in caplog.text


def test_rows_are_found_without_asking_how_many():
    torch.manual_seed(0)
    for share in (0.0, 0.3, 1.0):
        mask = torch.rand(50) < share
        assert scattered_rows(mask, int(mask.sum())).tolist() == mask.nonzero().squeeze(1).tolist()


def test_a_window_knows_of_holes_in_the_mask():
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2] = 0
    holes = PackedBatch.from_mask(mask, batch_size=2, seq_len=6, device="cpu")
    left = PackedBatch.from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), batch_size=2, seq_len=4, device="cpu")
    assert (holes.gapless, left.gapless, left.choose(torch.arange(left.total) < 3)[1].gapless) == (False, True, False)


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


def on_gpu(size, count=32):
    lengths = torch.randint(1, 200, (count,))
    mask = (torch.arange(200)[None] < lengths[:, None]).cuda()
    batch = PackedBatch.from_mask(mask, batch_size=count, seq_len=200, device="cuda")
    return batch, [torch.randn(1, heads, batch.total, size, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]


@needs_gpu
@pytest.mark.parametrize("lengths", [(3, 1, 70, 0, 9, 3, 130, 64, 5), (65, 65), (1,), (1500, 2)])
def test_ranks_and_rows_are_those_of_the_slow_way(monkeypatch, lengths):
    torch.manual_seed(0)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    batch = PackedBatch.from_mask(mask, batch_size=len(lengths), seq_len=max(lengths), device="cuda")
    importance = torch.randn(batch.total, device="cuda")
    importance[torch.rand(batch.total) < 0.3] = 0.25
    strided = torch.stack([mask, ~mask], -1).cuda()[..., 0]
    assert torch.equal(
        batch.index, PackedBatch.from_mask(strided, batch_size=len(lengths), seq_len=max(lengths), device="cuda").index
    )
    protected = torch.rand(batch.total, device="cuda") < 0.1
    by_kernel, rows, chosen = ranking.relative_rank(importance, batch, protected), *batch.choose(importance > 0.25)
    monkeypatch.setattr(ranking, "has_kernels", lambda _: False)
    monkeypatch.setattr(packing, "has_kernels", lambda _: False)
    for found, expected in zip(by_kernel, ranking.relative_rank(importance, batch, protected), strict=True):
        assert torch.equal(found[~protected], expected[~protected])
    slow_rows, slow = batch.choose(importance > 0.25)
    assert torch.equal(rows, slow_rows)
    assert torch.equal(chosen.index, slow.index)
    assert torch.equal(chosen.bounds, slow.bounds)
    again = PackedBatch.from_mask(mask, batch_size=len(lengths), seq_len=max(lengths), device="cuda")
    assert torch.equal(batch.index, again.index)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 40, 64, 128, 256])
@pytest.mark.parametrize("say", [None, (0.5, 1.0, 0.0, 0.3)])
def test_what_is_received_is_what_the_slow_way_says(dtype, size, say):
    torch.manual_seed(0)
    lengths = (3, 1, 70, 9, 3, 130, 64, 300)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    queries, keys = (torch.randn(4, sum(lengths), size, device="cuda").to(dtype).transpose(0, 1) for _ in range(2))
    pairs = zip(queries.split(lengths), keys.split(lengths), strict=True)
    sums = [(torch.einsum("qhd,khd->hqk", q.float(), k.float()) * 0.2).logsumexp(-1) for q, k in pairs]
    given = queries, keys, torch.cat(sums, 1), bounds, 300, 0.2, None if say is None else torch.tensor(say, device="cuda")
    torch.testing.assert_close(kernels.received(*given), slow_received(*given), rtol=2e-3, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kernel_gives_what_the_matrices_give(size, weighted):
    """With importance and gradients, of soft gates, too."""
    torch.manual_seed(0)
    batch, rows = on_gpu(size)
    weights = torch.rand(batch.total, device="cuda") + 1e-3
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [x.detach().to(dtype).requires_grad_() for x in rows]
        gates = weights.clone().requires_grad_()
        batch = batch.with_weights(gates) if weighted else batch
        assert takes_varlen(given[0], batch, importance=True) == (dtype == torch.bfloat16)
        context, received = attention.packed_attention(*given, batch, importance=True)
        loss = (context.float() * torch.arange(context.numel(), device="cuda").view_as(context).cos()).sum()
        found.append([context, received, *torch.autograd.grad(loss, [*given, gates] if weighted else given)])
    for name, by_kernel, exact in zip(["context", "received", "q", "k", "v", "gates"], *found, strict=False):
        assert (by_kernel.float() - exact).norm() < 0.02 * exact.norm(), name
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.02, atol=1e-4)


@needs_gpu
def test_dropout_in_the_kernel():
    torch.manual_seed(0)
    batch, (q, k, v) = on_gpu(64)
    exact, _ = attention.packed_attention(q, k, v, batch)
    draws = [attention.packed_attention(q, k, v, batch, dropout=0.2)[0].float() for _ in range(200)]
    assert not torch.equal(draws[0], draws[1])
    assert (torch.stack(draws).mean(0) - exact.float()).norm() < 0.05 * exact.float().norm()
    q.requires_grad_()
    attention.packed_attention(q, k, v, batch, dropout=0.2)[0].float().sum().backward()
    assert q.grad.isfinite().all()


@needs_gpu
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
def test_the_host_does_not_wait_at_sites_that_rank(head):
    """At first it does, for the sizes of the batch and whether it begins where its head reads."""
    model = build("bert", head, hidden_size=64, num_attention_heads=4).cuda().bfloat16()
    inputs = {key: value.cuda() for key, value in make_inputs("bert", head, lengths=(17, 5, 30, 17, 1)).items()}
    waits = []
    for sites in ({}, {1: tp.TopK(0.5), 2: tp.RankBins(10)}, {1: tp.TopK(0.5), 2: Unforeseen(0.5)}):
        tp.attach(model, sites)
        if 2 in sites and sites[2].kind == "rank_bins":
            sites[2].set_kept([True] * 5 + [False] * 5)
        outputs_of(model, inputs)
        with warnings.catch_warnings(record=True) as told, torch.inference_mode():
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model(**inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchroniz" in str(one.message) for one in told))
    assert max(waits[:2]) <= 3, waits
    assert waits[2] == waits[1] + 1, waits


class Unforeseen(tp.TopK):
    """One whose host has to ask."""

    counts = tp.Skim.counts


@needs_gpu
@pytest.mark.parametrize("importance", ["attention", "learned"])
def test_training_on_a_gpu(tmp_path, importance):
    from training_helpers import top, trainer_for

    trainer = trainer_for(tmp_path, top(importance=importance, rank_weight=0.0), use_cpu=False, bf16=True)
    trainer.train()
    assert trainer.model.device.type == "cuda"
    sites = trainer.model.token_pruner.sites.values()
    assert sum(int(site.kept.sum()) for site in sites) < 8 * len(sites)
