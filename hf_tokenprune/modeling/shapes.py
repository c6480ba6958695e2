"""Smaller weights: cut attention heads, FFN units, hidden units and whole blocks out of a model, and do it again on loading.

A model that was cut is described by its shape map, `config.token_pruning["shapes"]`: how many hidden units are left, and for
each layer that is left, which layer of the dense model it was and how many heads and FFN units it has. Counts are enough: on
loading, a fresh dense model is cut down to them, whichever units these are, and then filled with the saved weights.

    {"hidden": 320, "layers": [{"layer": 0, "heads": 8, "units": 912}, ...], "dense": {...}, "restore": {...}}

`dense` are the original values of config entries that were changed to say what is left, `restore` those of entries that
were changed so that a plain transformers class refuses the weights (see `settle_config`).
"""

import contextlib
import copy

import torch
from torch import nn

from .architectures import FAMILIES, find_encoder, get_layers
from .errors import ConfigError, UnsupportedModelError

FFN_SIZES = ("intermediate_size", "hidden_dim", "mlp_ratio")
MOST, MOST_LAYERS = 1_000_000, 1000  # sizes beyond these are not a model's, and nobody shall make us reserve memory for them
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "hidden_dim",
    "head_dim",
    "layer_types",
)


class NoAttention(nn.Module):
    """Stands where all heads of a layer were cut out. What follows adds nothing to the residual stream."""

    def __init__(self, empty):
        super().__init__()
        self.empty = empty

    def forward(self, hidden_states, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if hasattr(value, "skip"):
                value.skip()
        return (hidden_states[..., :0] if self.empty else torch.zeros_like(hidden_states)), None


class NoUnits(nn.Module):
    """Stands where all units of an FFN were cut out, before a `Residual`."""

    def forward(self, hidden_states):
        return hidden_states[..., :0]


class NoBlock(nn.Module):
    """Stands for an FFN that is gone and whose result would be added to a residual."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class Residual(nn.Module):
    """Stands for the end of a block that is gone: the residual passes through."""

    def forward(self, _, residual):
        return residual


def has_attention(family, layer):
    """Does this layer have heads left?"""
    return not isinstance(layer.get_submodule(family.attention), NoAttention)


def has_ffn(family, layer):
    """Does this layer have FFN units left?"""
    return not isinstance(layer.get_submodule(family.ffn), (NoBlock, Residual))


def head_size(family, layer):
    """Width of one head of a layer that has any; where several queries share keys and values, of such a group: it is cut as one."""
    attention = layer.get_submodule(family.attention)
    return (getattr(attention, "head_dim", None) or attention.attention_head_size) * _group_size(attention)


def _group_size(attention):
    """How many query heads share one head of keys and values."""
    return getattr(attention, "num_key_value_groups", 1)


def sizes_of(model):
    """`(hidden, heads, units)` of a model as it is: the hidden size, and heads and FFN units of each layer.

    Raises:
        UnsupportedModelError: nothing can be cut out of the family, or the layers are not built as its row says.
    """
    family, encoder = find_encoder(model, check=False)
    if family.uncut:
        raise UnsupportedModelError(
            f"No weights can be cut out of {type(model).__name__}: {family.uncut}. Tokens can be dropped: ToP(target_macs=0.5), for "
            "instance."
        )
    heads, units, hidden = [], [], None
    for layer in get_layers(family, encoder):
        try:
            attention, ffn = has_attention(family, layer), has_ffn(family, layer)
            context = layer.get_submodule(family.context) if attention else None
            reader = layer.get_submodule(family.units_out) if ffn else None
        except AttributeError as error:
            raise UnsupportedModelError(
                f"The layers of this {type(model).__name__} are not built like those of its family ({error}), so no heads or FFN "
                "units can be cut out of it."
            ) from None
        heads.append(context.in_features // head_size(family, layer) if attention else 0)
        units.append(reader.in_features if ffn else 0)
        hidden = (context or reader).out_features
    return hidden, heads, units


def shape_map(model):
    """The shape map of a model, or None if nothing was ever cut out of it."""
    _, encoder = find_encoder(model, check=False)
    history = getattr(encoder, "_cut", None)
    if history is None:
        return None
    hidden, heads, units = sizes_of(model)
    layers = [{"layer": i, "heads": a, "units": f} for i, a, f in zip(history["layers"], heads, units, strict=True)]
    return {"hidden": hidden, "layers": layers, "dense": dict(history["dense"]), "restore": dict(history["restore"])}


def check_shapes(shapes):
    """Raise ConfigError unless this has the form of a shape map."""

    def damaged(why):
        return ConfigError(
            f"config.token_pruning is damaged: shapes {why}. Restore the config.json that was saved with the model."
        )

    if not isinstance(shapes, dict) or set(shapes) != {"hidden", "layers", "dense", "restore"}:
        raise damaged("is not a shape map")
    if (
        not _count(shapes["hidden"], 1)
        or not isinstance(shapes["layers"], list)
        or not 0 < len(shapes["layers"]) <= MOST_LAYERS
    ):
        raise damaged(f"has no hidden units, no layers, or more than {MOST_LAYERS}")
    last = -1
    for entry in shapes["layers"]:
        if not isinstance(entry, dict) or set(entry) != {"layer", "heads", "units"} or not all(map(_count, entry.values())):
            raise damaged(f"has the layer {entry!r}")
        if entry["layer"] <= last or not entry["heads"] + entry["units"]:
            raise damaged(f"has the layer {entry!r} out of order or empty")
        last = entry["layer"]
    for part in ("dense", "restore"):
        sizes = shapes[part]
        if not isinstance(sizes, dict) or not set(sizes) <= {*SIZES, *FFN_SIZES}:
            raise damaged(f"has {part} = {str(sizes)[:100]}")
        for name, value in sizes.items():
            fine = _count(value, 1) and (name != "num_hidden_layers" or value <= MOST_LAYERS)
            if name == "layer_types":
                fine = isinstance(value, list) and len(value) == sizes.get("num_hidden_layers")
                fine = fine and all(isinstance(kind, str) for kind in value)
            if not fine:
                raise damaged(f"has {part} with {name} = {str(value)[:100]}")


def _count(value, least=0):
    return type(value) is int and least <= value <= MOST


def replay(model, shapes):
    """Cut a fresh dense model down to the counts of a shape map; its weights are to be loaded afterwards.

    Raises:
        ConfigError: the map does not fit the model.
    """
    hidden, heads, units = sizes_of(model)
    layers = {entry["layer"]: entry for entry in shapes["layers"]}
    wanted_heads = [layers[i]["heads"] if i in layers else 0 for i in range(len(heads))]
    wanted_units = [layers[i]["units"] if i in layers else 0 for i in range(len(units))]
    if (
        max(layers) >= len(heads)
        or shapes["hidden"] > hidden
        or any(a > b for a, b in zip((*wanted_heads, *wanted_units), (*heads, *units), strict=True))
    ):
        raise ConfigError(
            f"config.token_pruning says that {shapes['hidden']} hidden units and {len(layers)} layers are left, with heads "
            f"{wanted_heads} and FFN units {wanted_units}, but the model of this config has only {hidden}, heads {heads} and "
            f"units {units}. Restore the config.json that was saved with the model."
        )
    dense = shapes["dense"]
    smaller = [dense.get("hidden_size", hidden) < shapes["hidden"], dense.get("num_hidden_layers", len(heads)) < len(layers)]
    smaller += [dense.get("num_attention_heads", max(heads)) < max(wanted_heads)]
    smaller += [dense[name] < max(wanted_units) for name in ("intermediate_size", "hidden_dim") if name in dense]
    if any(smaller):
        raise ConfigError(
            f"config.token_pruning says that this model was cut from a smaller one, {dense}. Restore the config.json that was saved "
            "with the model."
        )
    cut(
        model,
        hidden=range(shapes["hidden"]) if shapes["hidden"] < hidden else None,
        heads=[range(count) for count in wanted_heads],
        units=[range(count) for count in wanted_units],
    )
    _, encoder = find_encoder(model, check=False)
    encoder._cut.update(dense=dict(dense), restore=dict(shapes["restore"]))
    return model


def cut_parameter(parameter, dim, index, on_cut=None):
    """Cut a parameter in place down to what lies at `index` (a tensor), after telling `on_cut(parameter, dim, index)`."""
    if on_cut is not None:
        on_cut(parameter, dim, index)
    parameter.data = parameter.data.index_select(dim, index)
    parameter.grad = None


def cut(model, *, heads, units, hidden=None, on_cut=None):
    """Cut a model in place down to some of its heads, FFN units and hidden units. Parameters stay the same objects.

    A block without heads or units is replaced by nothing, a layer without either is removed.

    Args:
        model: an encoder of a supported family, without the hooks of a `TokenPruner`.
        heads: for each layer, the numbers of the heads that stay.
        units: for each layer, the numbers of the FFN units that stay.
        hidden: the numbers of the hidden units that stay; None = all.
        on_cut: called with `(parameter, dim, index)` before each cut of a parameter.

    Raises:
        ConfigError: no layer or no hidden unit would be left.
        UnsupportedModelError: hidden units of this family cannot be cut.
    """
    family, encoder = find_encoder(model, check=False)
    layers = get_layers(family, encoder)
    if not any(len(a) + len(f) for a, f in zip(heads, units, strict=True)) or (hidden is not None and not len(hidden)):
        raise ConfigError("Nothing would be left of this model: keep at least one head or FFN unit, and one hidden unit.")
    have, *counts = sizes_of(model)
    for name, chosen, most in (("heads", heads, counts[0]), ("units", units, counts[1]), ("hidden", [hidden or ()], [have])):
        if any(len(c) and not 0 <= min(c) <= max(c) < n for c, n in zip(chosen, most, strict=True)):
            raise ConfigError(f"{name} names what this model does not have: it has {most}.")
    dims_of = {} if hidden is None else hidden_dims(model)
    if not hasattr(encoder, "_cut"):
        encoder._cut = {"layers": list(range(len(layers))), "dense": {}, "restore": {}}

    def select(parameter, dim, index):
        if len(index) < parameter.shape[dim]:
            index = torch.as_tensor(list(index), dtype=torch.long, device=parameter.device)
            cut_parameter(parameter, dim, index, on_cut)

    parameters = dict(model.named_parameters())
    for name, dims in dims_of.items():
        for dim, times in dims:
            select(parameters[name], dim, _spread(hidden, parameters[name].shape[dim] // times, times))
    for layer, some_heads, some_units in zip(layers, heads, units, strict=True):
        if has_attention(family, layer):
            _cut_heads(family, layer, some_heads, select)
        if has_ffn(family, layer):
            _cut_units(family, layer, some_units, select)
    for number in reversed(range(len(layers))):
        if not len(heads[number]) and not len(units[number]):
            del layers[number], encoder._cut["layers"][number]
    for module in model.modules():
        _refresh(module)
    return model


def _spread(chosen, size, times, width=1):
    """Where the chosen ones of `size` things, each `width` entries wide, lie in a dimension that holds all of them `times` times."""
    return [(t * size + i) * width + w for t in range(times) for i in chosen for w in range(width)]


def _cut_heads(family, layer, chosen, select):
    context, width = layer.get_submodule(family.context), head_size(family, layer)
    count = context.in_features // width
    if not len(chosen):
        layer.set_submodule(family.attention, NoAttention(empty=family.cut_residual))
        if family.cut_residual:
            layer.set_submodule(family.cut, Residual())
        elif family.norms:
            layer.set_submodule(family.norms[0], nn.Identity())
        return
    for path in family.projections:
        linear = layer.get_submodule(path)
        times = 3 // len(family.projections)  # one that makes all three
        index = _spread(chosen, count, times, linear.out_features // (times * count))
        select(linear.weight, 0, index)
        if linear.bias is not None:
            select(linear.bias, 0, index)
    select(context.weight, 1, _spread(chosen, count, 1, width))


def _cut_units(family, layer, chosen, select):
    reader = layer.get_submodule(family.units_out)
    if not len(chosen):
        if family.cut_residual:
            layer.set_submodule(family.units_in[0].rpartition(".")[0], NoUnits())
            layer.set_submodule(family.ffn, Residual())
        else:
            layer.set_submodule(family.ffn, NoBlock())
            if family.norms:
                layer.set_submodule(family.norms[1], nn.Identity())
        return
    for path in family.units_in:
        writer = layer.get_submodule(path)
        index = _spread(chosen, reader.in_features, writer.out_features // reader.in_features)
        select(writer.weight, 0, index)
        if writer.bias is not None:
            select(writer.bias, 0, index)
    select(reader.weight, 1, list(chosen))


def _refresh(module):
    """Let a module say the size that its weights have now."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]


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


def hidden_dims(model):
    """Which dimensions of which parameters run over the hidden units: `{name: [(dim, times)]}`, where a dimension may hold all
    of them `times` times. They are those that grow when the hidden size in the config does, aside from heads and FFN units.

    Raises:
        UnsupportedModelError: hidden units of this family cannot be cut, or the parameters cannot be told apart.
    """
    family, encoder = find_encoder(model, check=False)
    if not family.hidden:
        raise UnsupportedModelError(
            f"Hidden units cannot be cut out of {type(model).__name__}; its heads, FFN units and blocks can."
        )
    config = encoder.config
    size = config.hidden_size
    larger = size + 2 * config.num_attention_heads  # heads two wider: rotary positions want an even width
    sizes = {"hidden_size": larger}
    if getattr(config, "embedding_size", None) == size:
        sizes["embedding_size"] = larger
    if getattr(config, "pooler_output_size", None) == size:
        sizes["pooler_output_size"] = larger
    twins = [skeleton(model), skeleton(model, **sizes)]
    history = getattr(encoder, "_cut", None)
    for twin in twins:
        layers = get_layers(*find_encoder(twin, check=False))
        for number in reversed(range(len(layers))):
            if history is not None and number not in history["layers"]:
                del layers[number]
    apart = _not_hidden(family, twins[0])
    now, then = (dict(twin.named_parameters()) for twin in twins)
    found = {}
    for name, _ in model.named_parameters():
        if name not in now:
            continue
        dims = []
        for dim, (a, b) in enumerate(zip(now[name].shape, then[name].shape, strict=True)):
            if a == b or (name, dim) in apart:
                continue
            if a % size or b % larger or a // size != b // larger:
                raise UnsupportedModelError(
                    f"Dimension {dim} of {name} in {type(model).__name__} is neither hidden units nor heads nor FFN units, so hidden "
                    "units cannot be cut out of it."
                )
            dims.append((dim, a // size))
        if dims:
            found[name] = dims
    return found


def _not_hidden(family, model):
    """`(name, dim)` of all dimensions that run over heads or FFN units."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    apart = set()
    for layer in get_layers(*find_encoder(model, check=False)):
        for path, dim in (
            *((path, 0) for path in (*family.projections, *family.units_in)),
            (family.context, 1),
            (family.units_out, 1),
        ):
            linear = layer.get_submodule(path)
            apart.add((names[id(linear.weight)], dim))
            if dim == 0 and linear.bias is not None:
                apart.add((names[id(linear.bias)], 0))
    return apart


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
    group = _group_size(attention)
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


def dense_config(model):
    """The config of the model that a cut model was cut from."""
    _, encoder = find_encoder(model, check=False)
    return _resized_config(model, **getattr(encoder, "_cut", {"dense": {}})["dense"])


def dense_skeleton(model):
    """What a cut model was cut from, on the meta device: same class, original sizes."""
    dense_class = getattr(type(model), "_dense_class", type(model))
    with torch.device("meta"):
        return dense_class(dense_config(model))
