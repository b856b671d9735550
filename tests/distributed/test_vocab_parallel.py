"""Reductions over vocabulary shards, at 2 and 4 ranks, against the slice of the full result."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.losses import vocab_parallel as vp
from megatron_mtpd.losses.objectives import log_softmax
from tests.distributed.gloo import run
from tests.unit.losses.cases import FLOATS, awkward_rows

pytestmark = pytest.mark.distributed


def shard(full: Tensor, group: dist.ProcessGroup) -> Tensor:
    return full.chunk(group.size(), -1)[group.rank()].contiguous()


def assert_equal_on_all(results: list) -> None:
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


# Selection: max, argmax, threshold -----------------------------------------------------------------------------------


def select(full: Tensor, ns: list[int]) -> list[Tensor]:
    group: Any = dist.group.WORLD
    mine = shard(full, group)
    return [vp.vocab_max(mine, group), vp.vocab_argmax(mine, group), *(vp.topn_threshold(mine, n, group) for n in ns)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_selection_in_awkward_rows(dtype, ranks):
    full, ns = awkward_rows(dtype), [1, 2, 3, 5, 6, 7, 11, 12, 13]
    results = run(select, ranks, full, ns)
    assert_equal_on_all(results)
    # Exact, as values: a zero may have either sign. One rank is checked against Python's sorting in the unit tests.
    for ours, expected in zip(results[0], [vp.vocab_max(full), vp.vocab_argmax(full)], strict=False):
        assert torch.equal(ours, expected)
    for n, threshold in zip(ns, results[0][2:], strict=True):
        assert threshold.dtype == dtype
        assert torch.equal(threshold, vp.topn_threshold(full, n)), n  # bisection here, kthvalue there


@pytest.mark.parametrize("ranks", [2, 4])
def test_selection_in_many_rows_with_ties(ranks):
    generator = torch.Generator().manual_seed(0)
    few_values = torch.randint(-2, 3, (300, 8), generator=generator).float()
    results = run(select, ranks, few_values, list(range(1, 10)))
    assert_equal_on_all(results)
    # The first of equal maxima, wherever the shards' borders are.
    assert results[0][1].tolist() == [row.index(max(row)) for row in few_values.tolist()]
    for n, threshold in zip(range(1, 10), results[0][2:], strict=True):
        expected = few_values.sort(-1, descending=True).values[:, n - 1] if n < 8 else torch.full((300,), -torch.inf)
        assert torch.equal(threshold, expected)


# Sums, with gradients ------------------------------------------------------------------------------------------------


def add_up(full: Tensor, ids: Tensor, of_rows: Tensor, of_tokens: Tensor) -> list[Tensor]:
    """Values and then gradients of this rank's slice."""
    group: Any = dist.group.WORLD
    leaves = [shard(full, group).requires_grad_() for _ in range(4)]
    values = [
        vp.vocab_logsumexp(leaves[0], group),
        vp.vocab_gather(leaves[1], ids, group),
        vp.vocab_sum(leaves[2].exp(), group),
        log_softmax(leaves[3], group),
    ]
    torch.autograd.backward(values, [of_rows, of_rows, of_rows, shard(of_tokens, group)])
    return [*(x.detach() for x in values), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_and_gradients_are_slices_of_the_full_ones(ranks):
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(5, 3, 16, dtype=torch.float64, generator=generator)
    full[0, 0, 8:] = -torch.inf  # whole shards without any finite logit
    full[1, 0, :12] = -torch.inf
    ids = torch.randint(16, (5, 3), generator=generator)
    ids[0, 0], ids[1, 0] = 3, 14
    of_rows = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    of_tokens = torch.randn(5, 3, 16, dtype=torch.float64, generator=generator)
    leaves = [full.clone().requires_grad_() for _ in range(4)]
    expected = [
        leaves[0].logsumexp(-1),
        leaves[1].gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        leaves[2].exp().sum(-1),
        leaves[3].log_softmax(-1),
    ]
    torch.autograd.backward(expected, [of_rows, of_rows, of_rows, of_tokens])
    results = run(add_up, ranks, full, ids, of_rows, of_tokens)
    assert_equal_on_all([result[:3] for result in results])
    for rank, result in enumerate(results):
        # float64 sums in another order: a few roundings of 1e-16.
        close: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13}
        for ours, theirs in zip(result[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, theirs.detach(), **close)
        torch.testing.assert_close(result[3], expected[3].detach().chunk(ranks, -1)[rank], **close)
        for ours, leaf in zip(result[4:], leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(ours, leaf.grad.chunk(ranks, -1)[rank], **close)


# Groups --------------------------------------------------------------------------------------------------------------


def in_two_groups(full: Tensor) -> tuple[list[int], list[Tensor]]:
    """Four ranks, two groups of two: ranks 0 and 2 share the first rows, ranks 1 and 3 the others."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    which = dist.get_rank() % 2
    group: Any = groups[which]
    rows = full.chunk(2)[which]
    mine = shard(rows, group)
    numbers = [vp.vocab_offset(mine, group), vp.vocab_size(mine, group)]
    ids = torch.full(rows.shape[:-1], 5)
    return numbers, [
        vp.vocab_max(mine, group),
        vp.vocab_argmax(mine, group),
        vp.topn_threshold(mine, 3, group),
        vp.vocab_logsumexp(mine, group),
        vp.vocab_gather(mine, ids, group),
    ]


def test_a_group_is_not_the_world():
    full = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = run(in_two_groups, 4, full)
    for rank, (numbers, ours) in enumerate(results):
        rows = full.chunk(2)[rank % 2]
        assert numbers == [4 * (rank // 2), 8]
        expected = [rows.amax(-1), rows.argmax(-1), rows.topk(3).values[:, -1], rows.logsumexp(-1), rows[:, 5]]
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


def group_of_one(full: Tensor) -> list[Tensor]:
    return [*select(full, [1, 3]), vp.vocab_logsumexp(full, dist.group.WORLD)]


def test_a_group_of_one_is_no_group():
    full = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    (ours,) = run(group_of_one, 1, full)
    expected = [full.amax(-1), full.argmax(-1), full.amax(-1), full.topk(3).values[:, -1], vp.vocab_logsumexp(full)]
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))
