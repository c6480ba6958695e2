"""Cut attention heads, FFN units, hidden units and whole blocks out of a model."""

import torch
from torch import nn

from .architectures import find_encoder, get_layers
from .configs import skeleton
from .errors import ConfigError, UnsupportedModelError
from .sizes import NoAttention, NoBlock, NoUnits, Residual, has_attention, has_ffn, head_size, sizes_of


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


def context_left(model, number, chosen):
    """Where in the context of a layer's attention the chosen heads are: a list of numbers."""
    family, encoder = find_encoder(model, check=False)
    layer = get_layers(family, encoder)[number]
    if not has_attention(family, layer):
        return []
    width = head_size(family, layer)
    return _spread(chosen, layer.get_submodule(family.context).in_features // width, 1, width)


def _cut_heads(family, layer, chosen, select):
    context, width = layer.get_submodule(family.context), head_size(family, layer)
    count = context.in_features // width
    if not len(chosen):
        layer.set_submodule(family.attention, NoAttention(empty=family.exit_residual))
        if family.exit_residual:
            layer.set_submodule(family.exit, Residual())
        elif family.norms:
            layer.set_submodule(family.norms[0], nn.Identity())
        return
    for path in family.projections:
        linear = layer.get_submodule(path)
        times = 3 // len(family.projections)  # one that makes all three
        _cut_outputs(linear, _spread(chosen, count, times, linear.out_features // (times * count)), select)
    select(context.weight, 1, _spread(chosen, count, 1, width))


def _cut_units(family, layer, chosen, select):
    reader = layer.get_submodule(family.units_out)
    if not len(chosen):
        if family.exit_residual:
            layer.set_submodule(family.units_in[0].rpartition(".")[0], NoUnits())
            layer.set_submodule(family.ffn, Residual())
        else:
            layer.set_submodule(family.ffn, NoBlock())
            if family.norms:
                layer.set_submodule(family.norms[1], nn.Identity())
        return
    for path in family.units_in:
        writer = layer.get_submodule(path)
        _cut_outputs(writer, _spread(chosen, reader.in_features, writer.out_features // reader.in_features), select)
    select(reader.weight, 1, list(chosen))


def _cut_outputs(linear, index, select):
    select(linear.weight, 0, index)
    if linear.bias is not None:
        select(linear.bias, 0, index)


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
