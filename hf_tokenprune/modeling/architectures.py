"""The only file that knows where each model family keeps its layers, attention and FFN.

To add a family, add one row to `FAMILIES` and one to the table of tests (`tests/families.py`). It qualifies if its layers
are called one after the other as `layer(hidden_states, attention_mask, ...)`, and its attention goes through transformers'
attention interface, or hands its probabilities to a module on the way (`probabilities`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError

SUPPORTED_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        encoder: class name of the base model.
        layers: path from the base model to its list of layers, or a function that lists them in the order in which they are called.
        attention: path from a layer to the module that calls the attention function.
        exit: path from a layer to the module before which tokens leave the layer. It either takes `(context, residual)` and
            everything after it runs on the survivors (`exit_residual`), or is the FFN, called on one tensor whose result is
            added to a residual: then only the FFN runs on the survivors, and the others leave at the end of the layer.
        exit_residual: which of the two `exit` is.
        exit_after: tokens leave after `exit` instead, whose result is all that the rest of the layer reads.
        probabilities: path from a layer to the dropout that is called on the attention's probabilities, where the attention does
            not go through the attention interface. It then runs on padded sequences, see `padded.py`.
        positional: paths from a layer to Linears that read relative positions rather than tokens.
        summary_tokens: so many leading tokens are there to be read by heads (CLS, ...), so they are never dropped.
        pools_last: causal models: heads and users read the last token of each sequence rather than leading ones.
        pooled_heads: endings of class names of heads that read nothing but the first token, or the last.
        own_mask: the encoder brings the mask into a form of its own before its layers get it.
        needs: config attributes and the values they must have.
        head_needs: the same for one head: ending of its class name, attribute, values.
        projections: paths from a layer to the Linears that make queries, keys and values; one Linear may make all three.
        context: path from a layer to the Linear that reads the context of all heads.
        units_in: paths from a layer to the Linears that make the FFN's units; a gated FFN makes two of each, by one Linear or two.
        units_out: path from a layer to the Linear that reads the FFN's units.
        ffn: path from a layer to the module whose result is the FFN block's: as `exit`, `(units, residual)` or one tensor.
        norms: paths to the norms after the two blocks where they are neither in `exit` and `ffn` nor before the block.
        hidden: may single hidden units be cut out of this family?
        uncut: why no weights at all can be; empty if they can. The paths above that only cutting needs are then of no use.
    """

    encoder: str
    layers: str | Callable = "encoder.layer"
    attention: str = "attention.self"
    exit: str = "attention.output"
    exit_residual: bool = True
    exit_after: bool = False
    probabilities: str = ""
    positional: tuple[str, ...] = ()
    summary_tokens: int = 1
    pools_last: bool = False
    pooled_heads: tuple[str, ...] = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
    own_mask: bool = False
    needs: tuple[tuple[str, tuple], ...] = (
        ("is_decoder", (False,)),
        ("add_cross_attention", (False,)),
        ("chunk_size_feed_forward", (0,)),
    )
    head_needs: tuple[tuple[str, str, tuple], ...] = ()
    projections: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    context: str = "attention.output.dense"
    units_in: tuple[str, ...] = ("intermediate.dense",)
    units_out: str = "output.dense"
    ffn: str = "output"
    norms: tuple[str, ...] = ()
    hidden: bool = True
    uncut: str = ""


def albert_layers(encoder):
    """ALBERT has few layers and calls them over and over: which one when."""
    groups, count = encoder.encoder.albert_layer_groups, encoder.config.num_hidden_layers
    return [layer for i in range(count) for layer in groups[int(i / (count / len(groups)))].albert_layers]


VIT = {
    "layers": "layers",
    "attention": "attention",
    "exit": "mlp",
    "exit_residual": False,
    "pooled_heads": ("ForImageClassification",),
    "needs": (),
    "projections": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "context": "attention.o_proj",
    "units_in": ("mlp.fc1",),
    "units_out": "mlp.fc2",
    "ffn": "mlp",
}

