"""Losses: small functions of tensors and numbers. Methods put them together."""

from .bottleneck import information_norm, negative_entropy
from .constraint import lagrangian
from .distillation import logit_distillation, regression_distillation
from .layer_match import common, layer_distances, layer_distillation, match_layers, mean_square
from .ranking import lambda_arp2, listwise, ranking_distillation

__all__ = [
    "common",
    "information_norm",
    "lagrangian",
    "lambda_arp2",
    "layer_distances",
    "layer_distillation",
    "listwise",
    "logit_distillation",
    "match_layers",
    "mean_square",
    "negative_entropy",
    "ranking_distillation",
    "regression_distillation",
]
