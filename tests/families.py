"""The table of tests: a tiny real model of every supported family, and its heads."""

from dataclasses import dataclass

import torch
import transformers as hf

VOCAB, PAD, LABELS = 120, 0, 3
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
    "pad_token_id": PAD,
    "num_labels": LABELS,
}
IMAGE = {
    "image_size": 24,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": LABELS,
}
TEXT_HEADS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForMultipleChoice",
)
PLAIN_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
CAUSAL_HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
IMAGE_HEADS = ("Model", "ForImageClassification")


@dataclass(frozen=True)
class Row:
    """One family.

    Args:
        name: how the tests call it.
        stem: of its class names.
        config: of a tiny model.
        heads: endings of its class names.
        images: it reads images rather than texts.
        summary: so many leading tokens are never dropped; below 0, so many last ones.
        hidden: may hidden units be cut out of it?
        weights: may anything?
    """

    name: str
    stem: str
    config: hf.PretrainedConfig
    heads: tuple[str, ...] = TEXT_HEADS
    images: bool = False
    summary: int = 1
    hidden: bool = True
    weights: bool = True


def _siglip():
    vision = {name: value for name, value in IMAGE.items() if name != "num_labels"}
    text = {**{name: value for name, value in TEXT.items() if name not in ("num_labels", "pad_token_id")}, "pad_token_id": PAD}
    return hf.SiglipConfig(text_config=text, vision_config=vision, num_labels=LABELS)


def _distilbert():
    return hf.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=4, n_heads=4, hidden_dim=48, max_position_embeddings=80, pad_token_id=PAD,
        num_labels=LABELS,
    )  # fmt: skip


def _modernbert():
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    return hf.ModernBertConfig(**TEXT, local_attention=8, global_attn_every_n_layers=3, reference_compile=False, **tokens)


def _esm():
    config = {**TEXT, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary", "token_dropout": True}
    return hf.EsmConfig(**config)


def _eurobert():
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
    return hf.EuroBertConfig(**TEXT, num_key_value_heads=2, classifier_pooling="bos", **tokens)


def _causal(config, **more):
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "classifier_dropout": 0.1}
    return config(**text, **more)


def _gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    return _causal(hf.Gemma3TextConfig, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8)


