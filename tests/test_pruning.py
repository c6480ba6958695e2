"""Invariant 2: a pruned model gives the outputs of the slow reference that masks instead of removing (`reference.py`)."""

import pytest
import torch
from families import CASES, FAMILIES, TEXTS, VOCAB, build, class_head, make_inputs, outputs_of, padded_left
from families import token_head as one_head
from reference import DEPTH, Reference, Rule, bins, number, samples_of, share

import hf_tokenprune as tp
from hf_tokenprune.modeling import calls, packing
from hf_tokenprune.modeling.packing import PackedBatch
from hf_tokenprune.modeling.ranking import relative_rank

TEXT = [name for name in TEXTS if "ForTokenClassification" in FAMILIES[name].heads]
SUMMARY = {name: row.summary for name, row in FAMILIES.items()}
LENGTHS = (17, 5, 24, 1)
PATTERN = (1, 0, 1, 1, 0, 0, 1)


def rank_bins(*kept):
    selector = tp.RankBins(len(kept))
    selector.set_kept(kept)
    return selector


# A selector, and the rule by which the reference decides.
SELECTORS = {
    "half": (lambda: tp.TopK(0.5), share(0.5)),
    "three": (lambda: tp.TopK(3), number(3)),
    "bins": (lambda: rank_bins(*PATTERN), bins(PATTERN)),
}
SITES = {"one": (1,), "two apart": (0, 2), "every": range(DEPTH)}


def sites_of(name, head, sites):
    """Those of `sites` that may drop tokens: not the last layer of a pooled head."""
    model = tp.pack(build(name, head))
    return [layer for layer in sites if layer in model.token_pruner.possible_sites()]


def attach(model, sites, selector="half", **arguments):
    return tp.attach(model, {layer: SELECTORS[selector][0]() for layer in sites}, **arguments)


def reference_for(name, head, sites, selector="half", protected_ids=()):
    model = build(name, head)
    model.config._attn_implementation = "eager"
    rule = Rule(SELECTORS[selector][1], SUMMARY[name], protected_ids)
    return Reference(model, dict.fromkeys(sites, rule), causal=SUMMARY[name] < 0)


def assert_same_samples(got, reference, inputs):
    """Every tensor of the output equals the reference's, at the real tokens of each sample."""
    samples = list(samples_of(inputs))
    for row, sample in enumerate(samples):
        for key, right in reference(sample).items():
            for mine, other in zip(tensors(got[key]), tensors(right), strict=True):
                mine = mine.reshape(len(samples), -1, *mine.shape[1:])[row]
                mine = mine if mine.shape == other.shape else mine[:, : other.shape[1]]
                torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else value


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_pruned_equals_masked_for_every_head(name, head):
    inputs = make_inputs(name, head, LENGTHS)
    sites = sites_of(name, head, SITES["every"])
    pruned = run(attach(build(name, head), sites), inputs)
    assert_same_samples(pruned, reference_for(name, head, sites), inputs)


