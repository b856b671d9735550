"""Losses and gradients of all heads on one block of logits: few passes over the vocabulary, and in place.

A block holds the logits of the main head and of K heads for the same R target tokens, [1 + K, R, V / tp]. Out come the
losses of `objectives.py`, one number a row, and the block is overwritten by their gradient. The passes are here, what
is done with a row's numbers is in `rows.py`; of tensor parallelism a block knows the two collectives of row-sized
numbers.

`block_losses` is all that a faster kernel has to replace. Numbers are fp32 or fp64; a logit below `LOWEST` (-inf)
counts as `LOWEST`. Deliberately absent: hidden states, positions, masks, reduction over rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import rows
from megatron_mtpd.losses.rows import FORWARD_KL, TOTAL_VARIATION, RowLosses, RowWeights, Statistics, Sums
from megatron_mtpd.losses.vocab_parallel import Group

LOWEST = -(2.0**100)  # finite, because 0 * inf is not 0; a power of two, because that is the same in every dtype


@torch.no_grad()
def block_losses(
    logits: Tensor,
    labels: Tensor,
    config: MTPDConfig,
    cut: Tensor | None = None,
    weights: RowWeights | None = None,
    kd_gradient: Tensor | None = None,
    tp_group: Group = None,
) -> RowLosses:
    """Losses of a block of logits, which is overwritten by its gradient.

    Args:
        logits: contiguous [1 + K, R, V / tp], fp32 or fp64: the main head's, then those of heads 1..K.
        labels: int64 [R], the same for all heads.
        cut: [R], of topn_kl: the main head's logits that reach it are its top-N. None: all are.
        weights: with them, `logits` becomes the gradient of the weighted sum of all losses; without, anything.
        kd_gradient: [K, R, V / tp], takes the distillation's gradient, which is then not in `logits`.
    """
    size, ranks = logits.shape[-1], tp_group.size() if tp_group is not None else 1
    labels = labels - tp_group.rank() * size if tp_group is not None else labels
    is_here = (labels >= 0) & (labels < size)
    label_index = labels.clamp(0, size - 1).expand(len(logits), -1).unsqueeze(-1)
    logits.clamp_(min=LOWEST)
    top, first = _max_and_first(logits)
    label_logit = torch.where(is_here, logits.gather(-1, label_index).squeeze(-1), 0.0)

    block, of_softmax = _softmax_(logits, top, first, config, cut, kd_gradient)
    statistics = Statistics(top, first, label_logit, *of_softmax)
    if tp_group is not None and ranks > 1:
        whole = rows.gather_statistics(statistics, size, tp_group)
        _renormalise_(block, statistics, whole)
        statistics = whole
    sums = _sums(block, config)
    if tp_group is not None and ranks > 1:
        sums = rows.reduce_sums(sums, tp_group)

    has_top = cut is not None
    if weights is not None:
        c = rows.Coefficients()
        if weights.distillation is not None:
            c = rows.coefficients(config, has_top, statistics, sums, weights.distillation)
        _gradient_(logits, block, weights.cross_entropy, c, is_apart=kd_gradient is not None)
        onehot = torch.where(is_here, -weights.cross_entropy, 0.0)
        logits.scatter_add_(-1, label_index, onehot.unsqueeze(-1))
    return rows.losses(config, has_top, statistics, sums)


class _Block(NamedTuple):
    """Vocabulary-sized tensors of a block. p, w: [R, V / tp]; the others [K, R, V / tp]."""

    p: Tensor
    """Softmax of the main head at temperature 1."""
    q: Tensor
    """The heads', in the place of their logits."""
    p_kd: Tensor
    q_kd: Tensor
    """Both at the distillation's temperature; the same tensors at temperature 1."""
    w: Tensor
    """p_kd, 0 outside the top-N set."""
    f: Tensor | None
    """The factor f of `rows.py` where it has to be made of logits."""
    scratch: Tensor
    """At last q * f."""


