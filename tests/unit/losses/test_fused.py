"""The fused loss against the eager one: values and gradients, of one table of cases.

In fp64 both do the same sums in another order: relative differences of some 1e-13 at these sizes. The tolerance, 1e-9, leaves
room for the differences of large logarithms in a small loss and would still show any wrong term.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss, mtpd_loss
from megatron_mtpd.losses.fused import fused_mtpd_loss
from megatron_mtpd.losses.gradients import scale_gradient
from megatron_mtpd.losses.report import LossReport

OBJECTIVES = ["topn_kl", "kl", "reverse_kl", "tv", "lk", "e2e_tv"]
EXACT = dict(rtol=1e-9, atol=1e-9)


class Case(NamedTuple):
    hidden: list[Tensor]
    """Of the main head and the heads, [s, b, h]; two lists: then those of the heads' other pass."""
    weight: Tensor
    labels: Tensor
    loss_mask: Tensor
    masks: Tensor
    weights: HeadWeights

    @property
    def num_heads(self) -> int:
        return len(self.masks)


def make_case(
    heads: int = 3,
    s: int = 11,
    b: int = 2,
    h: int = 8,
    vocab: int = 37,
    masked: float = 0.2,
    two_lists: bool = False,
    per_head_mean: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = [normal(s, b, h) for _ in range(1 + heads)]
    if two_lists:
        hidden += [x.clone() for x in hidden[1:]]
    loss_mask = (torch.rand(s, b, generator=generator) >= masked).to(torch.float64)
    ends = torch.rand(s, b, generator=generator) < 0.1
    labels = torch.randint(vocab, (s, b), generator=generator)
    alpha, beta = [0.3 / (k + 1) for k in range(heads)], [0.5 + 0.1 * k for k in range(heads)]
    return Case(
        hidden,
        normal(vocab, h),
        labels,
        loss_mask,
        head_masks(loss_mask, heads, ends),
        HeadWeights(alpha, beta, per_head_mean),
    )


class Outcome(NamedTuple):
    main_loss: Tensor
    heads_loss: Tensor
    report: LossReport
    gradients: list[Tensor | None]
    """Of the weight, then of the hidden states."""


def leaves(case: Case, frozen: frozenset[str]) -> tuple[list[Tensor], Tensor]:
    names = ["main", *(f"head{k}" for k in range(1, len(case.hidden)))]
    hidden = [
        x.clone().requires_grad_(name not in frozen) for name, x in zip(names, case.hidden, strict=True)
    ]
    return hidden, case.weight.clone().requires_grad_("weight" not in frozen)


def split(case: Case, hidden: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    for_ce = hidden[1 : 1 + case.num_heads]
    return hidden[0], for_ce, hidden[1 + case.num_heads :] or for_ce


def finish(case: Case, main_loss, heads_loss, report, leaves: list[Tensor], c: float) -> Outcome:
    """Backward as Megatron does: c times the masked sum, the heads' losses attached."""
    attached = attach_heads_loss(main_loss, case.loss_mask, heads_loss)
    (c * (attached * case.loss_mask).sum()).backward()
    return Outcome(main_loss.detach(), heads_loss.detach(), report, [x.grad for x in leaves])


def eager(case: Case, config: MTPDConfig, frozen=frozenset(), logit_scale=1.0, c=0.25) -> Outcome:
    hidden, weight = leaves(case, frozen)
    main, for_ce, for_kd = split(case, hidden)

    def logits(x: Tensor, share: float) -> Tensor:
        return logit_scale * (x @ scale_gradient(weight, share).t())

    ce_logits = [logits(x, config.ce_output_share) for x in for_ce]
    same = for_kd is for_ce and config.ce_output_share == config.kd_output_share
    kd_logits = ce_logits if same else [logits(x, config.kd_output_share) for x in for_kd]
    losses = mtpd_loss(
        logits(main, 1.0), ce_logits, kd_logits, case.labels, case.loss_mask, case.masks, case.weights, config
    )
    return finish(case, *losses, [weight, *hidden], c)


def fused(case: Case, config: MTPDConfig, frozen=frozenset(), logit_scale=1.0, c=0.25, chunk_rows=24) -> Outcome:
    hidden, weight = leaves(case, frozen)
    losses = fused_mtpd_loss(
        *split(case, hidden),
        weight,
        case.labels,
        case.loss_mask,
        case.masks,
        case.weights,
        config,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
    )
    return finish(case, *losses, [weight, *hidden], c)


def assert_same(actual: Outcome, expected: Outcome, **tolerance: float) -> None:
    tolerance = tolerance or EXACT
    torch.testing.assert_close(actual.main_loss, expected.main_loss, **tolerance)
    torch.testing.assert_close(actual.heads_loss, expected.heads_loss, **tolerance)
    for name, x, y in zip(LossReport._fields, actual.report, expected.report, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for i, (x, y) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        x, y = (torch.zeros(()) if g is None or not g.any() else g for g in (x, y))
        torch.testing.assert_close(x, y, msg=lambda text, i=i: f"gradient {i}: {text}", **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective, temperature):
    case, config = make_case(), MTPDConfig(objective=objective, top_n=9, temperature=temperature)
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("top_n", [1, 2, 36, 37, 1000])
def test_top_n_from_one_to_beyond_the_vocabulary(top_n):
    case, config = make_case(), MTPDConfig(top_n=top_n)
    assert_same(fused(case, config), eager(case, config))
