"""Losses and gradients of all heads on one block of logits, in few passes over the vocabulary and in place.

A block holds the logits of the main head and of K heads for the same R target tokens, [1 + K, R, V / tp]. The losses of
`objectives.py` come out as one number a row, and the block is overwritten by their gradient. With q the student's
softmax, p the teacher's (both at the distillation's temperature T), the gradient of every objective has one form,

    d D / d z = c1 * (q * f) + c2 * q + c3 * w            c1, c2, c3: one number a row

    ==========  =======================  ==========================================================
    topn_kl     f = [v in S], w = p * f  c1 = T / sum(q f), c3 = -T / sum(p f)
    kl          w = p                    c2 = T, c3 = -T
    reverse_kl  f = log(q / p) + const   c1 = T, c2 = -T * sum(q f)
    tv          f = sign(p - q)          c1 = -1 / 2T, c2 = sum(q f) / 2T
    lk          f = sign(p - q), w = p   lam * kl + (1 - lam) * tv, lam a number a row
    e2e_tv      as tv: the caller's weights hold what a head's acceptance is worth
    ==========  =======================  ==========================================================

and that of cross-entropy is q - onehot, so that a head's whole gradient is its softmax times one number a row plus two
such products. Under tensor parallelism each rank holds a slice of the vocabulary; a block costs one all-gather of its
rows' softmax statistics and one all-reduce of its rows' sums, of all heads together.

The contract: numbers are fp32 or fp64; a logit below `LOWEST` (-inf) counts as `LOWEST`. This function is all that a faster
kernel has to replace. Deliberately absent: hidden states, positions, reduction over rows.
"""

from __future__ import annotations

from typing import NamedTuple

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.vocab_parallel import Group

LOWEST = -1e30  # finite, because 0 * inf is not 0
FORWARD_KL = ("topn_kl", "kl", "lk")
TOTAL_VARIATION = ("tv", "lk", "e2e_tv")


class RowLosses(NamedTuple):
    """Of each row of a block or of all, the same on all ranks. [1 + K, R] and four times [K, R]."""

    cross_entropy: Tensor
    distillation: Tensor
    """The objective; of e2e_tv: 1 - `distillation_overlap`."""
    agree: Tensor
    """bool: main head and head have the same argmax, the lowest id among equals."""
    overlap: Tensor
    """alpha = sum_v min(p, q) at temperature 1."""
    distillation_overlap: Tensor
    """alpha at the distillation's temperature; filled for tv, lk and e2e_tv."""


class RowWeights(NamedTuple):
    """Upstream gradient of each row's losses: cross-entropy [1 + K, R], distillation [K, R] (None: no gradient of it)."""

    cross_entropy: Tensor
    distillation: Tensor | None


