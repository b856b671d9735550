"""Reductions over the vocabulary when each tensor-parallel rank holds a slice of it.

Every function takes this rank's slice of the logits, shape [..., V / tp], and a `tp_group` (None or a group of one: the
slice is the whole vocabulary). Results are those of the full vocabulary and equal on all ranks; only row-sized
tensors travel, never logits. Rank r holds the ids [r * V / tp, (r + 1) * V / tp), as in Megatron.

Gradients: a loss built from these results is the same number on every rank, and each rank differentiates it for its
own slice only. So there are two operators, as in Megatron. A *sum over ranks* passes its gradient through unchanged
(*reduce from the model-parallel region*): reducing it again would count it tp times. Its result goes on to be a row's
number; where it meets the slices again instead, as the normaliser of a softmax does, each rank sees only its own part
of the gradient, and `to_slices` has to sum those parts (*copy to the model-parallel region*).

Deliberately absent: anything that gathers logits or candidates.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def _is_parallel(tp_group: Group) -> bool:
    return tp_group is not None and tp_group.size() > 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=tp_group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        ctx.tp_group = tp_group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.tp_group)
        return grad, None


def to_slices(x: Tensor, tp_group: Group = None) -> Tensor:
    """A row's number, equal on all ranks, that is about to be combined with each rank's slice. [...] -> [..., 1].

    The gradients that it gets from the slices are summed over the ranks. Not for what meets row-sized numbers alone:
    their gradients are equal on all ranks already.
    """
    return (_ToSlices.apply(x, tp_group) if _is_parallel(tp_group) else x).unsqueeze(-1)


def vocab_offset(logits: Tensor, tp_group: Group) -> int:
    """Id of the first token of this rank's slice."""
    return tp_group.rank() * logits.shape[-1] if tp_group is not None else 0


def vocab_size(logits: Tensor, tp_group: Group) -> int:
    """Number of tokens of the full vocabulary."""
    return logits.shape[-1] * (tp_group.size() if tp_group is not None else 1)


def vocab_sum(x: Tensor, tp_group: Group = None) -> Tensor:
    """Sum over the vocabulary. [..., V / tp] -> [...]. Differentiable."""
    total = x.sum(-1)
    return _SumOverRanks.apply(total, tp_group) if _is_parallel(tp_group) else total


@torch.no_grad()
def vocab_max(x: Tensor, tp_group: Group = None) -> Tensor:
    """Maximum over the vocabulary. [..., V / tp] -> [...]. Not differentiable."""
    top = x.amax(-1)
    if _is_parallel(tp_group):
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
    return top


def vocab_logsumexp(logits: Tensor, tp_group: Group = None) -> Tensor:
    """log sum exp over the vocabulary. [..., V / tp] -> [...]. Differentiable.

    The same as `torch.logsumexp(full_logits, -1)`. A row must hold at least one finite logit.
    """
    top = vocab_max(logits, tp_group)
    return vocab_sum((logits - top.unsqueeze(-1)).exp(), tp_group).log() + top


def vocab_gather(logits: Tensor, ids: Tensor, tp_group: Group = None) -> Tensor:
    """The logit of one token a row. [..., V / tp] and int64 [...] -> [...]. Differentiable.

    The same as `full_logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)`.
    """
    local = ids - vocab_offset(logits, tp_group)
    is_here = (local >= 0) & (local < logits.shape[-1])
    picked = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    picked = torch.where(is_here, picked, 0.0)
    return _SumOverRanks.apply(picked, tp_group) if _is_parallel(tp_group) else picked


@torch.no_grad()
def vocab_argmax(logits: Tensor, tp_group: Group = None) -> Tensor:
    """Id of the largest logit, the lowest id among equals. [..., V / tp] -> int64 [...]."""
    # torch.argmax may return any of equal maxima; max(dim) returns the first on CPU only. Naming the rule makes the
    # result independent of the device and of the sharding.
    top = vocab_max(logits, tp_group).unsqueeze(-1)
    size = logits.shape[-1]
    ids = torch.arange(size, device=logits.device)
    first = torch.where(logits == top, ids, size).amin(-1)
    if not _is_parallel(tp_group):
        return first
    first = torch.where(first < size, first + vocab_offset(logits, tp_group), vocab_size(logits, tp_group))
    dist.all_reduce(first, op=dist.ReduceOp.MIN, group=tp_group)
    return first


@torch.no_grad()
def topn_threshold(logits: Tensor, n: int, tp_group: Group = None) -> Tensor:
    """The n-th largest logit of each row. [..., V / tp] -> [...], exact for every float dtype.

    `logits >= threshold` is the top-n set; equal logits at the threshold are all in it, so that the set does not depend
    on the order of the vocabulary or on its sharding. `n` at or above the vocabulary selects everything: -inf.

    One rank: `torch.kthvalue`. Several: a bisection over the float's bits, ordered as integers, with one count a row
    and bit reduced over the ranks, so the exact value is found after as many steps as the dtype has bits.
    """
    size = vocab_size(logits, tp_group)
    if n < 1:
        raise ValueError(f"top-n of {n}: give at least 1.")
    if n >= size:
        return torch.full_like(logits[..., 0], float("-inf"))
    if not _is_parallel(tp_group):
        return logits.kthvalue(size - n + 1, dim=-1).values
    keys = _ordered_keys(logits)
    low = torch.full_like(keys[..., 0], torch.iinfo(keys.dtype).min)  # the threshold's key stays in [low, high]
    high = torch.full_like(low, torch.iinfo(keys.dtype).max)
    for _ in range(torch.iinfo(keys.dtype).bits):
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        count = (keys >= middle.unsqueeze(-1)).sum(-1)
        dist.all_reduce(count, group=tp_group)
        enough = count >= n
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return _float_from_keys(low, logits.dtype)


_KEY_DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def _ordered_keys(x: Tensor) -> Tensor:
    """Integers in the order of the floats: IEEE bits as they are for positive, the lower bits flipped for negative."""
    bits = x.view(_KEY_DTYPES[x.dtype])  # -0.0 comes below 0.0, which changes no set: as floats they are equal
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _float_from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys).view(dtype)
