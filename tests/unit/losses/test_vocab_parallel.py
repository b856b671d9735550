"""The reductions on one rank, against torch's own. On several ranks: tests/distributed/test_vocab_parallel.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtpd.losses import vocab_parallel as vp
from megatron_mtpd.losses.objectives import log_softmax
from tests.unit.losses.cases import FLOATS, awkward_rows
from tests.unit.losses.naive import top_set

INF = float("inf")
properties = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 5, 11, 12, 13, 1000])
def test_the_threshold_selects_the_top_n_with_ties(dtype, n):
    logits = awkward_rows(dtype)
    selected = logits >= vp.topn_threshold(logits, n).unsqueeze(-1)
    for row, chosen in zip(logits, selected, strict=True):
        assert chosen.nonzero().flatten().tolist() == (top_set(row, n) if n < 12 else list(range(12)))


def test_the_threshold_refuses_an_empty_set():
    with pytest.raises(ValueError, match="top-n of 0"):
        vp.topn_threshold(torch.zeros(2, 3), 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_order_like_floats_and_come_back(dtype):
    values = awkward_rows(dtype).flatten().unique()  # sorted, zeros of both signs taken for one
    keys = vp._ordered_keys(values)
    assert (keys[1:] > keys[:-1]).all()
    assert torch.equal(vp._float_from_keys(keys, dtype), values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_argmax_takes_the_first_of_equals(dtype):
    logits = awkward_rows(dtype)
    assert vp.vocab_argmax(logits).tolist() == [row.tolist().index(max(row.tolist())) for row in logits]


@properties
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=9),  # few values, so many ties
    st.integers(1, 10),
)
def test_the_top_set_does_not_depend_on_the_order_of_the_vocabulary(values, n):
    row = torch.tensor(values, dtype=torch.float32)
    order = torch.tensor(sorted(range(len(values)), key=lambda i: (values[i] * 7919) % 13))
    selected = row >= vp.topn_threshold(row, n)
    permuted = row[order] >= vp.topn_threshold(row[order], n)
    assert torch.equal(selected[order], permuted)
    assert selected.sum() >= min(n, len(values))
    assert n >= len(values) or (row > vp.topn_threshold(row, n)).sum() < n


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 11), (0, 4)])
def test_sums_and_gathers_with_their_gradients(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if logits.numel():
        logits.data.view(-1)[0] = -INF  # a token that cannot be: no gradient, and no nan
    ids = torch.randint(0, shape[-1], shape[:-1])
    weights = torch.randn(shape[:-1], dtype=torch.float64)

    def check(ours, theirs, weights):
        # float64, a few additions: rounding alone
        mine, expected = ours(logits), theirs(logits)
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            *(torch.autograd.grad((x * weights).sum(), logits)[0] for x in (mine, expected)), rtol=1e-13, atol=1e-13
        )

    check(vp.vocab_logsumexp, lambda x: torch.logsumexp(x, -1), weights)
    check(lambda x: vp.vocab_sum(x.exp()), lambda x: x.exp().sum(-1), weights)
    # Gathered may be -inf itself: then only a weight of one leaves no nan.
    gathered = lambda x: x.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    check(lambda x: vp.vocab_gather(x, ids), gathered, torch.ones_like(weights))
    assert torch.equal(vp.vocab_max(logits), logits.amax(-1))
    assert not vp.vocab_max(logits).requires_grad


def test_sizes_without_a_group():
    logits = torch.zeros(2, 5)
    assert (vp.vocab_offset(logits, None), vp.vocab_size(logits, None)) == (0, 5)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_log_softmax_keeps_its_precision_far_from_zero(offset):
    # The logits are multiples of 2^-6 below 2^5, so adding 10,000 is exact in fp32 and must change nothing at all.
    logits = torch.randint(-2048, 2048, (5, 50), generator=torch.Generator().manual_seed(1)) / 64.0
    exact = torch.log_softmax(logits.double(), -1)
    # fp32 results of size up to 70: half a unit in the last place is 4e-6, and there are two roundings.
    torch.testing.assert_close(log_softmax(logits + offset).double(), exact, rtol=0, atol=1e-5)
