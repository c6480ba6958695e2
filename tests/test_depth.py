"""How deep tokens live, against the slow reference that masks; and how they are read by people."""

import pytest
import torch
from families import CASES, build, make_inputs
from reference import DEPTH
from test_pruning import LENGTHS, SUMMARY, attach, reference_for, samples_of, sites_of
from test_skim import MaskedReference, sampler, skimming
from transformers import BertTokenizerFast, BertTokenizerLegacy

import hf_tokenprune as tp
from hf_tokenprune.depth import Token, image_depths, legend, text_depths

FEW = [
    case
    for case in CASES
    if case[1] in ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification", "VisionModel")
]


def assert_depths_are_those_of(reference, found, inputs, pools_last=False):
    """Each token has left as many layers as the reference counts it alive after."""
    rows = found.depths.reshape(-1, found.depths.shape[-1])
    seen = 0
    for sample in samples_of(inputs):
        reference(sample)
        for alive in torch.stack(reference.alive[1:]).unbind(1):
            depths = alive.sum(0)
            if found.last_reads_pooled:
                depths = alive[:-1].sum(0)
                depths[-1 if pools_last else 0] = DEPTH
            length = len(depths)
            assert rows[seen, :length].tolist() == depths.tolist()
            assert (rows[seen, length:] == -1).all()
            seen += 1
    assert seen == len(rows)


@pytest.mark.parametrize(("name", "head"), [*FEW, ("bert", "ForMultipleChoice")])
def test_depths_are_those_of_the_masked_reference(name, head):
    inputs, sites = make_inputs(name, head, LENGTHS), sites_of(name, head, range(DEPTH))
    model = attach(build(name, head), sites)
    found = tp.token_depths(model, inputs)
    assert found.layers == DEPTH
    assert found.last_reads_pooled == tp.pack(build(name, head)).token_pruner.pooled_head
    assert_depths_are_those_of(reference_for(name, head, sites), found, inputs, model.token_pruner.family.pools_last)


def test_a_token_sampler_drops_before_its_layer():
    inputs = make_inputs("bert", "ForTokenClassification", LENGTHS)
    model = skimming("bert", "ForTokenClassification")
    reference = MaskedReference(build("bert", "ForTokenClassification"), {i: sampler(i) for i in range(DEPTH)}, SUMMARY["bert"])
    found = tp.token_depths(model, inputs)
    assert (found.depths == 0).any()
    traced = [sum(layer.survived) for layer in model.token_pruner.trace]
    assert [int((found.depths > layer).sum()) for layer in range(DEPTH)] == traced
    for row, sample in enumerate(samples_of(inputs)):
        reference(sample)
        depths = torch.stack([alive[0] for alive in reference.alive[2::2]]).sum(0)  # its list has two entries per layer
        assert found.depths[row, : len(depths)].tolist() == depths.tolist()


def test_tokens_per_layer_are_means_over_texts():
    inputs = make_inputs("bert", "ForTokenClassification", (9, 5, 3))
    found = tp.token_depths(tp.attach(build("bert", "ForTokenClassification"), {2: tp.TopK(2)}), inputs)
    assert found.tokens_per_layer == [17 / 3, 17 / 3, 3.0, 3.0]


def test_the_model_is_left_as_it_was():
    model = tp.attach(build("bert", "ForSequenceClassification"), {1: tp.TopK(0.5)}).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    counted, pruner = [], model.token_pruner
    pruner.meter = counted.append
    tp.token_depths(model, make_inputs("bert", "ForSequenceClassification"))
    assert [module.training for module in model.modules()] == modes
    assert (pruner.remembers, pruner.last_forward, counted) == (False, None, [])
    assert pruner.meter == counted.append


def test_a_dense_model_is_refused():
    with pytest.raises(tp.errors.UnsupportedModelError, match="is dense, so every token lives to the end"):
        tp.token_depths(build("bert", "ForSequenceClassification"), {})


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##read", "##able", "the", "fox", "'", "s"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (BertTokenizerFast, ["[CLS]", "the", "fox", "'", "s", "Un", "read", "able", "[SEP]", "fox", "[SEP]"]),
        (BertTokenizerLegacy, ["[CLS]", "the", "fox", "'", "s", "un", "##read", "##able", "[SEP]", "fox", "[SEP]"]),
    ],
)
def test_tokens_read_as_in_the_text(kind, words, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = kind(str(tmp_path / "vocab.txt"), model_max_length=64)
    model = tp.pack(build("bert", "ForSequenceClassification"))
    pairs = [("the fox's Unreadable", "fox"), ("the", "fox")]
    ((_, (tokens, second)),) = text_depths(model, pairs, tokenizer)
    assert [token.text for token in tokens] == words
    if kind is BertTokenizerFast:
        assert [token.text for token in tokens if token.joined] == ["'", "s", "read", "able"]
    assert [token.text for token in tokens if token.special] == ["[CLS]", "[SEP]", "[SEP]"]
    assert [token.depth for token in second] == [4, 3, 3, 3, 3]


def test_many_texts_go_through_in_batches():
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)})
    model = tp.attach(build("bert", "ForTokenClassification"), {1: tp.TopK(1)})
    texts = ["the fox", "the", "fox fox fox"] * 15
    batches = list(text_depths(model, texts, tokenizer))
    assert [len(some) for _, some in batches] == [32, 13]
    rows = [tokens for _, some in batches for tokens in some]
    assert [len(tokens) for tokens in rows] == [4, 3, 5] * 15
    assert rows[:3] == rows[42:]
    assert rows[1][:2] == [Token("[CLS]", 4, special=True), Token("the", 4)]


def test_patches_lie_row_by_row():
    class Processor:
        def __call__(self, images, return_tensors):
            assert return_tensors == "pt"
            return {"pixel_values": torch.stack(images)}

    for name, before in (("deit", 2), ("siglip", 0), ("dinov2_with_registers", 1 + 4)):
        head = "ForImageClassification"
        model = attach(build(name, head), [1])
        pixels = torch.randn(3, 3, 24, 24)
        ((found, grids),) = image_depths(model, list(pixels), Processor())
        assert [len(row) for row in grids[0].rows] == [6] * 6
        assert [depth for row in grids[1].rows for depth in row] == found.depths[1, before:].tolist()


def test_the_legend_says_what_the_last_layer_does():
    assert legend(6, False) == "The number is the layer in which a token was dropped; 6 = it lived to the end of all 6 layers."
    assert "The last layer, 5, still reads the tokens that reach it (5)" in legend(6, True)
