"""Inputs of the losses, random and awkward, and the eager loss on them. Shared with the distributed tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig, Objective
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.eager import HeadWeights, mtpd_loss
from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.losses.vocab_parallel import Group

OBJECTIVES: list[Objective] = ["topn_kl", "kl", "reverse_kl", "tv", "lk", "e2e_tv"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def awkward_rows(dtype: torch.dtype) -> torch.Tensor:
    """[rows, 12]: ordinary, all equal, -inf, one finite, +inf, zeros of both signs, denormals, the largest numbers."""
    info, inf = torch.finfo(dtype), math.inf
    tiny, huge = info.smallest_normal * info.eps, info.max  # tiny: a denormal
    ordinary = torch.randn(12, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        ordinary,
        [1.5] * 12,
        [0.0] * 12,
        [-0.0, 0.0] * 6,
        [0.0, -0.0, 1.0, -1.0] * 3,
        [-inf] * 6 + ordinary[:6],
        [-inf] * 11 + [2.0],
        [-inf] * 12,
        ordinary[:10] + [inf, inf],
        [tiny, -tiny, 0.0, -0.0, 2 * tiny, -2 * tiny] * 2,
        [huge, -huge, huge, -huge, 1.0, tiny, -tiny, 0.0, inf, -inf, huge, -huge],
        [-3.0, -3.0, -3.0, -2.0, -2.0, -1.0, -4.0, -4.0, -5.0, -3.0, -2.0, -2.0],
    ]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


class Case(NamedTuple):
    logits: list[Tensor]
    """Of the main head and of heads 1..K, [s, b, V]."""
    labels: Tensor
    loss_mask: Tensor
    document_ends: Tensor | None

    @property
    def num_heads(self) -> int:
        return len(self.logits) - 1

    def masks(self, cross_documents: bool = False) -> Tensor:
        return head_masks(self.loss_mask, self.num_heads, self.document_ends, cross_documents)

    def sequences(self, ids: list[int]) -> Case:
        logits = [z[:, ids] for z in self.logits]
        ends = None if self.document_ends is None else self.document_ends[:, ids]
        return Case(logits, self.labels[:, ids], self.loss_mask[:, ids], ends)


def make_case(length: int = 9, batch: int = 2, num_heads: int = 3, vocab: int = 12, seed: int = 0) -> Case:
    """Float64; the heads resemble the main head at their targets, so that drafts of every length occur."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(length, batch, vocab, generator=generator, dtype=torch.float64)  # noqa: E731
    main = 2.0 * draw()
    heads = [torch.cat([main[k:], draw()[:k]])[:length] + 0.7 * draw() for k in range(1, num_heads + 1)]
    labels = torch.randint(vocab, (length, batch), generator=generator)
    loss_mask = (torch.rand(length, batch, generator=generator) > 0.1).double()
    ends = torch.rand(length, batch, generator=generator) < 0.1
    return Case([main, *heads], labels, loss_mask, ends)


class Outcome(NamedTuple):
    total: Tensor
    """(main_loss * loss_mask).sum() + heads_loss, detached."""
    main_loss: Tensor
    heads_loss: Tensor
    report: LossReport
    raw_gradients: list[Tensor | None]
    """Of the total, for the logits of the main head, of the heads, and, with two lists, of the heads' second ones."""

    @property
    def gradients(self) -> list[Tensor]:
        assert all(g is not None for g in self.raw_gradients)
        return [g for g in self.raw_gradients if g is not None]


def run_eager(
    case: Case,
    config: MTPDConfig,
    weights: HeadWeights,
    tp_group: Group = None,
    two_lists: bool = False,
    clone: bool = True,
) -> Outcome:
    """`mtpd_loss` and its gradients. With a group, `case.logits` are this rank's slices."""
    logits = [*case.logits, *(case.logits[1:] if two_lists else [])]
    leaves = [(z.clone() if clone else z.detach()).requires_grad_() for z in logits]
    ce = leaves[1 : 1 + case.num_heads]
    kd = leaves[1 + case.num_heads :] if two_lists else ce
    main_loss, heads_loss, report = mtpd_loss(
        leaves[0],
        ce,
        kd,
        case.labels,
        case.loss_mask,
        case.masks(config.cross_documents),
        weights,
        config,
        tp_group,
    )
    # where(), as a product with the mask would spread what a masked position holds.
    total = torch.where(case.loss_mask > 0, main_loss, 0.0).sum() + heads_loss
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    assert not report.main_loss.requires_grad and not report.distillation.requires_grad
    return Outcome(total.detach(), main_loss.detach(), heads_loss.detach(), report, list(gradients))