@torch.no_grad()
def block_losses(
    z: Tensor,
    labels: Tensor,
    config: MTPDConfig,
    cut: Tensor | None = None,
    weights: RowWeights | None = None,
    kd_gradient: Tensor | None = None,
    tp_group: Group = None,
) -> RowLosses:
    """Losses of a block of logits, which is overwritten by its gradient.

    Args:
        z: [1 + K, R, V / tp] contiguous fp32 or fp64 logits: the main head's, then those of heads 1..K.
        labels: int64 [R], of all heads alike.
        cut: [R], of topn_kl: logits of the main head that are at least this are its top-N. None: the whole vocabulary.
        weights: with them, z becomes the gradient of the weighted sum of all losses; without, anything.
        kd_gradient: [K, R, V / tp]: the distillation's gradient goes here instead of into z.
    """
    z.clamp_(min=LOWEST)
    top, first = _max_and_first(z)
    local = labels - (tp_group.rank() * z.shape[-1] if tp_group is not None else 0)
    is_here = (local >= 0) & (local < z.shape[-1])
    label_index = local.clamp(0, z.shape[-1] - 1).expand(len(z), -1).unsqueeze(-1)
    label_logit = torch.where(is_here, z.gather(-1, label_index).squeeze(-1), 0.0)

    # Whatever needs logits comes before the softmax that overwrites them.
    objective, temperature = config.objective, config.temperature
    x = z if temperature == 1.0 else z / temperature
    scratch = torch.empty_like(z[1:]) if kd_gradient is None else kd_gradient
    p = torch.softmax(z[0], -1)
    p_kd = p if x is z else torch.softmax(x[0], -1)
    inside = None if cut is None else torch.ge(z[0], cut.unsqueeze(-1), out=torch.empty_like(p))
    w = p_kd if inside is None else p_kd * inside
    teacher_mass, dot = torch.ones_like(top[0]), torch.zeros_like(top)
    if objective in FORWARD_KL:
        teacher_mass = w.sum(-1)
        dot[0] = (w * x[0]).sum(-1)
        dot[1:] = torch.mul(x[1:], w, out=scratch).sum(-1)
    difference = x[1:] - x[0] if objective == "reverse_kl" else None
    q = torch.softmax(z[1:], -1, out=z[1:])
    q_kd = q if x is z else torch.softmax(x[1:], -1, out=x[1:])

    # exp(0) / sum exp(z - top) is the softmax at the maximum, which gives log-sum-exp without another pass.
    at_first = first.unsqueeze(-1)
    lse = top - torch.cat([p.gather(-1, at_first[0]), q.gather(-1, at_first[1:]).flatten(0, 1)]).view_as(top).log()
    lse_kd = lse
    if x is not z:
        at_top = torch.cat([p_kd.gather(-1, at_first[0]), q_kd.gather(-1, at_first[1:]).flatten(0, 1)])
        lse_kd = top / temperature - at_top.view_as(top).log()
    if tp_group is not None and tp_group.size() > 1:
        stats = _Statistics(top, first, label_logit, lse, lse_kd, dot, teacher_mass.expand_as(top))
        whole = _all_ranks(stats, z.shape[-1], tp_group)
        for softmax, here, everywhere in (
            (p, lse[0], whole.lse[0]),
            (q, lse[1:], whole.lse[1:]),
            *([] if x is z else [(p_kd, lse_kd[0], whole.lse_kd[0]), (q_kd, lse_kd[1:], whole.lse_kd[1:])]),
            *([] if w is p_kd else [(w, lse_kd[0], whole.lse_kd[0])]),
        ):
            softmax.mul_((here - everywhere).exp().unsqueeze(-1))
        top, first, label_logit, lse, lse_kd, dot, teacher_mass = whole
        teacher_mass = teacher_mass[0]

    overlap = torch.minimum(q, p, out=scratch).sum(-1)
    overlap_kd = overlap
    if x is not z and objective in TOTAL_VARIATION:
        overlap_kd = torch.minimum(q_kd, p_kd, out=scratch).sum(-1)
    if objective == "reverse_kl":
        torch.mul(q_kd, difference, out=scratch)
    elif objective in TOTAL_VARIATION:
        torch.sub(p_kd, q_kd, out=scratch).sign_().mul_(q_kd)
    elif inside is not None:
        torch.mul(q_kd, inside, out=scratch)
    has_f = objective != "kl" and (objective != "topn_kl" or inside is not None)
    sum_qf = scratch.sum(-1) if has_f else torch.ones_like(overlap)
    if tp_group is not None and tp_group.size() > 1:
        sums = torch.stack([overlap, overlap_kd, sum_qf if has_f else torch.zeros_like(overlap)])
        dist.all_reduce(sums, group=tp_group)
        overlap, overlap_kd, sum_qf = sums[0], sums[1], sums[2] if has_f else sum_qf

    # Values.
    squared = temperature**2
    student_mass = sum_qf.clamp(min=torch.finfo(z.dtype).tiny)
    kl = tv = lam = None
    if objective in FORWARD_KL:
        kl = (dot[0] - dot[1:]) / teacher_mass - (lse_kd[0] + teacher_mass.log()) + lse_kd[1:]
        if inside is not None:
            kl = kl + student_mass.log()
        kl = kl * squared
    if objective in TOTAL_VARIATION:
        tv = 1.0 - overlap_kd
    if objective == "reverse_kl":
        distillation = (sum_qf - lse_kd[1:] + lse_kd[0]) * squared
    elif objective == "lk":
        lam = torch.exp(-config.lk_eta * overlap_kd)
        distillation = lam * kl + (1.0 - lam) * tv
    else:
        distillation = kl if tv is None else tv
    losses = RowLosses(lse - label_logit, distillation, first[1:] == first[0], overlap, overlap_kd)
    if weights is None:
        return losses

    # Gradients.
    a = weights.cross_entropy
    c1 = c2 = c3 = None
    if weights.distillation is not None:
        c_kl, c_tv = weights.distillation * temperature, weights.distillation / temperature
        if objective == "reverse_kl":
            c1, c2 = c_kl, -c_kl * sum_qf
        elif objective == "topn_kl" and inside is not None:
            c1, c3 = c_kl / student_mass, -c_kl / teacher_mass
        elif objective in ("topn_kl", "kl"):
            c2, c3 = c_kl, -c_kl
        else:
            if lam is not None:
                c_kl, c_tv = c_kl * lam, c_tv * (1.0 - lam)
                c3 = -c_kl
            c1, c2 = c_tv * -0.5, c_tv * (0.5 * sum_qf)
            if lam is not None:
                c2 = c2 + c_kl
    torch.mul(p, a[0].unsqueeze(-1), out=z[0])
    if weights.distillation is None:
        q.mul_(a[1:].unsqueeze(-1))
    elif kd_gradient is None and x is z:
        _combine_(q, q, scratch, w, a[1:] if c2 is None else a[1:] + c2, c1, c3)
    else:
        ...
    z.scatter_add_(-1, label_index, torch.where(is_here, -a, 0.0).unsqueeze(-1))
    return losses
