"""Each layer of a teacher is matched with the nearest of the student's that is left: against hand calculations and slow loops."""

import math

import pytest
import torch

from hf_tokenprune import losses


def constant_layers(*values):
    """A layer of two tokens and three units per value."""
    return [torch.full((2, 3), float(x)) for x in values]


def test_layer_distances_by_hand():
    student = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2), torch.ones(2, 2)]
    teacher = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.full((2, 2), 2.0)]
    expected = [[(4 + 16) / 4, (1 + 9) / 4, (1 + 4 + 1) / 4], [(1 + 1 + 4) / 4, 4.0, 1.0]]
    assert losses.layer_distances(student, teacher).tolist() == expected


def test_layer_distances_equal_nested_loops():
    student, teacher = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = [
        [sum((s[t][h] - x[t][h]) ** 2 for t in range(5) for h in range(3)) / 15 for s in student.tolist()]
        for x in teacher.tolist()
    ]
    torch.testing.assert_close(
        losses.layer_distances(list(student), list(teacher)), torch.tensor(expected, dtype=torch.float64)
    )


DISTANCES = [[3.0, 1.0, 2.0, 9.0], [4.0, 0.5, 7.0, 0.25], [6.0, 5.0, 5.0, 8.0]]  # the last with a tie


@pytest.mark.parametrize(
    ("alive", "match"),
    [
        ([True, True, True, True], [1, 3, 1]),
        ([True, False, True, False], [2, 0, 2]),
        ([True, True, True, False], [1, 1, 1]),
        ([False, False, False, True], [3, 3, 3]),
        ([False, False, False, False], [1, 3, 1]),
    ],
)
@pytest.mark.parametrize("container", [list, torch.tensor])
def test_match_by_hand(alive, match, container):
    distances = torch.tensor(DISTANCES, requires_grad=True)
    found = losses.match_layers(distances, container(alive))
    assert found.dtype == torch.int64
    assert found.tolist() == match
    assert not found.requires_grad
    assert distances.tolist() == DISTANCES


def test_layer_distillation_by_hand():
    """Teacher 1 is nearest to 0 (distance 1), as 1.5 is gone; teacher -4 to 0 (16), teacher 5 to 6 (1)."""
    student, teacher = constant_layers(0, 1.5, 6), constant_layers(1, -4, 5)
    for states in (*student, *teacher):
        states.requires_grad_()
    loss, match = losses.layer_distillation(student, teacher, [True, False, True])
    loss.backward()
    assert loss.item() == (1 + 16 + 1) / 3
    assert match.tolist() == [0, 0, 2]
    torch.testing.assert_close(student[0].grad, torch.full((2, 3), (2 * (0 - 1) + 2 * (0 + 4)) / 6 / 3))
    torch.testing.assert_close(student[2].grad, torch.full((2, 3), 2 * (6 - 5) / 6 / 3))
    assert student[1].grad is None
    assert all(states.grad is None for states in teacher)


def test_layer_distillation_is_the_mean_of_the_smallest_distances():
    student, teacher = list(torch.randn(5, 4, 3)), list(torch.randn(3, 4, 3))
    student[1] = teacher[0]  # nearest, but pruned
    alive = [True, False, True, True, False]
    distances = losses.layer_distances(student, teacher)
    loss, match = losses.layer_distillation(student, teacher, alive)
    torch.testing.assert_close(loss, distances[:, alive].min(1).values.mean())
    assert match.equal(losses.match_layers(distances, alive))


def test_a_pruned_layer_may_hold_anything():
    student = constant_layers(0, math.nan, math.inf)
    for states in student:
        states.requires_grad_()
    loss, match = losses.layer_distillation(student, constant_layers(3), [True, False, False])
    loss.backward()
    assert (loss.item(), match.tolist()) == (9, [0])
    assert student[0].grad.isfinite().all()


def test_the_match_follows_the_transformed_states():
    """Teachers 3 and 8, layers 1 and 4 times a trained scale: at 1 both take layer 4, later the first takes layer 1.

    The scale then minimises `(s - 3) ** 2 + (4 s - 8) ** 2`: 35 / 17.
    """
    scale = torch.tensor(1.0, requires_grad=True)
    optimizer, matches = torch.optim.SGD([scale], lr=0.02), []
    for _ in range(40):
        optimizer.zero_grad()
        student = [states * scale for states in constant_layers(1, 4)]
        loss, match = losses.layer_distillation(student, constant_layers(3, 8), [True, True])
        loss.backward()
        optimizer.step()
        matches.append(match.tolist())
    assert matches[0] == [1, 1]
    assert matches[-1] == [0, 1]
    assert scale.item() == pytest.approx(35 / 17, abs=1e-3)


def test_only_tokens_that_both_layers_have_count():
    student = [torch.tensor([[1.0], [5.0], [9.0]]), torch.tensor([[2.0], [4.0], [9.0]])]
    teacher = [torch.tensor([[3.0], [3.0], [0.0]]), torch.tensor([[0.0], [0.0], [8.0]])]
    there = (torch.tensor([[1, 1, 0], [1, 0, 1]]).bool().unbind(), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool().unbind())
    # First teacher layer: tokens 0 and 1 with the first student layer, token 0 with the second.
    expected = [[(4 + 4) / 2, 1.0], [(1 + 25) / 2, (4 + 1) / 2]]
    assert losses.layer_distances(student, teacher, there).tolist() == expected
    loss, match = losses.layer_distillation(student, teacher, [True, True], there)
    assert (loss.item(), match.tolist()) == ((1.0 + 2.5) / 2, [1, 1])


def test_layer_match_gradients():
    states = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher = list(torch.randn(2, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: losses.layer_distances(s.unbind(), teacher), states)
    assert torch.autograd.gradcheck(lambda s: losses.layer_distillation(s.unbind(), teacher, [True, False, True])[0], states)


def test_layer_match_is_computed_in_float32():
    student, teacher = ([states.bfloat16() for states in torch.randn(3, 4, 2)] for _ in range(2))
    wide_student, wide_teacher = ([states.float() for states in layers] for layers in (student, teacher))
    assert losses.layer_distances(student, teacher).equal(losses.layer_distances(wide_student, wide_teacher))
    loss, _ = losses.layer_distillation(student, teacher, [True] * 3)
    assert loss.equal(losses.layer_distillation(wide_student, wide_teacher, [True] * 3)[0])
