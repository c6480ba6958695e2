"""Layer-wise distillation, a helper of the gated methods (CoFi, Xia et al. 2022, arXiv 2204.00408, section 3.2)."""

import torch
from torch import nn
from transformers.utils import logging

from ..losses import common, layer_distillation, mean_square
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
        pruner, everyone = objective.pruner, objective.teacher.token_pruner.last_forward.first
        calls, matrix = pruner.last_forward.calls, self._matrix(pruner)
        change = (lambda states: states) if matrix is None else (lambda states: states @ matrix.T.to(states.dtype))
        taught, theirs = _tables(objective.teacher.token_pruner.last_forward.calls, everyone)
        learned, mine = _tables(calls, everyone, change)
        size = torch.stack([mean_square(*table) for table in zip(taught, theirs, strict=True)]).mean()
        if self.matched:
            loss, _ = layer_distillation(learned, taught, self._alive(pruner), (mine, theirs))
        else:
            pairs = zip(learned, mine, taught, theirs, strict=True)
            loss = torch.stack([mean_square(a - b, common(here, there)) for a, here, b, there in pairs]).mean()
        return {"layer_distillation": self.weight * loss / size}

    def _matrix(self, pruner):
        """From the student's hidden units to the teacher's; None where they are the same."""
        if not self.matched:
            return None
        gates = None if pruner.structure is None else pruner.structure.hidden()
        # Before a norm, hidden units that are to go are still there.
        return self.state.transform if gates is None else self.state.transform * gates

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


def _tables(calls, everyone, change=lambda states: states):
    """Hidden states after each layer, and which tokens there are of each: lists of `(T, H)`, and of `(T,)` bool or None for all.

    Args:
        calls: the `LayerCall`s.
        everyone: the batch of all real tokens, whose rows these are.
        change: what to make of the states `(K, H)` of those that are left.
    """
    places = everyone.index.new_zeros(everyone.batch_size * everyone.seq_len)
    places[everyone.index] = torch.arange(everyone.total, device=places.device)
    found = [_table(call.survivors, change(call.left[0].float()), everyone.total, places) for call in calls]
    return [states for states, _ in found], [there for _, there in found]


def _table(batch, states, total, places):
    alive = None if batch.weights is None else batch.weights > 0  # a sampler's dropped tokens wait, masked
    if batch.total == total:
        return states, alive
    rows = places[batch.index]
    there = torch.zeros(total, dtype=torch.bool, device=rows.device)
    there[rows] = True if alive is None else alive
    return states.new_zeros(total, states.shape[1]).index_copy(0, rows, states), there
