"""What stands in a model's inputs and outputs, as far as losses need to know it."""

from ..losses import regression_distillation

LABELS = ("labels", "label", "start_positions", "end_positions", "next_sentence_label")


def nothing_labelled(labels):
    """Are there labels per token, and all of them to be ignored?"""
    return labels is not None and labels.dim() > 1 and not labels.is_floating_point() and not labels.ne(-100).any()


def zero_of(outputs):
    """A loss of 0 whose gradient is one of zeros."""
    return next(value for name, value in outputs.items() if name.endswith("logits"))[:0].sum()


def apart(student, teacher):
    """Mean squared difference, relative to the teacher's mean square: 0 = the same, about 2 = of unrelated directions."""
    return regression_distillation(student, teacher) / teacher.detach().float().square().mean()


def without_labels(kwargs):
    return {name: value for name, value in kwargs.items() if name not in (*LABELS, "return_loss")}


def is_separate(model):
    """Is each logit a judgement of its own (regression, several labels) rather than one class of many? `problem_type` says so, but
    transformers sets it only once it has computed a loss."""
    kind = model.config.problem_type
    one = model.config.num_labels == 1 and "Classification" in type(model).__name__
    return kind in ("regression", "multi_label_classification") or (kind is None and one)


def rows_that_count(tensor, kwargs):
    """Mask of rows to compare: labelled ones where labels are per token, else real tokens, else (per sample) all."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    rows = tensor.shape[:-1]
    if labels is not None and labels.shape == rows:
        counts = labels != -100
        if counts.any() and not counts.all():
            return counts
    if mask is not None and mask.shape == rows and tensor.dim() > 2:
        return mask.bool()
    return None
