"""Drafts of a head from its hidden states, and the positions that use them."""

import pytest
import torch

from megatron_mtpd.losses.drafts import draft_tokens, on_policy_positions


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 14, 100, None])
def test_they_are_the_argmax_of_the_logits(chunk_rows):
    hidden, weight = numbers(7, 2, 5), numbers(11, 5).requires_grad_()
    tokens = draft_tokens(hidden, weight, chunk_rows=chunk_rows)
    assert torch.equal(tokens, (hidden @ weight.t()).argmax(-1))
    assert tokens.shape == (7, 2) and tokens.dtype == torch.int64 and not tokens.requires_grad


def test_the_lowest_id_of_equals():
    weight = torch.ones(9, 3)
    weight[:4] = 0.0
    assert draft_tokens(torch.ones(5, 1, 3), weight).eq(4).all()


@pytest.mark.parametrize("nan", ["all", "one"])
def test_nan_gives_a_token_that_exists(nan):
    """So that the run ends by its check of the loss, and not with an index out of range on a GPU."""
    hidden, weight = numbers(3, 1, 4), numbers(8, 4)
    if nan == "all":
        hidden[1] = float("nan")
    else:
        weight[5, 0] = float("nan")
    tokens = draft_tokens(hidden, weight)
    assert tokens.min() >= 0 and tokens.max() < 8


def test_only_a_chunk_of_logits_is_held(monkeypatch):
    sizes = []
    matmul = torch.Tensor.__matmul__

    def recorded(x, y):
        sizes.append(matmul(x, y).shape)
        return matmul(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", recorded)
    monkeypatch.setattr("megatron_mtpd.losses.drafts.CHUNK_LOGITS", 50)
    draft_tokens(numbers(10, 2, 4), numbers(16, 4))
    assert sizes == [(3, 16)] * 6 + [(2, 16)]


def test_positions_follow_from_the_iteration_alone():
    state = torch.get_rng_state()
    first = on_policy_positions(64, 0.5, 3)
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of training are left alone"
    torch.rand(5)
    assert torch.equal(on_policy_positions(64, 0.5, 3), first)
    assert not torch.equal(on_policy_positions(64, 0.5, 4), first)
    assert first.shape == (64,) and first.dtype == torch.bool


@pytest.mark.parametrize(("fraction", "deviation"), [(0.0, 0.0), (0.25, 0.014), (0.5, 0.016), (1.0, 0.0)])
def test_the_fraction_is_kept(fraction, deviation):
    """Over iterations and over positions: within four standard deviations of the mean of 1,000 draws."""
    fed = torch.stack([on_policy_positions(1000, fraction, iteration) for iteration in range(1000)]).float()
    for of in (0, 1):
        means = fed.mean(of)
        # of 1,000 such means a few are beyond three deviations; five are one in a million
        assert (means - fraction).abs().max() <= 5 * deviation
        assert abs(means.mean() - fraction) <= 4 * deviation / 1000**0.5
    if 0 < fraction < 1:  # neighbours are not related
        assert abs(torch.corrcoef(torch.stack([fed[:, :-1].flatten(), fed[:, 1:].flatten()]))[0, 1]) < 0.005
        assert abs(torch.corrcoef(torch.stack([fed[:-1].flatten(), fed[1:].flatten()]))[0, 1]) < 0.005
