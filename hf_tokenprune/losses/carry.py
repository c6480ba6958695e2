"""Bring an auxiliary loss to the optimizer through a model's output, whoever computes the main loss."""

import torch


class _Carry(torch.autograd.Function):
    """Pass tensors through, add `auxiliary` to the first if it is the loss, and hand `auxiliary` its gradient on the way back."""

    @staticmethod
    def forward(ctx, auxiliary, has_loss, share, sharded, *tensors):
        ctx.set_materialize_grads(False)
        ctx.has_loss, ctx.share, ctx.like = has_loss, share, auxiliary.detach()
        ctx.kinds = [(x.shape, x.dtype, x.device) for x in tensors] if sharded else None
        passed = [tensor.clone() for tensor in tensors]  # no views: who computes a loss may edit logits in place
        if has_loss:
            passed[0] = tensors[0] + auxiliary.to(tensors[0].dtype)
        return tuple(passed)

    @staticmethod
    def backward(ctx, *gradients):
        loss = gradients[0] if ctx.has_loss else None
        auxiliary = torch.full_like(ctx.like, float(ctx.share())) if loss is None else loss.to(ctx.like.dtype)
        if ctx.kinds is not None:
            kinds = zip(gradients, ctx.kinds, strict=True)
            gradients = [torch.zeros(k[0], dtype=k[1], device=k[2]) if g is None else g for g, k in kinds]
        return (auxiliary, None, None, None, *gradients)


def carry(outputs, auxiliary, *, has_loss, share, sharded=False):
    """Make the gradient of `auxiliary` flow whenever something is computed from `outputs` and back-propagated.

    Where the caller uses the model's own loss, `auxiliary` is part of it: it is reported with it and scaled like it. Where the
    caller computes a loss from another output (label smoothing, `compute_loss_func`, an own `compute_loss`), the output
    tensors are passed through, and the back-propagation that reaches one of them starts one into `auxiliary`.

    Args:
        outputs: a transformers `ModelOutput`, or a tuple.
        auxiliary: scalar tensor.
        has_loss: the first entry of `outputs` is the model's loss.
        share: callable giving the weight of `auxiliary` where the model's loss is not used, because its scaling is unknown then;
            for instance 1 / accumulation steps.
        sharded: FSDP2 or DeepSpeed looks on. DeepSpeed wants a gradient of whatever is connected, so outputs that nobody reads get
            one of zeros.

    Returns:
        Outputs of the same type.

    Example:
        >>> from transformers.modeling_outputs import BaseModelOutput
        >>> weight = torch.ones((), requires_grad=True)
        >>> states = torch.ones(1, 2, 3, requires_grad=True)
        >>> outputs = carry(BaseModelOutput(states), 3 * weight, has_loss=False, share=lambda: 1.0)
        >>> outputs.last_hidden_state.sum().backward()
        >>> weight.grad
        tensor(3.)
    """
    entries = list(outputs) if isinstance(outputs, tuple) else list(outputs.values())
    flat = [x for entry in entries for x in (entry if isinstance(entry, (tuple, list)) else (entry,))]
    moving = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.requires_grad]
    if has_loss and 0 not in moving:
        moving.insert(0, 0)
    if not moving:
        return outputs
    for i, tensor in zip(moving, _Carry.apply(auxiliary, has_loss, share, sharded, *(flat[i] for i in moving)), strict=True):
        flat[i] = tensor
    flat = iter(flat)
    entries = [tuple(next(flat) for _ in entry) if isinstance(entry, (tuple, list)) else next(flat) for entry in entries]
    if isinstance(outputs, tuple):
        return tuple(entries)
    for name, entry in zip(list(outputs.keys()), entries, strict=True):
        outputs[name] = entry
    return outputs
