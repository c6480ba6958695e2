"""Attention on padded sequences of the tokens that are left: layouts by hand, and tokens that count for less."""

import pytest
import torch

from hf_tokenprune.modeling.attention import weighted_softmax
from hf_tokenprune.modeling.calls import active
from hf_tokenprune.modeling.packing import PackedBatch
from hf_tokenprune.modeling.padded import collect, on_probabilities, relative, reweighted, spread

MASK = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.fixture
def batch():
    """Rows of 4, 2 and 0 tokens, of which the first has lost its second: sequences of 0, 2 and 3 in packed order."""
    everyone = PackedBatch.from_mask(MASK, batch_size=3, seq_len=5, device="cpu")
    return everyone.choose(torch.tensor([1, 1, 1, 0, 1, 1]).bool())[1]


def test_a_packed_batch_is_spread_and_collected_again(batch):
    packed = torch.arange(1.0, 6.0).view(1, 5, 1)
    padded = spread(batch, packed)
    assert padded.squeeze(2).tolist() == [[0, 0, 0], [1, 2, 0], [3, 4, 5]]
    assert torch.equal(collect(batch, padded), packed)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_stands_between_two_tokens_is_that_of_their_places(batch, rows):
    place = torch.arange(5)
    between = (place[:, None] - place[None])[None] + 100 * torch.arange(rows)[:, None, None]
    found = relative(batch, between)
    assert found[1, :2, :2].tolist() == (torch.tensor([[0, -1], [1, 0]]) + 100 * (rows > 1)).tolist()
    assert found[2].tolist() == [[0, -2, -4], [2, 0, -2], [4, 2, 0]]


class Call:
    """As much of a layer call as the probabilities meet."""

    needs_importance = True

    def __init__(self, batch):
        self.batch = batch


@pytest.mark.parametrize("values", [[1.0, 0.2, 0.5, 1.0, 0.7], [1.0, 0.0, 1.0, 1.0, 0.0]])
def test_a_token_that_counts_for_less_has_that_share_of_every_softmax(batch, values, monkeypatch):
    torch.manual_seed(0)
    weight = torch.tensor(values)
    scores = torch.randn(3, 2, 3, 3).masked_fill(~spread(batch, torch.ones(1, 5).bool())[:, None, None], -1e30)
    call = Call(batch.with_weights(weight))
    monkeypatch.setattr(active, "call", call)
    (shares,) = on_probabilities(None, (scores.softmax(-1),))
    expected = (scores[2] + weight[2:].log()).softmax(-1)
    torch.testing.assert_close(shares[2], expected)
    torch.testing.assert_close(call.received[2:], (expected * weight[2:, None]).mean((0, 1)))


def test_the_gradient_of_a_weight_of_0_is_what_a_weight_of_1_would_change():
    """As of `attention.weighted_softmax`, also where the dropped key has nearly all."""
    scores, alive = 4 * torch.randn(2, 3, 6), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    scores[0, :, 1] += 8
    shares, told = scores.softmax(-1), torch.randn(2, 3, 6)
    weight = alive.repeat(2, 1, 1).requires_grad_()
    said = reweighted(shares, weight)
    torch.testing.assert_close(said, weighted_softmax(scores, weight))
    (said * told).sum().backward()
    for dead in (1, 3):
        back = reweighted(shares, alive.index_fill(0, torch.tensor([dead]), 1.0).expand(2, 1, 6))
        torch.testing.assert_close(weight.grad[:, 0, dead], ((back - said.detach()) * told).sum((1, 2)), atol=1e-4, rtol=1e-3)