KINDS_OF_DEBERTA = {
    "v3": {"share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    "content to position": {"pos_att_type": ["c2p"]},
    "no buckets": {"position_buckets": -1},
    "absolute": {"relative_attention": False, "pos_att_type": None, "position_biased_input": True},
}


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("kind", KINDS_OF_DEBERTA)
def test_pruned_equals_masked_for_every_kind_of_deberta(kind, head):
    inputs, overrides = make_inputs("deberta-v2", head, LENGTHS), KINDS_OF_DEBERTA[kind]
    model, dense = (build("deberta-v2", head, **overrides) for _ in range(2))
    assert_same_samples(run(attach(model, (0, 2)), inputs), Reference(dense, dict.fromkeys((0, 2), Rule(share(0.5)))), inputs)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_equals_masked_for_every_selector_and_site(name, selector, sites):
    head = one_head(name)
    inputs = make_inputs(name, head, LENGTHS)
    sites = sites_of(name, head, SITES[sites])
    pruned = run(attach(build(name, head), sites, selector), inputs)
    assert_same_samples(pruned, reference_for(name, head, sites, selector), inputs)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        case
        for case in CASES
        if case[1].removeprefix("Vision") in ("Model", "ForSequenceClassification", "ForImageClassification")
    ],
)
def test_hidden_states_of_a_pruned_model_equal_the_masked_ones(name, head):
    inputs, asked = make_inputs(name, head, LENGTHS), {"output_hidden_states": True}
    sites = sites_of(name, head, (0, 1, 3))
    reference = reference_for(name, head, sites)
    for asked_before in (False, True):  # are transformers' recording hooks younger than ours, or older?
        model = build(name, head)
        if asked_before:
            run(model, {**inputs, **asked})
        pruned = run(attach(model, sites), {**inputs, **asked})
        assert len(pruned.hidden_states) == DEPTH + 1
        assert_same_samples(pruned, lambda sample: reference({**sample, **asked}), inputs)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_trace_counts_the_living_and_no_padding(name, selector):
    head = one_head(name)
    inputs = make_inputs(name, head, LENGTHS)
    sites = sites_of(name, head, SITES["two apart"])
    model, reference = attach(build(name, head), sites, selector), reference_for(name, head, sites, selector)
    living = [[] for _ in range(DEPTH + 1)]
    for sample in samples_of(inputs):
        reference(sample)
        for layer, alive in enumerate(reference.alive):
            living[layer].append(int(alive.sum()))
    run(model, inputs)
    trace = model.token_pruner.trace
    assert [sorted(layer.entered) for layer in trace] == [sorted(counts) for counts in living[:-1]]
    if model.token_pruner.pooled_head:
        living[-1] = [1] * len(LENGTHS)
    assert [sorted(layer.survived) for layer in trace] == [sorted(counts) for counts in living[1:]]
    if not FAMILIES[name].images:
        assert sum(trace[0].entered) == sum(LENGTHS)


@pytest.mark.parametrize("name", TEXT)
def test_what_stands_in_the_padding_is_never_read(name):
    model, inputs = attach(build(name, "ForTokenClassification"), (0, 2)), make_inputs(name, "", LENGTHS)
    expected = outputs_of(model, inputs)["logits"]
    padding = inputs["attention_mask"] == 0
    junk = torch.where(padding, torch.arange(padding.shape[1]) + 6, inputs["input_ids"])
    assert torch.equal(outputs_of(model, {**inputs, "input_ids": junk})["logits"], expected)
    wider = {key: torch.nn.functional.pad(value, (0, 7)) for key, value in inputs.items()}
    torch.testing.assert_close(outputs_of(model, wider)["logits"], expected, rtol=0, atol=1e-5)
    assert sum(model.token_pruner.trace[0].entered) == sum(LENGTHS)


@pytest.mark.parametrize(("name", "head"), [case for case in CASES if SUMMARY[case[0]] < 0])
def test_causal_models_take_padding_on_either_side(name, head):
    inputs, sites = make_inputs(name, head, LENGTHS), sites_of(name, head, (0, 2))
    model = attach(build(name, head), sites)
    right, left = outputs_of(model, inputs), outputs_of(model, padded_left(inputs))
    assert all(torch.allclose(right[key], left[key], rtol=0, atol=1e-5) for key in right)


