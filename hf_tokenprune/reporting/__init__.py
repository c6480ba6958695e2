"""A page on which one sees what a model does: how deep each token lived, what each layer costs, and how training got there."""

from .collect import Report, report

__all__ = ["Report", "report"]
