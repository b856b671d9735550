"""The fused loss on vocabulary slices and sequence slices: every rank must find what one rank finds with everything.

fp64, so that slices differ from the whole by the order of sums alone: tolerance 1e-9, as in the unit test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.fused import fused_mtpd_loss
from megatron_mtpd.losses.topn import topn_cut
from tests.distributed.gloo import run
from tests.unit.losses.test_fused import OBJECTIVES, Case, assert_same, finish, fused, make_case, split
from tests.unit.losses.test_topn import distributions, expected_set

pytestmark = pytest.mark.distributed


def fused_on_slices(cases: list[tuple[Case, MTPDConfig]], sequence_parallel: bool) -> list[Any]:
    """This rank's outcome of each case; its gradients are slices."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    outcomes = []
    for case, config in cases:
        weight = case.weight.chunk(ranks)[rank].clone().requires_grad_()
        slices = [x.chunk(ranks)[rank] if sequence_parallel else x for x in case.hidden]
        hidden = [x.clone().requires_grad_() for x in slices]
        losses = fused_mtpd_loss(
            *split(case, hidden),
            weight,
            *case[2:],
            config,
            group,
            sequence_parallel=sequence_parallel,
            chunk_rows=24,
        )
        outcomes.append(finish(case, *losses, [weight, *hidden], 0.25))
    return outcomes


def check(cases: list[tuple[Case, MTPDConfig]], ranks: int, sequence_parallel: bool) -> None:
    results = run(fused_on_slices, ranks, cases, sequence_parallel)
    for i, (case, config) in enumerate(cases):
        whole = fused(case, config)
        for rank, outcomes in enumerate(results):
            weight, *hidden = whole.gradients
            hidden = [x.chunk(ranks)[rank] if sequence_parallel else x for x in hidden]
            assert_same(outcomes[i], whole._replace(gradients=[weight.chunk(ranks)[rank], *hidden]))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_vocabulary_and_sequence(ranks, sequence_parallel):
    cases = []
    for objective in OBJECTIVES:
        for temperature in (1.0, 0.7):
            case = make_case(s=12, vocab=40)
            cases.append((case, MTPDConfig.as_published(objective=objective, top_n=9, temperature=temperature)))
    for shares in ((1.0, 0.0), (0.25, 0.75)):
        for two_lists in (False, True):
            config = MTPDConfig.as_published(top_n=9, ce_output_share=shares[0], kd_output_share=shares[1])
            cases.append((make_case(s=12, vocab=40, two_lists=two_lists), config))
    check(cases, ranks, sequence_parallel)


def test_ties_across_slices():
    """Equal logits on different ranks: one set, one argmax."""
    case = make_case(vocab=40)
    case = case._replace(hidden=[x.round() for x in case.hidden], weight=case.weight.round())
    check(
        [
            (case, MTPDConfig.as_published(objective=o, top_n=n))
            for o in (OBJECTIVES[0], OBJECTIVES[4])
            for n in (1, 7, 39)
        ],
        2,
        False,
    )


def test_a_slice_without_any_of_the_top_tokens():
    case = make_case(vocab=40)
    weight = case.weight.clone()
    weight[20:] *= 1e-3
    weight[20:, 0] -= 40.0  # far below all others
    hidden = [torch.cat([x[..., :1].abs() + 1, x[..., 1:]], -1) for x in case.hidden]
    check([(case._replace(weight=weight, hidden=hidden), MTPDConfig.as_published(top_n=5))], 2, False)


def cut_of_slices(name: str) -> list[torch.Tensor]:
    group = dist.group.WORLD
    whole = distributions(torch.float32)[name][:, :1500]
    mine = whole.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()
    return [topn_cut(mine, n, group) for n in (1, 17, 500, 1499, 1500)]


@pytest.mark.parametrize("name", ["normal", "few_values", "heavy_tails", "sorted", "minus_infinity"])
def test_the_cut_is_that_of_the_whole_row(name):
    whole = distributions(torch.float32)[name][:, :1500]
    for cuts in run(cut_of_slices, 2, name):
        for n, cut in zip((1, 17, 500, 1499, 1500), cuts, strict=True):
            assert torch.equal(whole >= cut.unsqueeze(-1), expected_set(whole, n))


# Traffic ------------------------------------------------------------------------------------------------------------


def traffic(sequence_parallel: bool) -> list[tuple[str, int]]:
    """Name of every collective of a step, and elements of the tensor that it fills."""
    calls: list[tuple[str, int]] = []

    def recorded(name: str):
        original = getattr(dist, name)

        def wrapper(tensor, *args, **kwargs):
            calls.append((name, tensor.numel()))
            return original(tensor, *args, **kwargs)

        return wrapper

    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    originals = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, recorded(name))
    try:
        fused_on_slices([(make_case(s=12, vocab=4096), MTPDConfig.as_published(top_n=100))], sequence_parallel)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "tp+sp"])
def test_only_row_sized_tensors_travel(sequence_parallel):
    """24 rows of target times 4 heads: logits would be 98,304 numbers. Hidden states go once there and once back."""
    calls = run(traffic, 2, sequence_parallel)[0]
    hidden = 4 * 12 * 2 * 8
    of_hidden = [call for call in calls if call[1] >= hidden // 2]
    if sequence_parallel:
        assert of_hidden == [("all_gather_into_tensor", hidden), ("reduce_scatter_tensor", hidden // 2)]
    else:
        assert of_hidden == [("all_reduce", hidden)]
    chunks = 4  # of 6 rows: 24 for four heads
    rest = [call for call in calls if call not in of_hidden]
    assert max(size for _, size in rest) <= 2 * 6 * (6 * 4 + 1)  # the statistics of a chunk's rows from two ranks
    assert sum(name == "all_gather_into_tensor" for name, _ in rest) == chunks
    assert len(rest) <= chunks * 40  # a count a probe; the rest are three
