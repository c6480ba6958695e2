"""Layer match: pull hidden states towards those of the dense model while layers of the pruned one disappear."""

import torch

from ..precision import at_least_float32


def layer_distances(student, teacher, there=None):
    """Mean squared difference of every student layer to every teacher layer.

    Args:
        student: list of `(T, H)` hidden states, one per student layer, already transformed to the teacher's width.
        teacher: list of `(T, H)` hidden states of the same tokens, one per teacher layer to be matched; gets no gradient.
        there: which tokens there are in which layer, where not all are in all: a pair of lists of `(T,)` bool (or None for all), for
            the student's layers and the teacher's. Only tokens that both layers of a pair have count in its distance. The other
            states may hold anything finite.

    Returns:
        `(teacher layers, student layers)`, at least float32.

    Example:
        >>> student, teacher = [torch.full((2, 3), x) for x in (0.0, 1.0, 3.0)], [torch.full((2, 3), 1.0)]
        >>> layer_distances(student, teacher)
        tensor([[1., 0., 4.]])
    """
    tokens, width = student[0].shape
    mine, theirs = ([None] * len(student), [None] * len(teacher)) if there is None else there
    apart, count = 0.0, 0.0
    for start in range(0, max(tokens, 1), CHUNK):
        some = slice(start, start + CHUNK)
        more = _apart(_layers(student, mine, some), _layers([states.detach() for states in teacher], theirs, some))
        apart, count = apart + more[0], count + more[1]
    return (apart / (count * width)).clamp(min=0)


CHUNK = 2048  # tokens of all layers that lie in memory once more at a time


def _layers(layers, there, some):
    """`(layers, T, H)`, 0 where there is no token, and `(layers, T)`: 1 where there is one."""
    states = torch.stack([at_least_float32(one[some]) for one in layers])
    if all(mask is None for mask in there):
        return states, states.new_ones(states.shape[:2])
    here = torch.stack([states.new_ones(states.shape[1]) if mask is None else mask[some].to(states.dtype) for mask in there])
    return states * here[..., None], here


def _apart(student, teacher):
    """For each pair of layers, the squared difference of all tokens that both have, and how many these are."""
    (mine, here), (theirs, over) = student, teacher
    # |s - t|^2 = |s|^2 + |t|^2 - 2 s t, the products of all pairs by one of matrices. In half precision they would not add up to it.
    with torch.autocast(mine.device.type, enabled=False):
        squares = [states.square().sum(2) for states in (mine, theirs)]
        products = theirs.flatten(1) @ mine.flatten(1).T
        return over @ squares[0].T + squares[1] @ here.T - 2 * products, over @ here.T


def match_layers(distances, alive):
    """For each teacher layer the nearest student layer that still exists.

    CoFi's `m(i) = argmin over j alive of MSE(W h_student_j, h_teacher_i)` (Xia et al. 2022, arXiv 2204.00408, section 3.2).
    Nothing of it is a parameter: it is learned in that it is taken anew in every step and so follows the transformed states.
    Two teacher layers may take the same student layer, in any order.

    Args:
        distances: `(teacher layers, student layers)`; gets no gradient.
        alive: `(student layers,)` bool, list or tensor: which layers are not pruned. If none is, all count, so that there is
            a match whatever the gates do.

    Returns:
        `(teacher layers,)` int64, indices of student layers. Ties go to the earlier layer.

    Example:
        >>> match_layers(torch.tensor([[1.0, 0.0, 4.0]]), [True, False, True])
        tensor([0])
        >>> match_layers(torch.tensor([[1.0, 0.0, 4.0]]), [False, False, False])
        tensor([1])
    """
    alive = torch.as_tensor(alive, dtype=torch.bool, device=distances.device)
    return distances.detach().masked_fill(~alive & alive.any(), float("inf")).argmin(dim=1)


def layer_distillation(student, teacher, alive, there=None):
    """Make the student's hidden states resemble the teacher's, layer by matched layer.

    CoFi's layerwise distillation (Xia et al. 2022, arXiv 2204.00408, section 3.2): the mean over teacher layers `i` of
    `MSE(W h_student_m(i), h_teacher_i)`, `m` being `match_layers`. The paper takes the sum; the mean does not depend on how
    many layers of the teacher are distilled from. Student layers that no teacher layer is matched to get no gradient and may
    hold anything if they are not alive.

    Args:
        student: list of `(T, H)` hidden states, one per student layer, already transformed to the teacher's width.
        teacher: list of `(T, H)` hidden states of the same tokens, one per teacher layer; gets no gradient.
        alive: `(student layers,)` bool, list or tensor: which layers are not pruned.
        there: as for `layer_distances`.

    Returns:
        `(loss, match)`: a scalar, at least float32, and what `match_layers` returns.

    Example:
        >>> student = [torch.full((2, 3), x) for x in (0.0, 1.0, 3.0)]
        >>> layer_distillation(student, [torch.full((2, 3), 1.0), torch.full((2, 3), 5.0)], [True, False, True])
        (tensor(2.5000), tensor([0, 2]))
    """
    with torch.no_grad():
        match = match_layers(layer_distances(student, teacher, there), alive)
    mine, theirs = ([None] * len(student), [None] * len(teacher)) if there is None else there
    pairs = [
        _distance(student[j], states, common(mine[j], over))
        for j, states, over in zip(match.tolist(), teacher, theirs, strict=True)
    ]
    return torch.stack(pairs).mean(), match


def common(here, there):
    """`(T,)` bool: the tokens that both have; None = all."""
    return there if here is None else here if there is None else here & there


def mean_square(states, rows=None):
    """Mean square of `(T, H)` states, at the rows `(T,)` bool only, of which there is one at least. The device is not asked which."""
    squares = at_least_float32(states).square()
    if rows is None:
        return squares.mean()
    return (squares.sum(1) * rows).sum() / (rows.sum() * states.shape[1])


def _distance(student, teacher, rows):
    return mean_square(at_least_float32(student) - at_least_float32(teacher.detach()), rows)
