"""Shape maps: what was cut out of a model, and how to do it again on loading.

A model that was cut is described by its shape map, `config.token_pruning["shapes"]`: how many hidden units are left, and for
each layer that is left, which layer of the dense model it was and how many heads and FFN units it has. Counts are enough: on
loading, a fresh dense model is cut down to them, whichever units these are, and then filled with the saved weights.

    {"hidden": 320, "layers": [{"layer": 0, "heads": 8, "units": 912}, ...], "dense": {...}, "restore": {...}}

`dense` are the original values of config entries that were changed to say what is left, `restore` those of entries that
were changed so that a plain transformers class refuses the weights (see `configs.settle_config`).
"""

from .architectures import find_encoder
from .configs import FFN_SIZES
from .cutting import cut
from .errors import ConfigError
from .sizes import sizes_of

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


def shape_map(model):
    """The shape map of a model, or None if nothing was ever cut out of it."""
    _, encoder = find_encoder(model, check=False)
    if not hasattr(encoder, "_cut"):
        _recall(model, encoder)
    history = getattr(encoder, "_cut", None)
    if history is None:
        return None
    hidden, heads, units = sizes_of(model)
    layers = [{"layer": i, "heads": a, "units": f} for i, a, f in zip(history["layers"], heads, units, strict=True)]
    return {"hidden": hidden, "layers": layers, "dense": dict(history["dense"]), "restore": dict(history["restore"])}


def _recall(model, encoder):
    """Give a model that a plain transformers class has opened the history in its config, which that class does not read."""
    settings = getattr(model.config, "token_pruning", None)
    shapes = settings.get("shapes") if isinstance(settings, dict) else None
    if shapes is None:
        return
    check_shapes(shapes)
    said = shapes["hidden"], [entry["heads"] for entry in shapes["layers"]], [entry["units"] for entry in shapes["layers"]]
    if said != sizes_of(model):
        return  # another model, made from the config object of one that was cut
    layers = [entry["layer"] for entry in shapes["layers"]]
    encoder._cut = {"layers": layers, "dense": dict(shapes["dense"]), "restore": dict(shapes["restore"])}


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