def _max_and_first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and its id, the lowest of equals. [..., V] -> [...], int64 [...]."""
    # Maxima of short pieces first: one fast pass. torch.argmax takes ten times as long.
    pieces = logits.unflatten(-1, (-1, math.gcd(logits.shape[-1], 256)))
    maxima = pieces.amax(-1)
    top = maxima.amax(-1, keepdim=True)
    piece = _first_true(maxima == top).unsqueeze(-1)
    values = pieces.gather(-2, piece.unsqueeze(-1).expand(*piece.shape, pieces.shape[-1])).squeeze(-2)
    return top.squeeze(-1), piece.squeeze(-1) * pieces.shape[-1] + _first_true(values == top)


def _first_true(x: Tensor) -> Tensor:
    size = x.shape[-1]
    return torch.where(x, torch.arange(size, device=x.device), size - 1).amin(-1)


def _softmax_(
    z: Tensor, top: Tensor, first: Tensor, config: MTPDConfig, cut: Tensor | None, scratch: Tensor | None
) -> tuple[_Block, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Turns the heads' logits into softmaxes. Also returns lse, lse_kd, dot and mass (`Statistics`)."""
    at_first = first.unsqueeze(-1)

    def log_sum_exp(p: Tensor, q: Tensor, highest: Tensor) -> Tensor:
        # The softmax at the maximum is 1 / sum exp(z - maximum): no further pass.
        largest = torch.cat([p.unsqueeze(0).gather(-1, at_first[:1]), q.gather(-1, at_first[1:])])
        return highest - largest.squeeze(-1).log()

    x = z if config.temperature == 1.0 else z / config.temperature
    scratch = torch.empty_like(z[1:]) if scratch is None else scratch
    p = torch.softmax(z[0], -1)
    p_kd = p if x is z else torch.softmax(x[0], -1)
    w, f = p_kd, None
    if cut is not None:
        f = torch.ge(z[0], cut.unsqueeze(-1), out=torch.empty_like(p))
        w = p_kd * f
    mass, dot = torch.ones_like(top[:1]), torch.zeros_like(top)
    if config.objective in FORWARD_KL:
        mass[0] = w.sum(-1)
        dot[0] = (w * x[0]).sum(-1)
        dot[1:] = torch.mul(x[1:], w, out=scratch).sum(-1)
    elif config.objective == "reverse_kl":
        f = x[1:] - x[0]
    q = torch.softmax(z[1:], -1, out=z[1:])
    q_kd = q if x is z else torch.softmax(x[1:], -1, out=x[1:])
    lse = log_sum_exp(p, q, top)
    lse_kd = lse if x is z else log_sum_exp(p_kd, q_kd, top / config.temperature)
    return _Block(p, q, p_kd, q_kd, w, f, scratch), (lse, lse_kd, dot, mass)


def _renormalise_(block: _Block, here: Statistics, whole: Statistics) -> None:
    """Softmaxes over this rank's slice become slices of the softmax."""
    share, share_kd = (here.lse - whole.lse).exp(), (here.lse_kd - whole.lse_kd).exp()
    block.p.mul_(share[0].unsqueeze(-1))
    block.q.mul_(share[1:].unsqueeze(-1))
    if block.p_kd is not block.p:
        block.p_kd.mul_(share_kd[0].unsqueeze(-1))
        block.q_kd.mul_(share_kd[1:].unsqueeze(-1))
    if block.w is not block.p_kd:
        block.w.mul_(share_kd[0].unsqueeze(-1))


def _sums(block: _Block, config: MTPDConfig) -> Sums:
    """Leaves q * f in `block.scratch`."""
    scratch = block.scratch
    overlap = overlap_kd = torch.minimum(block.q, block.p, out=scratch).sum(-1)
    if block.q_kd is not block.q and config.objective in TOTAL_VARIATION:
        overlap_kd = torch.minimum(block.q_kd, block.p_kd, out=scratch).sum(-1)
    if config.objective in TOTAL_VARIATION:
        torch.sub(block.p_kd, block.q_kd, out=scratch).sign_().mul_(block.q_kd)
    elif block.f is not None:
        torch.mul(block.q_kd, block.f, out=scratch)
    else:
        return Sums(overlap, overlap_kd, torch.ones_like(overlap))
    return Sums(overlap, overlap_kd, scratch.sum(-1))


def _gradient_(z: Tensor, block: _Block, weight: Tensor, c: rows.Coefficients, is_apart: bool) -> None:
    """Into z: the gradient but for the labels' own term. `weight` [1 + K, R] of the cross-entropies."""
    torch.mul(block.p, weight[0].unsqueeze(-1), out=z[0])
    weight = weight[1:]
    if not is_apart and block.q_kd is block.q:
        _combine_(block.q, block, c._replace(q=weight if c.q is None else weight + c.q))
    else:
        _combine_(block.scratch, block, c)
        block.q.mul_(weight.unsqueeze(-1))
        if not is_apart:
            block.q.add_(block.scratch)


def _combine_(out: Tensor, block: _Block, c: rows.Coefficients) -> None:
    """out := c.qf * (q f) + c.q * q + c.w * w, where `out` is q or q f itself."""
    for term, coefficient in ((block.scratch, c.qf), (block.q_kd, c.q)):
        if term is out:
            out.mul_(0.0 if coefficient is None else coefficient.unsqueeze(-1))
    for term, coefficient in ((block.scratch, c.qf), (block.q_kd, c.q), (block.w, c.w)):
        if term is not out and coefficient is not None:
            out.addcmul_(term, coefficient.unsqueeze(-1))