@pytest.mark.parametrize("count", [100, 22, 38, 44, 84, 7])
def test_a_rank_on_the_edge_of_a_bin_falls_into_the_upper_one_despite_rounding(count):
    for n in range(1, 200):
        importance, nobody = -torch.arange(float(n)), torch.zeros(n, dtype=torch.bool)
        batch = PackedBatch.from_mask(None, batch_size=1, seq_len=n, device="cpu")
        _, relative = relative_rank(importance, batch, nobody)
        assert tp.RankBins(count).bin_of(relative).tolist() == [(2 * rank + 1) * count // (2 * n) for rank in range(n)]


def test_the_host_knows_how_many_stay():
    torch.manual_seed(0)
    bins = [tp.RankBins(7), tp.RankBins(50)]
    for selector in bins:
        selector.set_kept(torch.rand(selector.bins) < 0.4)
    for selector in (*bins, tp.TopK(0.3), tp.TopK(2 / 3), tp.TopK(1.0), tp.TopK(1), tp.TopK(40)):
        for n in range(1, 120):
            batch = PackedBatch.from_mask(None, batch_size=1, seq_len=n, device="cpu")
            protected = torch.arange(n) < n % 3
            stay = selector.keep(torch.rand(n).round(decimals=1), batch, protected)
            assert stay.sum() - protected.sum() == selector.counts([n - int(protected.sum())])[0], (selector, n)
    bins[0].set_kept([True] * 7)
    assert bins[0].counts([30, 5]) == [30, 5]


def test_a_selector_that_keeps_otherwise_does_not_count_alike():
    class Generous(tp.TopK):
        def keep(self, importance, batch, protected):
            return super().keep(importance, batch, protected) | (batch.places == 1)

    class Frank(Generous):
        def counts(self, droppable):
            return [n // 2 for n in droppable]

    inputs = make_inputs("bert", "ForSequenceClassification", LENGTHS)
    outputs_of(tp.attach(build("bert", "ForSequenceClassification"), {1: Generous(0.3)}), inputs)
    with pytest.raises(RuntimeError, match="what a selector keeps is not what it counts"):
        outputs_of(tp.attach(build("bert", "ForSequenceClassification"), {1: Frank(0.3)}), inputs)


@pytest.mark.parametrize("name", ["bert", "qwen3", "modernbert"])
def test_rows_that_nobody_counted_are_those(monkeypatch, name):
    """As on a GPU."""
    head = "ForTokenClassification"
    inputs = make_inputs(name, head, LENGTHS)
    model = attach(build(name, head), sites_of(name, head, (0, 2)), protected_token_ids=[int(inputs["input_ids"][0, 1])])
    expected = outputs_of(model, inputs)
    for module in (packing, calls):
        monkeypatch.setattr(module, "rows_of", packing.scattered_rows)
    found = outputs_of(model, inputs)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# Who is never dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_summary_tokens_survive_and_no_sequence_ends_empty(name):
    head = one_head(name)
    inputs = make_inputs(name, head, LENGTHS)
    sites = sites_of(name, head, SITES["every"])
    model = tp.attach(build(name, head), {layer: rank_bins(0, 0, 0) for layer in sites})
    pruned = run(model, inputs)
    least = [min(length, max(abs(SUMMARY[name]), 1)) for length in (LENGTHS if not FAMILIES[name].images else (99,) * 4)]
    assert sorted(model.token_pruner.trace[sites[-1]].survived) == sorted(least)
    reference = reference_for(name, head, sites)
    reference.sites = dict.fromkeys(sites, Rule(lambda *_: False, SUMMARY[name]))
    assert_same_samples(pruned, reference, inputs)


@pytest.mark.parametrize("name", TEXT)
def test_protected_ids_survive(name):
    head, ids = "ForTokenClassification", tuple(range(5, VOCAB, 4))
    inputs = make_inputs(name, head, LENGTHS)
    sites = SITES["two apart"]
    model = attach(build(name, head), sites, "three", protected_token_ids=ids)
    pruned = run(model, inputs)
    assert_same_samples(pruned, reference_for(name, head, sites, "three", ids), inputs)
    real = inputs["attention_mask"].bool()
    protected = torch.isin(inputs["input_ids"], torch.tensor(ids)) & real
    protected |= real & (real.cumsum(1) == (real.sum(1, keepdim=True) if SUMMARY[name] < 0 else 1))
    droppable = real.sum(1) - protected.sum(1)
    expected = protected.sum(1) + droppable.clamp(max=3)
    assert sorted(model.token_pruner.trace[-1].survived) == sorted(expected.tolist())
    other = run(attach(build(name, head), sites, "three"), inputs)
    assert not torch.allclose(other.logits[real], pruned.logits[real], atol=1e-3)


def test_a_padding_id_may_be_protected_without_padding_being_kept():
    model, inputs = build("bert", "ForTokenClassification"), make_inputs("bert", "", LENGTHS)
    expected = outputs_of(attach(model, (0, 2)), inputs)["logits"]
    attach(model, (0, 2), protected_token_ids=[FAMILIES["bert"].config.pad_token_id])
    assert torch.equal(outputs_of(model, inputs)["logits"], expected)


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "vit"])
def test_protected_ids_cannot_be_found_without_input_ids(name):
    head = one_head(name)
    model, inputs = attach(build(name, head), (1,), protected_token_ids=[7]), make_inputs(name, head)
    if "input_ids" in inputs:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(tp.errors.UnsupportedInputError, match="input_ids"):
        model(**inputs)


