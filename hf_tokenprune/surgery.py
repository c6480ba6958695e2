"""Surgery: what gates have switched off is cut out of the weights, in the middle of a training run if need be."""

import torch

from .modeling.modeling_token_pruned import resize


def operate(model, *, heads, units, hidden=None, optimizer=None):
    """Cut a packed model down to some of its weights, and the optimizer's state along with them.

    The parameters that are left stay the same objects. Their moments in the optimizer are cut like themselves, or begin anew where
    the optimizer keeps them in another form (Adafactor, 8 bits); parameters of what is gone leave the optimizer.

    Args:
        model: a packed or token-pruned model.
        heads, units: for each layer, the numbers of the heads and of the FFN units that stay; none of them = the block goes.
        hidden: the numbers of the hidden units that stay; None = all.
        optimizer: a torch optimizer, or accelerate's around one; None if there is none.

    Raises:
        ConfigError, UnsupportedModelError: as `modeling.cutting.cut`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hf_tokenprune import pack
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
        >>> model = pack(BertModel(config))
        >>> _ = operate(model, heads=[[0, 3], []], units=[range(10), range(48)])
        >>> model.config.token_pruning["shapes"]["layers"]
        [{'layer': 0, 'heads': 2, 'units': 10}, {'layer': 1, 'heads': 0, 'units': 48}]
    """
    state = {} if optimizer is None else optimizer.state

    def cut_moments(parameter, dim, index):
        values = state.get(parameter, {}).items()
        moments = {name: value for name, value in values if isinstance(value, torch.Tensor) and value.numel() > 1}
        # Factored or quantised, by bitsandbytes in another shape, by torchao in tensors of its own.
        if any(type(value) is not torch.Tensor or value.shape != parameter.shape for value in moments.values()):
            state.pop(parameter)
            return
        for name, value in moments.items():
            state[parameter][name] = value.index_select(dim, index.to(value.device))

    before = {parameter: parameter.shape for parameter in model.parameters()}
    resize(model, heads=heads, units=units, hidden=hidden, on_cut=cut_moments)
    for parameter in model.parameters():
        if parameter.shape != before[parameter]:
            _leave_graph(parameter)
    gone = set(before) - set(model.parameters())
    if optimizer is not None and gone:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone:
            state.pop(parameter, None)
    return model


def _leave_graph(parameter):
    """Part a parameter from the graph of an earlier forward. As long as that graph is alive somewhere (gradient checkpointing leaves
    a piece of the last one), torch goes on using its node for the parameter, which insists on the old shape. Data of another
    type makes torch forget the node."""
    data = parameter.data
    parameter.data = data.to(torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
