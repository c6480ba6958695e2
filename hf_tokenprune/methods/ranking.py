"""ToP's ranking distillation: early layers rank tokens as the teacher's last layer does."""

import torch

from ..losses import ranking_distillation
from ..schedule import ramp
from .base import Helper
from .saliency import padded_importance


class RankingLoss(Helper):
    """Pulls the early sites' ranking of the tokens towards that of the teacher's last layer; its weight falls to 1 % over the
    annealing."""

    def __init__(self, pruner, sites, weight, top_k):
        early = range(max(1, pruner.layer_count // 3 + 1))
        self.early = [site for site in sites if site in early] or sites[:1]
        self.weight, self.top_k = weight, top_k

    def prepare(self, objective):
        if objective.moment.phase == "anneal" and objective.teacher is not None:
            objective.pruner.watched, objective.pruner.differentiable = frozenset(self.early), True
            teacher = objective.teacher.token_pruner
            teacher.watched = frozenset({max(i for i, has in enumerate(teacher.with_attention) if has)})

    def losses(self, objective):
        if objective.moment.phase != "anneal" or objective.taught is None:
            return {}
        teacher = objective.teacher.token_pruner.last_forward
        last = next(call for call in reversed(teacher.calls) if call.importance is not None)
        target, _ = padded_importance(last, last.summary)
        losses = []
        for layer in self.early:
            call = objective.pruner.last_forward.calls[layer]
            scores, mask = padded_importance(call, call.summary)
            losses.append(ranking_distillation(scores, target, mask, top_k=self.top_k))
        return {"ranking": ramp(objective.moment.progress, self.weight, 0.01 * self.weight) * torch.stack(losses).mean()}
