"""The loss on vocabulary shards, at 2 and 4 ranks: values, report and gradients are those of the full vocabulary.

The full result is that of one process, which the unit tests compare with loops in plain Python. `EXACT`: float64 sums
over shards are added in another order than over the row, so the last digits (1e-16) of some hundred terms differ.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.eager import HeadWeights
from tests.distributed.gloo import run
from tests.unit.losses.cases import OBJECTIVES, Case, Outcome, make_case, run_eager

pytestmark = pytest.mark.distributed

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
WEIGHTS = HeadWeights((0.1, 0.3, 0.2), (0.5, 0.7, 0.4))


def on_shards(
    case: Case, configs: list[MTPDConfig], weights: HeadWeights, two_lists: bool, tp: int | None = None
) -> list[Outcome]:
    """With `tp`, in groups of neighbours."""
    group: Any = dist.group.WORLD
    if tp is not None:
        groups = [dist.new_group(list(range(i, i + tp))) for i in range(0, dist.get_world_size(), tp)]
        group = groups[dist.get_rank() // tp]
    case = case._replace(logits=[z.chunk(group.size(), -1)[group.rank()] for z in case.logits])
    return [run_eager(case, config, weights, group, two_lists) for config in configs]


def numbers(outcome: Outcome) -> dict[str, Tensor]:
    return {"total": outcome.total, "losses": outcome.main_loss, **outcome.report._asdict()}


def check(
    case: Case, configs: list[MTPDConfig], ranks: int, weights=WEIGHTS, two_lists=False, tolerance=EXACT, tp=None
) -> None:
    results = run(on_shards, ranks, case, configs, weights, two_lists, tp)
    for i, config in enumerate(configs):
        expected = run_eager(case, config, weights, two_lists=two_lists)
        for rank, result in enumerate(results):
            where = f"{config.objective}, top_n {config.top_n}, rank {rank}"
            for name, x in numbers(result[i]).items():
                assert torch.equal(x, numbers(results[0][i])[name]), f"{name} of {where} is not that of rank 0"
                message = lambda m, name=name, where=where: f"{name} of {where}: {m}"  # noqa: E731
                torch.testing.assert_close(x, numbers(expected)[name], **tolerance, msg=message)
            for k, (x, y) in enumerate(zip(result[i].gradients, expected.gradients, strict=True)):
                slices = y.chunk(tp or ranks, -1)
                message = lambda m, k=k, where=where: f"gradient {k} of {where}: {m}"  # noqa: E731
                torch.testing.assert_close(x, slices[rank % len(slices)], **tolerance, msg=message)


@pytest.mark.parametrize(("ranks", "temperature"), [(2, 1.0), (4, 0.6)])
def test_every_objective(ranks, temperature):
    configs = [
        MTPDConfig.as_published(objective=objective, top_n=5, temperature=temperature) for objective in OBJECTIVES
    ]
    check(make_case(), configs, ranks)


def test_every_n():
    check(make_case(length=5), [MTPDConfig.as_published(top_n=n) for n in (1, 2, 6, 11, 12, 100)], 2)


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.bfloat16), (2, torch.float16), (4, torch.float32)])
def test_ties_and_logits_of_low_precision(ranks, dtype):
    """Halves are exact in every dtype and tie often, across shards too."""
    case = make_case()
    case = case._replace(logits=[((z * 2).round() / 2).to(dtype) for z in case.logits])
    configs = [
        MTPDConfig.as_published(top_n=3),
        MTPDConfig.as_published(top_n=6),
        *(MTPDConfig.as_published(objective=o) for o in ("reverse_kl", "lk")),
    ]
    # fp32 sums of some 60 losses of about 3 in another order, and gradients that are then rounded to the dtype.
    eps = torch.finfo(dtype).eps
    check(case, configs, ranks, tolerance={"rtol": 1e-5 + eps, "atol": 1e-5 + eps / 8})


def test_shards_of_which_nothing_can_be():
    """-inf in main head and heads: the padding of a vocabulary can fill the last shard, and N can reach into it."""
    case = make_case(length=5)
    impossible = torch.zeros(12, dtype=torch.bool)
    impossible[9:] = True  # all of the last of four shards
    impossible[2] = True
    case = case._replace(
        logits=[z.masked_fill(impossible, -torch.inf) for z in case.logits], labels=case.labels % 2 + 3
    )
    others = [MTPDConfig.as_published(objective=objective) for objective in OBJECTIVES[1:]]
    check(case, [MTPDConfig.as_published(top_n=4), MTPDConfig.as_published(top_n=10), *others], 4)


def test_masked_positions_leak_nothing():
    case = make_case(batch=1)
    mask = torch.ones_like(case.loss_mask)
    mask[[2, 7]] = 0
    case = case._replace(loss_mask=mask, document_ends=None)
    for z, head_mask in zip(case.logits, [mask, *case.masks()], strict=True):
        z[head_mask == 0] = torch.nan
    results = run(
        on_shards, 2, case, [MTPDConfig.as_published(objective=o, top_n=5) for o in OBJECTIVES], WEIGHTS, False
    )
    for outcome in (outcome for result in results for outcome in result):
        assert outcome.total.isfinite() and all(x.isfinite().all() for x in outcome.report)
        assert all(g.isfinite().all() for g in outcome.gradients[1:])


def test_two_lists_and_weights():
    for weights in (WEIGHTS, HeadWeights((0.1, 0.3, 0.2), (0.5, 0.7, 0.4), per_head_mean=False)):
        check(
            make_case(), [MTPDConfig.as_published(objective=o, top_n=5) for o in OBJECTIVES], 2, weights, two_lists=True
        )


def test_two_groups_of_two():
    check(make_case(), [MTPDConfig.as_published(top_n=5), MTPDConfig.as_published(objective="lk")], 4, tp=2)