# However it is run


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_and_autocast_drop_as_many_tokens(name):
    head = one_head(name)
    model, inputs = attach(build(name, head), (0, 2)), make_inputs(name, head, LENGTHS)
    run(model, inputs)
    expected = model.token_pruner.trace
    with torch.autocast("cpu", torch.bfloat16):
        assert run(model, inputs).logits.isfinite().all()
    assert model.token_pruner.trace == expected
    model.bfloat16()
    logits = run(model, {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert model.token_pruner.trace == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_is_deterministic(name):
    for head in {class_head(name), one_head(name)}:
        for sites in ((), (0, 2)):
            model, inputs = attach(build(name, head), sites, "bins"), make_inputs(name, head)
            assert torch.equal(run(model, inputs).logits, run(model, inputs).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_equals_dense(name):
    head = one_head(name)
    model, inputs = build(name, head), make_inputs(name, head)
    dense = outputs_of(model, inputs)
    for selector in (tp.TopK(1.0), tp.TopK(1000), rank_bins(1, 1, 1)):
        pruned = outputs_of(tp.attach(model, {1: selector}), inputs)
        torch.testing.assert_close(pruned, dense, rtol=0, atol=1e-5)


def test_a_change_of_the_kept_bins_is_seen_at_once():
    model, inputs = build("bert", "ForTokenClassification"), make_inputs("bert", "", LENGTHS)
    selector = rank_bins(1, 1)
    tp.attach(model, {1: selector})

    def survivors():
        run(model, inputs)
        return sum(model.token_pruner.trace[1].survived)

    assert survivors() == sum(LENGTHS)
    selector.set_kept([1, 0])
    half = survivors()
    assert half < sum(LENGTHS)
    selector.set_kept([1, 1])
    assert survivors() == sum(LENGTHS)
    selector.load_state_dict({"kept": torch.tensor([1, 0], dtype=torch.int8)})
    assert survivors() == half
    selector.load_state_dict({"kept": torch.tensor([1, 1], dtype=torch.int8)}, assign=True)
    assert survivors() == sum(LENGTHS)
    with torch.inference_mode():
        selector.set_kept([0, 0])
        assert survivors() == len(LENGTHS)


# Settings that make no sense


@pytest.mark.parametrize("layer", [-1, DEPTH, 1.0, "1", True, None])
def test_a_site_that_is_no_layer_is_refused(layer):
    with pytest.raises(tp.errors.ConfigError, match="layer"):
        tp.attach(build("bert", "Model"), {layer: tp.TopK(0.5)})


@pytest.mark.parametrize("sites", [3, [tp.TopK(0.5)], "1"])
def test_sites_that_are_no_dictionary_are_refused(sites):
    with pytest.raises(tp.errors.ConfigError, match="number of a layer"):
        tp.attach(build("bert", "Model"), sites)


def test_a_method_that_is_no_dictionary_is_refused():
    """Cards are made from it."""
    with pytest.raises(tp.errors.ConfigError, match="by hand"):
        tp.attach(build("bert", "Model"), {1: tp.TopK(0.5)}, method="by hand")


def test_a_site_in_the_last_layer_of_a_pooled_head_is_refused():
    with pytest.raises(tp.errors.ConfigError, match="pooled token"):
        tp.attach(build("bert", "ForSequenceClassification"), {DEPTH - 1: tp.TopK(0.5)})


@pytest.mark.parametrize("make", [lambda: tp.TopK(0), lambda: tp.TopK(0.0), lambda: tp.TopK(-1), lambda: tp.TopK(1.5),
                                  lambda: tp.TopK(True), lambda: tp.TopK("half"), lambda: tp.TopK(float("nan")),
                                  lambda: tp.RankBins(0), lambda: tp.RankBins(2.0), lambda: tp.RankBins("50")])  # fmt: skip
def test_selectors_refuse_settings_without_a_meaning(make):
    with pytest.raises(tp.errors.ConfigError):
        make()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_made_from_the_config_is_the_same_model(name):
    head = one_head(name)
    model, inputs = attach(build(name, head), (0, 2), "bins"), make_inputs(name, head, LENGTHS)
    config = type(model.config).from_dict(model.config.to_dict())
    twin = type(model)(config).eval()
    with pytest.raises(tp.errors.ConfigError, match="complete checkpoint"):
        run(twin, inputs)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run(twin, inputs).logits, run(model, inputs).logits)