def _deberta():
    config = {
        **TEXT,
        "max_position_embeddings": 80,
        "max_relative_positions": 80,
        "relative_attention": True,
        "position_buckets": 6,
    }
    return hf.DebertaV2Config(**config, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", type_vocab_size=0)


FAMILIES = {
    row.name: row
    for row in (
        Row("bert", "Bert", hf.BertConfig(**TEXT), (*TEXT_HEADS, "ForNextSentencePrediction")),
        Row("roberta", "Roberta", hf.RobertaConfig(**{**TEXT, "pad_token_id": 1})),
        Row("xlm-roberta", "XLMRoberta", hf.XLMRobertaConfig(**{**TEXT, "pad_token_id": 1})),
        Row("roberta-prelayernorm", "RobertaPreLayerNorm", hf.RobertaPreLayerNormConfig(**{**TEXT, "pad_token_id": 1})),
        Row("xlm-roberta-xl", "XLMRobertaXL", hf.XLMRobertaXLConfig(**{**TEXT, "pad_token_id": 1})),
        Row("data2vec-text", "Data2VecText", hf.Data2VecTextConfig(**{**TEXT, "pad_token_id": 1})),
        Row("layoutlm", "LayoutLM", hf.LayoutLMConfig(**TEXT), (*PLAIN_HEADS, "ForQuestionAnswering")),
        Row("camembert", "Camembert", hf.CamembertConfig(**{**TEXT, "pad_token_id": 1})),
        Row("electra", "Electra", hf.ElectraConfig(**TEXT, embedding_size=16)),
        Row("ernie", "Ernie", hf.ErnieConfig(**TEXT)),
        Row("esm", "Esm", _esm(), PLAIN_HEADS),
        Row("distilbert", "DistilBert", _distilbert()),
        Row("albert", "Albert", hf.AlbertConfig(**TEXT, embedding_size=16, classifier_dropout_prob=0.1), weights=False),
        Row("mpnet", "MPNet", hf.MPNetConfig(**{**TEXT, "pad_token_id": 1}), weights=False),
        Row("deberta-v2", "DebertaV2", _deberta(), weights=False),
        Row("modernbert", "ModernBert", _modernbert()),
        Row("nomic_bert", "NomicBert", hf.NomicBertConfig(**TEXT), PLAIN_HEADS),
        Row("gte", "Gte", hf.GteConfig(**TEXT), PLAIN_HEADS),
        Row(
            "jina_embeddings_v3", "JinaEmbeddingsV3", hf.JinaEmbeddingsV3Config(**TEXT), (*PLAIN_HEADS, "ForQuestionAnswering")
        ),
        Row(
            "eurobert",
            "EuroBert",
            _eurobert(),
            PLAIN_HEADS,
            hidden=False,
        ),
        Row("llama", "Llama", _causal(hf.LlamaConfig), CAUSAL_HEADS, summary=-1, hidden=False),
        Row("mistral", "Mistral", _causal(hf.MistralConfig, sliding_window=8), CAUSAL_HEADS, summary=-1, hidden=False),
        Row("qwen2", "Qwen2", _causal(hf.Qwen2Config), CAUSAL_HEADS, summary=-1, hidden=False),
        Row("qwen3", "Qwen3", _causal(hf.Qwen3Config), CAUSAL_HEADS, summary=-1, hidden=False),
        Row("gemma3", "Gemma3Text", _gemma3(), CAUSAL_HEADS[:2], summary=-1, hidden=False, weights=False),
        Row("vit", "ViT", hf.ViTConfig(**IMAGE), IMAGE_HEADS, images=True),
        Row("vit_msn", "ViTMSN", hf.ViTMSNConfig(**IMAGE), IMAGE_HEADS, images=True),
        Row("ijepa", "IJepa", hf.IJepaConfig(**IMAGE), IMAGE_HEADS, images=True, summary=0),
        Row(
            "deit", "DeiT", hf.DeiTConfig(**IMAGE), (*IMAGE_HEADS, "ForImageClassificationWithTeacher"), images=True, summary=2
        ),
        Row("dinov2", "Dinov2", hf.Dinov2Config(**IMAGE), IMAGE_HEADS, images=True),
        Row("dinov2_with_registers", "Dinov2WithRegisters", hf.Dinov2WithRegistersConfig(**IMAGE), IMAGE_HEADS, images=True),
        Row("siglip", "Siglip", _siglip(), ("VisionModel", "ForImageClassification"), images=True, summary=0, hidden=False),
    )
}
TEXTS = [name for name, row in FAMILIES.items() if not row.images]
CASES = [(name, head) for name, row in FAMILIES.items() for head in row.heads]


def class_head(name):
    """The head of a family that judges a whole sample."""
    return "ForImageClassification" if FAMILIES[name].images else "ForSequenceClassification"


def token_head(name):
    """The head of a family that reads every token, if it has one; else that which judges a whole sample."""
    return "ForTokenClassification" if "ForTokenClassification" in FAMILIES[name].heads else class_head(name)


def build(name, head, seed=0, **overrides):
    """A tiny model of a family with random weights, in evaluation mode."""
    row = FAMILIES[name]
    config = type(row.config).from_dict({**row.config.to_dict(), **overrides})
    if head == "ForQuestionAnswering":
        config.num_labels = 2
    if row.name == "siglip" and head == "VisionModel":
        config = config.vision_config
    torch.manual_seed(seed)
    model = getattr(hf, row.stem + head)(config)
    with torch.no_grad():  # weights wide enough that attention is not flat and wrong wiring shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def make_inputs(name, head, lengths=(17, 5, 30, 17, 1), seed=0, seq_len=None):
    """A ragged, right-padded batch (or images) for a model of the table, without labels."""
    row = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    if row.images:
        return {"pixel_values": torch.randn(len(lengths), 3, 24, 24, generator=generator)}
    pad = row.config.pad_token_id
    width = seq_len or max(lengths)
    ids = torch.randint(5, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    inputs = {"input_ids": ids.masked_fill(~mask, pad), "attention_mask": mask.long()}
    if head == "ForMultipleChoice":
        inputs = {key: torch.stack([value, value], 1) for key, value in inputs.items()}
        inputs["input_ids"][:, 1, 1:] = torch.where(mask[:, 1:], (ids[:, 1:] * 7) % (VOCAB - 5) + 5, pad)
    return inputs


def padded_left(inputs):
    """The same texts with their padding before them."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    return {key: torch.stack([row.roll(-n, 0) for row, n in zip(value, lengths, strict=True)]) for key, value in inputs.items()}


def outputs_of(model, inputs):
    """What a head gives, as a dictionary of tensors; per-token outputs only at real tokens."""
    with torch.no_grad():
        output = model(**inputs)
    mask = inputs.get("attention_mask")
    named = {}
    for key, value in output.items():
        if not isinstance(value, torch.Tensor):
            continue
        per_token = mask is not None and value.shape[: mask.ndim] == mask.shape
        named[key] = value[mask.bool()] if per_token else value
    return named
