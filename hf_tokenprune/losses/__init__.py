"""Losses: small functions of tensors and numbers. Methods put them together."""

from .constraint import lagrangian
from .distillation import logit_distillation, regression_distillation
from .ranking import lambda_arp2, ranking_distillation

__all__ = ["lagrangian", "lambda_arp2", "logit_distillation", "ranking_distillation", "regression_distillation"]
