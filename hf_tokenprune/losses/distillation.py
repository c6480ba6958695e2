"""Distillation: pull the outputs of the pruned model towards those of the dense one."""

from torch.nn import functional

from ..precision import at_least_float32


def logit_distillation(student, teacher, *, temperature=2.0, mask=None):
    """Make the student's class probabilities resemble the teacher's (Hinton et al. 2015, arXiv 1503.02531, section 2).

    `KL(teacher || student) * temperature ** 2`, both softened by the temperature, mean over rows. The square keeps the size of
    the gradient the same at any temperature.

    Args:
        student: `(..., classes)` logits; every leading dimension counts as rows.
        teacher: `(..., classes)` logits; gets no gradient.
        temperature: a number above 0.
        mask: `(...)` bool, or 0 / 1: the rows that count, e.g. real tokens; all of them if None. The others may hold anything.

    Returns:
        A scalar, at least float32; 0 if no row counts.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> logit_distillation(teacher, teacher).item()
        0.0
        >>> logit_distillation(torch.tensor([[0.0, 2.0]]), teacher)
        tensor(1.8485)
    """
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    log_student = functional.log_softmax(at_least_float32(student) / temperature, dim=-1)
    log_teacher = functional.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=-1)
    divergence = functional.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
    return divergence.sum() / max(divergence.numel(), 1) * temperature**2


def regression_distillation(student, teacher):
    """Mean squared difference between the two models' outputs: distillation for a regression head.

    Args:
        student: any shape.
        teacher: the same shape; gets no gradient.

    Returns:
        A scalar, at least float32; 0 if there is nothing to compare.

    Example:
        >>> import torch
        >>> regression_distillation(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
        tensor(2.)
    """
    differences = at_least_float32(student) - at_least_float32(teacher.detach())
    return differences.square().sum() / max(differences.numel(), 1)
