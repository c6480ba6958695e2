"""An auxiliary loss reaches the optimizer through a model's output, once, whoever computes the main loss."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput

from hf_tokenprune.losses.carry import carry

SHARE = 0.25


class Case:
    """A weight `w` behind the outputs, a weight `a` behind the auxiliary loss `3 a + 1`."""

    def __init__(self, *, has_loss=True, as_tuple=False, dtype=torch.float32, share=lambda: SHARE):
        self.w = torch.full((2, 3), 0.5, dtype=dtype, requires_grad=True)
        self.a = torch.full((), 2.0, requires_grad=True)
        self.logits = self.w * 2
        self.loss = self.logits.sum() if has_loss else None
        self.states = (self.w * 3, self.w * 4)
        self.mask = torch.ones(2, dtype=torch.long)
        if as_tuple:
            outputs = (*([self.loss] if has_loss else []), self.logits, self.states, self.mask)
        else:
            outputs = SequenceClassifierOutput(loss=self.loss, logits=self.logits, hidden_states=self.states)
            outputs["mask"] = self.mask
        self.outputs = carry(outputs, 3 * self.a + 1, has_loss=has_loss, share=share)
        entries = list(self.outputs) if as_tuple else list(self.outputs.values())
        self.first, self.second = (entries[0], entries[1]) if has_loss else (None, entries[0])


USES = {  # of (loss, logits): the main loss -> the auxiliary loss's weight, the gradient of w
    "the model's loss": (lambda loss, _: loss, 1.0, 2.0),
    "the model's loss, divided": (lambda loss, _: loss / 4, 0.25, 0.5),
    "the logits": (lambda _, logits: 5 * logits.sum(), SHARE, 10.0),
    "both": (lambda loss, logits: 7 * loss + logits.sum(), 7.0, 16.0),
    "the logits twice": (lambda _, logits: logits.sum() + logits.sum(), SHARE, 4.0),
}


@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
@pytest.mark.parametrize("use", USES)
def test_the_auxiliary_gradient_is_scaled_like_the_loss_in_use(use, as_tuple):
    compute, weight, main = USES[use]
    case = Case(as_tuple=as_tuple)
    compute(case.first, case.second).backward()
    assert case.a.grad.item() == pytest.approx(3 * weight)
    assert torch.equal(case.w.grad, torch.full((2, 3), main))


@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
def test_without_a_loss_the_share_counts(as_tuple):
    case = Case(has_loss=False, as_tuple=as_tuple)
    case.second.mean().backward()
    assert case.a.grad.item() == pytest.approx(3 * SHARE)
    assert torch.allclose(case.w.grad, torch.full((2, 3), 2 / 6))


@pytest.mark.parametrize("has_loss", [True, False])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["output", "tuple"])
def test_nothing_else_is_changed(as_tuple, has_loss):
    case = Case(as_tuple=as_tuple, has_loss=has_loss)
    assert type(case.outputs) is (tuple if as_tuple else SequenceClassifierOutput)
    entries = case.outputs if as_tuple else list(case.outputs.values())
    assert len(entries) == 3 + has_loss
    if has_loss:
        assert case.first.item() == case.loss.item() + 3 * 2 + 1
    assert torch.equal(case.second, case.logits)
    assert type(entries[-2]) is tuple
    assert all(torch.equal(carried, state) for carried, state in zip(entries[-2], case.states, strict=True))
    assert entries[-1] is case.mask
    if not as_tuple:
        assert list(case.outputs.keys()) == [*(["loss"] if has_loss else []), "logits", "hidden_states", "mask"]
        assert case.outputs.logits is case.second, "by name and by key it is the same tensor"
        assert case.outputs["logits"] is case.second


def test_two_outputs_in_use_carry_it_once():
    w, a = torch.ones(2, 3, requires_grad=True), torch.ones((), requires_grad=True)
    outputs = carry(QuestionAnsweringModelOutput(start_logits=w * 1, end_logits=w * 2), 3 * a, has_loss=False, share=lambda: 1)
    (outputs.start_logits.sum() + outputs.end_logits.sum()).backward()
    assert a.grad.item() == 3
    assert torch.equal(w.grad, torch.full((2, 3), 3.0))


def test_a_loss_from_hidden_states_alone_carries_it():
    w, a = torch.ones(2, 3, requires_grad=True), torch.ones((), requires_grad=True)
    outputs = carry(BaseModelOutput(w * 1, hidden_states=(w * 2, w * 3)), 3 * a, has_loss=False, share=lambda: 1)
    outputs.hidden_states[0].sum().backward()
    assert a.grad.item() == 3
    assert torch.equal(w.grad, torch.full((2, 3), 2.0))


def test_the_share_is_asked_for_at_the_time_of_the_backward_pass():
    now = [0.0]
    case = Case(share=lambda: now[0])
    now[0] = 8.0
    case.second.sum().backward()
    assert case.a.grad.item() == 24


def test_each_forward_carries_its_own():
    w, a = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    losses = [carry((w.sum(),), factor * a, has_loss=True, share=lambda: 1)[0] for factor in (3, 5)]
    (losses[0] + 2 * losses[1]).backward()
    assert a.grad.item() == 3 + 2 * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_of_the_outputs_is_kept(dtype):
    case = Case(dtype=dtype)
    assert case.first.dtype == case.second.dtype == dtype
    case.first.backward()
    assert case.a.grad.item() == 3
    assert case.w.grad.dtype == dtype


def test_a_loss_of_frozen_weights_still_carries_it():
    a = torch.ones((), requires_grad=True)
    loss, logits = carry((torch.tensor(2.0), torch.ones(2)), 3 * a, has_loss=True, share=lambda: 1)
    loss.backward()
    assert a.grad.item() == 3
    assert not logits.requires_grad


def test_without_gradients_the_value_is_the_same():
    with torch.no_grad():
        case = Case()
    assert case.first.item() == case.loss.item() + 7
    assert not case.first.requires_grad


def test_outputs_without_gradients_are_left_alone():
    outputs = (torch.ones(2), torch.ones(2, dtype=torch.long))
    assert carry(outputs, torch.ones((), requires_grad=True), has_loss=False, share=lambda: 1) is outputs


def test_outputs_may_be_edited_in_place():
    case = Case()
    case.second[:, 2] = -1.0
    case.second.sum().backward()
    assert torch.equal(case.w.grad, torch.tensor([[2.0, 2.0, 0.0]] * 2))
    assert case.a.grad.item() == pytest.approx(3 * SHARE)
