"""What a model's config says of sizes: of the model as it was before anything was cut out, and of what is left of it.

`encoder._cut` is a cut model's history: `layers` that are left, by their dense numbers; `dense`, the original values of config
entries that were changed to say what is left; `restore`, those of entries that were changed so that a plain transformers class
refuses the weights.
"""

import contextlib
import copy

import torch

from .architectures import FAMILIES, find_encoder, get_layers
from .sizes import group_size, head_size, sizes_of

FFN_SIZES = ("intermediate_size", "hidden_dim", "mlp_ratio")


def encoder_config(config):
    """The part of a model's config that is its encoder's: the whole, or one of its parts."""
    if config.model_type in FAMILIES:
        return config
    return next((part for part in vars(config).values() if getattr(part, "model_type", None) in FAMILIES), config)


@contextlib.contextmanager
def restored(config, shapes):
    """Within this context the config builds the model that the shape map (or None) is to be replayed on."""
    own, changed = encoder_config(config), {}
    try:
        for name, value in (shapes or {"restore": {}})["restore"].items():
            changed[name] = getattr(own, name)
            setattr(own, name, value)
        yield
    finally:
        for name, value in changed.items():
            setattr(own, name, value)


def _resized_config(model, **sizes):
    """A copy of a model's config with other sizes in the encoder's part of it."""
    _, encoder = find_encoder(model, check=False)
    config = copy.deepcopy(model.config)
    own = encoder_config(config)
    config._attn_implementation_internal = own._attn_implementation_internal = "eager"
    for name, value in {**getattr(encoder, "_cut", {"restore": {}})["restore"], **sizes}.items():
        setattr(own, name, value)
    return config


def skeleton(model, **sizes):
    """A model of the same dense class and config on the meta device, with other sizes in the encoder's config."""
    dense_class = getattr(type(model), "_dense_class", type(model))
    with torch.device("meta"):
        return dense_class(_resized_config(model, **sizes))


def dense_config(model):
    """The config of the model that a cut model was cut from."""
    _, encoder = find_encoder(model, check=False)
    return _resized_config(model, **getattr(encoder, "_cut", {"dense": {}})["dense"])


def dense_skeleton(model):
    """What a cut model was cut from, on the meta device: same class, original sizes."""
    dense_class = getattr(type(model), "_dense_class", type(model))
    with torch.device("meta"):
        return dense_class(dense_config(model))


def settle_config(model):
    """Let the config of a cut model say what is left of it as far as it can.

    If a plain transformers config can say it all, it does, and the folder opens without remote code, too: whole layers were cut,
    or the same number of FFN units in every layer, or heads and hidden units that still fit each other. If not, a plain class
    must not open the folder. Mostly it finds weights of other sizes and refuses; where it would merely miss some, and make them
    up, the config gets a size that no weight has.

    Returns:
        True if the config says it all.
    """
    _, encoder = find_encoder(model, check=False)
    config, history = encoder.config, encoder._cut
    for name, value in history["restore"].items():
        setattr(config, name, value)
    history["restore"] = {}
    if _adopt_plain_config(model):
        return True
    if not _clashes(model):
        steps = dict.fromkeys(FFN_SIZES, 1) if any(sizes_of(model)[2]) else {"hidden_size": config.num_attention_heads}
        name = next(
            name
            for name, step in steps.items()
            if hasattr(config, name) and _clashes(model, **{name: getattr(config, name) + step})
        )
        history["restore"][name] = getattr(config, name)
        setattr(config, name, getattr(config, name) + steps[name])
    return False


def _clashes(model, **sizes):
    """Would a plain model of this config find weights of other sizes than its own?"""
    theirs = _shapes(skeleton(model, **sizes))
    return any(theirs.get(name, shape) != shape for name, shape in _shapes(model).items())


def _shapes(model):
    return {name: p.shape for name, p in model.named_parameters() if not name.startswith("token_pruner.")}


def _adopt_plain_config(model):
    family, encoder = find_encoder(model, check=False)
    hidden, heads, units = sizes_of(model)
    if not heads[0] or not units[0]:  # no config says that a block is missing
        return False
    old = encoder.config
    layers = encoder._cut["layers"]
    wanted = {"num_hidden_layers": len(layers), "hidden_size": hidden}
    attention = get_layers(family, encoder)[0].get_submodule(family.attention)
    group = group_size(attention)
    wanted["num_attention_heads"] = heads[0] * group
    if hasattr(old, "num_key_value_heads"):
        wanted["num_key_value_heads"] = heads[0]
    for name in ("intermediate_size", "hidden_dim"):  # DINOv2 has neither, but a ratio
        if hasattr(old, name):
            wanted[name] = units[0]
            break
    width = head_size(family, get_layers(family, encoder)[0]) // group
    if (
        hidden != heads[0] * group * width or getattr(old, "head_dim", None) is not None
    ):  # some have a size of their own for this
        wanted["head_dim"] = width
    if isinstance(getattr(old, "layer_types", None), list):
        wanted["layer_types"] = [old.layer_types[i] for i in layers]
    now = {name: getattr(old, name, None) for name in wanted}
    changed = {name: value for name, value in wanted.items() if now[name] != value}
    try:
        twin = skeleton(model, **changed)
        type(twin.config).from_dict(twin.config.to_dict())  # as a folder is opened
    except Exception:  # a size that the class refuses: each has rules of its own
        return False
    if _shapes(model) != _shapes(twin):
        return False
    for name in changed:
        before = old.hidden_size // old.num_attention_heads if name == "head_dim" and now[name] is None else now[name]
        encoder._cut["dense"].setdefault(name, before)
    for name, value in changed.items():
        setattr(old, name, value)
    encoder._cut["layers"] = list(range(len(layers)))
    return True