ROTARY = {
    "layers": "layers",
    "attention": "self_attn",
    "exit": "mlp",
    "exit_residual": False,
    "needs": (),
    "projections": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "context": "self_attn.o_proj",
    "units_in": ("mlp.gate_proj", "mlp.up_proj"),
    "units_out": "mlp.down_proj",
    "ffn": "mlp",
    "norms": ("post_attention_layernorm", "post_mlp_layernorm"),
}

CAUSAL = {**ROTARY, "norms": (), "hidden": False, "pools_last": True, "pooled_heads": ("ForSequenceClassification",)}

FAMILIES = {
    "bert": Family("BertModel"),
    "roberta": Family("RobertaModel"),
    "roberta-prelayernorm": Family("RobertaPreLayerNormModel"),
    "xlm-roberta": Family("XLMRobertaModel"),
    "xlm-roberta-xl": Family("XLMRobertaXLModel"),
    "data2vec-text": Family("Data2VecTextModel"),
    "layoutlm": Family("LayoutLMModel", own_mask=True),
    "camembert": Family("CamembertModel"),
    "electra": Family("ElectraModel", head_needs=(("ForMultipleChoice", "summary_type", ("first",)),)),
    "ernie": Family("ErnieModel"),
    "esm": Family("EsmModel"),
    "albert": Family(
        "AlbertModel",
        layers=albert_layers,
        attention="attention",
        exit="attention",
        exit_after=True,
        uncut="its layers share one set of weights",
    ),
    "mpnet": Family(
        "MPNetModel",
        attention="attention.attn",
        probabilities="attention.attn.dropout",
        own_mask=True,
        exit="attention",
        exit_after=True,
        uncut="its attention insists on the number of heads it was made with",
    ),
    "deberta-v2": Family(
        "DebertaV2Model",
        probabilities="attention.self.dropout",
        positional=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        own_mask=True,
        needs=(("conv_kernel_size", (0,)),),
        uncut="its attention insists on the number of heads it was made with",
    ),
    "distilbert": Family(
        "DistilBertModel",
        layers="transformer.layer",
        attention="attention",
        exit="ffn",
        exit_residual=False,
        needs=(("chunk_size_feed_forward", (0,)),),
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        context="attention.out_lin",
        units_in=("ffn.lin1",),
        units_out="ffn.lin2",
        ffn="ffn",
        norms=("sa_layer_norm", "output_layer_norm"),
    ),
    "modernbert": Family(
        "ModernBertModel",
        layers="layers",
        attention="attn",
        exit="mlp",
        exit_residual=False,
        needs=(),
        projections=("attn.Wqkv",),
        context="attn.Wo",
        units_in=("mlp.Wi",),
        units_out="mlp.Wo",
        ffn="mlp",
    ),
    "nomic_bert": Family("NomicBertModel", **ROTARY),
    "gte": Family("GteModel", **ROTARY),
    "jina_embeddings_v3": Family("JinaEmbeddingsV3Model", **{**ROTARY, "units_in": ("mlp.fc1",), "units_out": "mlp.fc2"}),
    # Its norms are no LayerNorms, which is what gates on hidden units know.
    "eurobert": Family("EuroBertModel", **{**ROTARY, "norms": (), "hidden": False}),
    "llama": Family("LlamaModel", **CAUSAL),
    "mistral": Family("MistralModel", **CAUSAL),
    "qwen2": Family("Qwen2Model", **CAUSAL),
    "qwen3": Family("Qwen3Model", **CAUSAL),
    "gemma3_text": Family(
        "Gemma3TextModel", **{**CAUSAL, "uncut": "both of its blocks end in a norm, which would undo a gate on what they make"}
    ),
    "vit": Family("ViTModel", **VIT),
    "vit_msn": Family("ViTMSNModel", **VIT),
    "ijepa": Family("IJepaModel", **{**VIT, "summary_tokens": 0, "pooled_heads": ()}),
    "deit": Family("DeiTModel", **{**VIT, "summary_tokens": 2}),
    "dinov2": Family(
        "Dinov2Model", **{**VIT, "layers": "encoder.layer", "pooled_heads": (), "needs": (("drop_path_rate", (0, 0.0)),)}
    ),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel",
        **{**VIT, "layers": "encoder.layer", "pooled_heads": (), "needs": (("drop_path_rate", (0, 0.0)),)},
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel",
        **{
            **VIT,
            "layers": "encoder.layers",
            "attention": "self_attn",
            "summary_tokens": 0,
            "pooled_heads": (),
            "projections": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "context": "self_attn.out_proj",
            "hidden": False,  # its attention pooling is torch's own nn.MultiheadAttention
        },
    ),
}


