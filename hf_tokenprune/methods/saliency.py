"""Saliency: how much what a teacher says hangs on each token in each layer, and scorers that learn to foresee it."""

from itertools import accumulate

import torch
from torch.nn.functional import normalize

from ..losses import listwise
from ..modeling.architectures import find_encoder, get_layers
from .base import Helper
from .outputs import is_separate


class SaliencyLoss(Helper):
    """Teaches the scorers at the sites which tokens the teacher's judgement hangs on, while the gates are learned and after.

    The saliency of a token in a layer (of pixels: Simonyan et al. 2013, arXiv 1312.6034) is the norm of the gradient of what the
    teacher says with respect to the hidden state with which the token enters that layer: one backward pass through the teacher
    gives it for all layers. What is taught is the token's
    share in the saliency of its text, summed over the site's layer and all later ones: they will miss what is dropped, and know
    better what the answer is made of. The loss goes on into the encoder, whose early layers learn to find these tokens.
    """

    def __init__(self, model, weight):
        self.weight = weight
        self.layers = list(get_layers(*find_encoder(model)))
        self.targets = {}  # by site, `(B, S)`: what its scorer is taught about the present batch

    def prepare(self, objective):
        teacher = objective.teacher
        if teacher is None:
            return
        objective.traced = self.trace
        objective.pruner.remembers = teacher.token_pruner.remembers = True
        if not hasattr(teacher, "has_gradients"):
            teacher.has_gradients = True
            get_layers(*find_encoder(teacher))[0].register_forward_pre_hook(_let_it_have_a_gradient)

    def trace(self, objective, taught):
        """Find out what hangs on each token in what the teacher has said, a model output made with gradients; then take these
        from it."""
        calls = objective.teacher.token_pruner.last_forward.calls
        learn = self._who_learns(objective)
        if learn:
            calls_above, separate = calls[min(learn.values()) :], is_separate(objective.model)
            said = sum(_said(*reading, separate) for reading in _readings(objective, taught, calls[0].batch))
            # Scaled as the loss is: in half precision the gradients of a text that nothing hangs on would be lost.
            gradients = torch.autograd.grad(said * objective.loss_scale(), [call.entered for call in calls_above])
            self.targets = _targets(learn, calls_above, gradients)
        for call in calls:
            call.entered, call.left = call.entered.detach(), call.left.detach()
        for name, value in taught.items():
            if isinstance(value, torch.Tensor):
                taught[name] = value.detach()

    def losses(self, objective):
        targets, self.targets = self.targets, {}
        if not targets:
            return {}
        calls, losses = objective.pruner.last_forward.calls, []
        for site, target in targets.items():
            scores, mask = padded_importance(calls[site], calls[site].protected)
            losses.append(listwise(scores, target, mask))
        return {"importance": self.weight * torch.stack(losses).mean()}

    def _who_learns(self, objective):
        """The sites that had importance in the student's forward, and the teacher's layer for each. While settling, those have none
        that keep every token."""
        left, calls = get_layers(*find_encoder(objective.model)), objective.pruner.last_forward.calls
        theirs = len(objective.teacher.token_pruner.last_forward.calls)
        found = {}
        for site in map(int, objective.pruner.sites):
            if calls[site].importance is not None:
                was = site if len(left) == len(self.layers) else self.layers.index(left[site])  # before layers were cut out
                found[site] = was * theirs // len(self.layers)
        return found


def _targets(learn, calls, gradients):
    """By site, `(B, S)`: what hangs on each token in the teacher's layer for it or later; from the calls of the teacher's last
    layers and the gradients of what entered them, `(1, T, H)`."""
    norms = [gradient.float().norm(dim=-1, keepdim=True) for gradient in gradients]
    ahead = from_here_on([call.batch.unpack(norm)[..., 0] for call, norm in zip(calls, norms, strict=True)])
    return {site: ahead[layer - calls[0].layer] for site, layer in learn.items()}


def from_here_on(saliency):
    """What of a teacher's judgement hangs on each token, in a layer or later.

    Args:
        saliency: per layer, `(B, S)`; 0 for padding.

    Returns:
        Per layer, `(B, S)`: the sum over it and all later layers of each token's share in the saliency of its text. Where a summary
        token takes most of a layer's, there is less to be shared out.
    """
    return list(accumulate(normalize(layer, p=1, dim=-1) for layer in reversed(saliency)))[::-1]


def _let_it_have_a_gradient(layer, args):
    """A pre-hook, after the one that packs: the parameters of a teacher are frozen, so that nothing else would want one."""
    if torch.is_grad_enabled() and not args[0].requires_grad:
        args[0].requires_grad_()


def _readings(objective, taught, batch):
    """What is read of a model output: pairs of a tensor with a row per text (or per token), and, if it holds logits, which of them
    count."""
    if objective.readout is not None:
        return [(objective.readout(taught).float(), None)]
    readings = []
    for name, logits in taught.items():
        if name.endswith("logits"):
            real = torch.ones_like(logits, dtype=torch.bool)
            if name in ("start_logits", "end_logits"):  # a span does not begin in padding
                real = torch.zeros_like(real).flatten().index_fill(0, batch.index, True).view_as(real)
            readings.append((logits.float(), real))
    return readings or [(taught["last_hidden_state"].float().flatten(0, 1)[batch.index], None)]


def _said(tensor, real, separate):
    """A scalar whose gradient is that of what is said, each row of it to the same length: of how far the probable logits are above
    the mean; of how far each logit is from 0, if it is a judgement of its own; of how far embeddings are from their mean (their
    own length may be one and the same)."""
    if real is None:
        weight = tensor - tensor.mean(0)
    elif separate:
        weight = tensor.sign()
    else:
        mean = real / real.sum(-1, keepdim=True).clamp(min=1)
        weight = tensor.masked_fill(~real, torch.finfo(tensor.dtype).min).softmax(-1) - mean
    return (normalize(weight.detach(), dim=-1) * tensor).sum()


def padded_importance(call, stays):
    """A layer's importance as `(B, S)`, and which of these entries are tokens that it saw, but for those that stay anyway, `(T,)`."""
    importance, mask = (call.batch.unpack(row[None, :, None])[..., 0] for row in (call.importance, ~stays))
    return importance, mask
