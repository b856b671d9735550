"""What a row of logits comes down to: the numbers that its losses and their gradient are made of.

`chunk.py` passes over the vocabulary and leaves two sets of numbers a row, `Statistics` and `Sums`. From them alone
follow the losses, and the coefficients of their gradient, which has one form for every objective. With q the student's
softmax and p the teacher's, both at the distillation's temperature T,

    d D / d z = c1 * (q * f) + c2 * q + c3 * w

    ==========  =======================  ========================================================
    topn_kl     f = [v in S], w = p * f  c1 = T / sum(q f), c3 = -T / sum(p f)
    kl          w = p                    c2 = T, c3 = -T
    reverse_kl  f = z_q / T - z_p / T    c1 = T, c2 = -T * sum(q f)
    tv, e2e_tv  f = sign(p - q)          c1 = -1 / 2T, c2 = sum(q f) / 2T
    lk          f = sign(p - q), w = p   lam * those of kl + (1 - lam) * those of tv
    ==========  =======================  ========================================================

times the weight of the row. Under tensor parallelism each rank brings the numbers of its slice of the vocabulary:
`gather_statistics` and `reduce_sums`, one collective each, turn them into those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.config import MTPDConfig

FORWARD_KL = ("topn_kl", "kl", "lk")
TOTAL_VARIATION = ("tv", "lk", "e2e_tv")


class Statistics(NamedTuple):
    """Of the main head (row 0) and the heads: [1 + K, R], `mass` [1, R]."""

    top: Tensor
    """The largest logit."""
    first: Tensor
    """int64: its id, the lowest of equals."""
    label_logit: Tensor
    """0 where another rank holds the label."""
    lse: Tensor
    """log sum exp."""
    lse_kd: Tensor
    """The same of the logits divided by the temperature."""
    dot: Tensor
    """sum_v w z / T of each head's z; of the forward KL, else 0."""
    mass: Tensor
    """sum_v w: what the teacher gives to the top-N set."""


class Sums(NamedTuple):
    """[K, R] each."""

    overlap: Tensor
    """sum_v min(p, q) at temperature 1."""
    overlap_kd: Tensor
    """The same at the distillation's temperature."""
    qf: Tensor
    """sum_v q f; 1 where f is 1 everywhere."""


class RowLosses(NamedTuple):
    """`cross_entropy` [1 + K, R], the others [K, R]; the same on all ranks."""

    cross_entropy: Tensor
    distillation: Tensor
    """The objective; of e2e_tv: 1 - `overlap_kd`."""
    agree: Tensor
    """bool: main head and head have the same argmax, the lowest id among equals."""
    overlap: Tensor
    """alpha = sum_v min(p, q) at temperature 1."""
    overlap_kd: Tensor
    """The same at the distillation's temperature."""


class RowWeights(NamedTuple):
    """Upstream gradient of the losses of each row: cross-entropy [1 + K, R], distillation [K, R] (None: no
    gradient)."""

    cross_entropy: Tensor
    distillation: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> RowWeights:
        kd = self.distillation
        return RowWeights(function(self.cross_entropy), None if kd is None else function(kd))


class Coefficients(NamedTuple):
    """c1, c2 and c3 above, [K, R] each; None: that term is absent."""

    qf: Tensor | None = None
    q: Tensor | None = None
    w: Tensor | None = None


def gather_statistics(local: Statistics, vocab_slice: int, tp_group: dist.ProcessGroup) -> Statistics:
    """Those of the whole vocabulary from those of each rank's slice of `vocab_slice` tokens. One all-gather."""
    mine = torch.cat([x.to(local.top.dtype) for x in local])  # ids, too: fp32 is exact up to 2^24 tokens
    everyone = mine.new_empty(tp_group.size() * len(mine), mine.shape[1])
    dist.all_gather_into_tensor(everyone, mine, group=tp_group)
    of_ranks = everyone.view(tp_group.size(), *mine.shape).split([len(x) for x in local], dim=1)
    top, first, label_logit, lse, lse_kd, dot, mass = of_ranks
    whole_top, whole_lse_kd = top.amax(0), lse_kd.logsumexp(0)
    offset = vocab_slice * torch.arange(tp_group.size(), device=mine.device).view(-1, 1, 1)
    ids = torch.where(top == whole_top, first + offset, torch.inf).amin(0).long()
    teacher = (lse_kd[:, :1] - whole_lse_kd[:1]).exp()  # a slice's softmax times this is a slice of the softmax
    dot, mass = (dot * teacher).sum(0), (mass * teacher).sum(0)
    return Statistics(whole_top, ids, label_logit.sum(0), lse.logsumexp(0), whole_lse_kd, dot, mass)


def reduce_sums(local: Sums, tp_group: dist.ProcessGroup) -> Sums:
    """Sums over the whole vocabulary. One all-reduce."""
    sums = torch.stack(local)
    dist.all_reduce(sums, group=tp_group)
    return Sums(*sums)


def losses(config: MTPDConfig, has_top: bool, statistics: Statistics, sums: Sums) -> RowLosses:
    """The losses of each row. `has_top`: the distillation is restricted to the top-N set."""
    s, squared = statistics, config.temperature**2
    total_variation = 1.0 - sums.overlap_kd
    if config.objective in FORWARD_KL:
        teacher, student = s.lse_kd[0], s.lse_kd[1:]
        if has_top:
            teacher, student = teacher + s.mass[0].log(), student + _positive(sums.qf).log()
        forward_kl = ((s.dot[0] - s.dot[1:]) / s.mass - teacher + student) * squared
        distillation = forward_kl
        if config.objective == "lk":
            lam = _kl_share(config, sums)
            distillation = lam * forward_kl + (1.0 - lam) * total_variation
    elif config.objective == "reverse_kl":
        distillation = (sums.qf - s.lse_kd[1:] + s.lse_kd[0]) * squared
    else:
        distillation = total_variation
    agree = s.first[1:] == s.first[0]
    return RowLosses(s.lse - s.label_logit, distillation, agree, sums.overlap, sums.overlap_kd)


def coefficients(config: MTPDConfig, has_top: bool, statistics: Statistics, sums: Sums, weight: Tensor) -> Coefficients:
    """c1, c2 and c3 times the `weight` [K, R] of each row."""
    kl, tv = weight * config.temperature, weight / config.temperature
    if config.objective == "reverse_kl":
        return Coefficients(qf=kl, q=-kl * sums.qf)
    if config.objective in ("tv", "e2e_tv"):
        return Coefficients(qf=-0.5 * tv, q=0.5 * tv * sums.qf)
    if config.objective == "lk":
        lam = _kl_share(config, sums)
        kl, tv = kl * lam, tv * (1.0 - lam)
        return Coefficients(qf=-0.5 * tv, q=0.5 * tv * sums.qf + kl, w=-kl)
    if has_top:
        return Coefficients(qf=kl / _positive(sums.qf), w=-kl / statistics.mass)
    return Coefficients(q=kl, w=-kl)


def _kl_share(config: MTPDConfig, sums: Sums) -> Tensor:
    return torch.exp(-config.lk_eta * sums.overlap_kd)


def _positive(mass: Tensor) -> Tensor:
    """Where the student gives nothing at all to the teacher's top-N (less than 1e-38), the loss stays finite."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny)