def is_sharded(module):
    """Has FSDP2 taken the parameters of this module apart?"""
    return hasattr(module, "reshard")


def transformers_model(model):
    """The one transformers model in a wrapper (a SentenceTransformer, a PeftModel, ...), or the model itself.

    Raises:
        UnsupportedModelError: there is none, or more than one.
    """
    found, within = [], set()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel) and id(module) not in within:
            found.append(module)
            within.update(map(id, module.modules()))
    if len(found) != 1:
        inside = f"has {', '.join(type(m).__name__ for m in found)} in it: pass one of them" if found else "has none in it"
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model, and {inside}.")
    return found[0]


def find_encoder(model, check=True):
    """`(family, encoder)` of a model: its row in the table, and the base model inside it (or the model itself).

    Raises:
        UnsupportedModelError: the family is not in the table, or this model is set up in a way that cannot be packed.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or (hasattr(model, "can_generate") and model.can_generate()):
        raise UnsupportedModelError(
            f"{type(model).__name__} generates text: each new token attends to those before it, so none of them can be dropped. "
            "This package is for models that read a text once: classification, embeddings, reranking, question answering, ..."
        )
    for module in (model, *model.children()):
        family = FAMILIES.get(getattr(getattr(module, "config", None), "model_type", None))
        if family and family.encoder in (cls.__name__ for cls in type(module).__mro__):
            if check:
                _check(family, model, module)
            return family, module
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}) cannot be packed. Supported families: "
        f"{', '.join(FAMILIES)}. One is added by a row in FAMILIES of hf_tokenprune/modeling/architectures.py, which says where its "
        "layers are, its attention and the module before which tokens may leave, and one in tests/families.py."
    )


def _check(family, model, encoder):
    if model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} generates text, token by token from a cache, which a packed model does not have. Packed can "
            "be the base model, and heads that read a whole text at once, such as sequence classification."
        )
    head_needs = [(name, allowed) for ending, name, allowed in family.head_needs if type(model).__name__.endswith(ending)]
    for name, allowed in (*family.needs, *head_needs):
        value = getattr(encoder.config, name, allowed[0])
        if value not in allowed:
            raise UnsupportedModelError(
                f"{type(model).__name__} has config.{name} = {value!r}; only {allowed[0]!r} can be packed: this package is "
                "for encoders. Load the model with that setting, or use another model."
            )
    attention = encoder.config._attn_implementation
    if attention not in (*SUPPORTED_ATTENTION, "token_pruning", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} was loaded with attn_implementation={attention!r}, which cannot be replaced by packed "
            f"attention. Load it with one of: {', '.join(SUPPORTED_ATTENTION)}."
        )


def reads_only_pooled(family, model, encoder):
    """Does this head read nothing but the first token? Then the last layer needs to compute that token alone. Only heads of
    transformers are known well enough to say so, if they have no part that a user has put there."""
    if model is encoder or not family.summary_tokens:
        return False
    if getattr(encoder.config, "classifier_pooling", "cls") not in ("cls", "bos"):
        return False
    head = getattr(type(model), "_dense_class", type(model))
    layers = {id(module) for layer in get_layers(family, encoder) for module in layer.modules()}
    parts = [part for name, part in model.named_modules() if id(part) not in layers and not name.startswith("token_pruner")]
    known = ("transformers", "torch", "peft", "bitsandbytes", __name__.partition(".")[0])
    if any(type(part).__module__.partition(".")[0] not in known for part in parts if not hasattr(type(part), "_dense_class")):
        return False
    return head.__module__.startswith("transformers.") and head.__name__.endswith(family.pooled_heads)


def get_layers(family, encoder):
    """The encoder's list of layers, in the order in which they are called."""
    return family.layers(encoder) if callable(family.layers) else encoder.get_submodule(family.layers)
