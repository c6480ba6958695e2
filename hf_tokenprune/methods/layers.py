"""Layer-wise distillation, a helper of the gated methods (CoFi, Xia et al. 2022, arXiv 2204.00408, section 3.2)."""

import torch
from torch import nn
from transformers.utils import logging

from ..losses import layer_distillation, mean_square
from .base import Helper

logger = logging.get_logger(__name__)


class LayerDistillation(Helper):
    """Pulls the student's hidden states towards those of the teacher's layers, on all tokens that both have.

    Where weights are gated, layers of the student come and go: each of the teacher's is matched to the nearest of the student's
    that still has an FFN, through a learned matrix. Else each is matched to its own.

    Args:
        model: the model, attached.
        state: the module that keeps what is learned.
        weight: weight of the loss, which is relative to the mean square of the teacher's states.
        matched: are weights gated?
    """

    def __init__(self, model, state, weight, matched):
        self.state, self.weight, self.matched = state, weight, matched
        self.width = model.token_pruner.hidden_size
        self.told = False
        if matched:
            state.transform = nn.Parameter(torch.eye(self.width, device=model.device))

    def start_run(self):
        """Begin anew."""
        if self.matched:
            with torch.no_grad():
                self.state.transform.copy_(torch.eye(self.width))

    def prepare(self, objective):
        if objective.teacher is not None and self._fits(objective.teacher.token_pruner, objective.pruner):
            objective.pruner.remembers = objective.teacher.token_pruner.remembers = True

    def losses(self, objective):
        if objective.taught is None or not self._fits(objective.teacher.token_pruner, objective.pruner):
            return {}
        teacher, pruner = objective.teacher.token_pruner, objective.pruner
        taught, learned = ([_table(call) for call in p.last_forward.calls] for p in (teacher, pruner))
        size = torch.stack([mean_square(states, there) for states, there in taught]).mean()
        if self.matched:
            gates = None if pruner.structure is None else pruner.structure.hidden()
            if gates is not None:  # before a norm, hidden units that are to go are still there
                learned = [(states * gates, there) for states, there in learned]
            student = [states @ self.state.transform.T.to(states.dtype) for states, _ in learned]
            there = tuple([there for _, there in tables] for tables in (learned, taught))
            loss, _ = layer_distillation(student, [states for states, _ in taught], self._alive(pruner), there)
        else:
            pairs = [(mine - theirs, here & there) for (mine, here), (theirs, there) in zip(learned, taught, strict=True)]
            loss = torch.stack([mean_square(*pair) for pair in pairs]).mean()
        return {"layer_distillation": self.weight * loss / size}

    def _fits(self, teacher, pruner):
        fits = teacher.hidden_size == self.width and (self.matched or teacher.layer_count == pruner.layer_count)
        if not fits and not self.told:
            self.told = True
            logger.warning(
                f"The teacher has {teacher.layer_count} layers and {teacher.hidden_size} hidden units, the model to be trained "
                f"{pruner.layer_count} and {self.width}: only its logits are distilled. Say layer_weight=0 if that is meant."
            )
        return fits

    def _alive(self, pruner):
        structure = pruner.structure
        if structure is None or structure.hard is None:
            return [True] * pruner.layer_count
        return [bool(structure.layout.share(structure.hard, ("ffn", layer))) for layer in range(pruner.layer_count)]


def _table(call):
    """Hidden states after a layer as `(B * S, H)`, and which of these tokens there are."""
    batch = call.survivors
    there = torch.zeros(batch.batch_size * batch.seq_len, dtype=torch.bool, device=batch.index.device)
    there[batch.index] = True if batch.weights is None else batch.weights > 0  # a sampler's dropped tokens wait, masked
    return batch.unpack(call.left.float()).flatten(0, 1), there
