"""The cut of the top-N set, without sorting: which logits of a row are among its N largest.

The cut of a row is found by probing: one probe counts how many logits reach a number, and the counts say where to probe
next. A probe reads the row once and, when the vocabulary is split over ranks, reduces one count a row; neither logits
nor candidates travel. About eight probes are enough for a row of fp32, whatever its length, because the search

1. brackets the cut by a sample of the row, then interpolates between the counts at both ends;
2. ends as soon as exactly N logits reach the probe: any number between the N-th and the next logit cuts the same set;
3. where that has not ended after ten probes, also halves the bracket by the *bits* of the floats, so that ties, heaps
   and outliers cannot stall it: at the end the bracket holds a single float, which is then the N-th logit.

Deliberately absent: approximation. The set is exact for every float dtype, and ties at the N-th are all in it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.losses.vocab_parallel import Group, vocab_size

_KEY_DTYPES = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_SAMPLE = 512  # logits of a row that guess the first bracket: of about a tenth of the vocabulary
_TRUST = 10  # probes that are left to interpolation alone
_COUNT_ELEMENTS = 1 << 19  # logits that are counted at a time: bounds the memory of a probe


@torch.no_grad()
def topn_cut(logits: Tensor, n: int, tp_group: Group = None, dtype: torch.dtype | None = None) -> Tensor:
    """A number for each row such that `logits >= cut` are its n largest logits, and all that equal the n-th.

    Shapes: [rows, V / tp] -> [rows], in the dtype of `logits`. `n` at or above the vocabulary gives -inf. The result is
    the n-th largest logit, or lies between it and the next smaller one. `dtype`: the logits are numbers of this coarser
    dtype (bf16 logits held in fp32), where there is less to search. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"top-n of {n}: give at least 1.")
    size = vocab_size(logits, tp_group)
    if n >= size:
        return torch.full_like(logits[:, 0], -math.inf)
    keys = Keys(dtype or logits.dtype, logits.dtype)
    cut = torch.empty_like(logits[:, 0])
    everything, open_logits = logits, None
    rows = torch.arange(len(logits), device=logits.device)  # those that are still searched
    # Of every row: count(low) >= n > count(high).
    top, *guesses = (keys.of(x) for x in _guess(logits, n / size, tp_group))
    low, high = keys.of(torch.full_like(cut, -math.inf)), top + 1
    count_low, count_high = torch.full_like(low, size), torch.zeros_like(low)
    step = -1
    while True:
        step += 1
        is_open = (count_low != n) & (low + 1 < high)
        num_open = int(is_open.sum())
        if 2 * num_open <= len(rows):
            cut[rows] = keys.values(low)
            if num_open == 0:
                return cut
            rows, low, high, count_low, count_high = (x[is_open] for x in (rows, low, high, count_low, count_high))
            guesses = [g[is_open] for g in guesses]
            if open_logits is None:  # of one size each time: many sizes would leave holes between allocations
                open_logits = torch.empty_like(logits[: (len(logits) + 1) // 2])
            logits = torch.index_select(everything, 0, rows, out=open_logits[: len(rows)])
        halfway = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        if guesses:
            probe = guesses.pop()
        elif step >= _TRUST and step % 2:
            probe = halfway
        else:
            probe = _interpolate(keys, low, high, count_low, count_high, n)
        probe = torch.where((probe > low) & (probe < high), probe, halfway)
        count = _count(logits, keys.values(probe), tp_group)
        enough = count >= n
        low, count_low = torch.where(enough, probe, low), torch.where(enough, count, count_low)
        high, count_high = torch.where(enough, high, probe), torch.where(enough, count_high, count)


class Keys:
    """Integers in the order of the floats of a dtype: neighbouring floats have neighbouring keys."""

    def __init__(self, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        self.dtype, self.value_dtype = dtype, value_dtype
        self.bits = _KEY_DTYPES[dtype]

    def of(self, values: Tensor) -> Tensor:
        bits = (values.to(self.dtype) + 0.0).view(self.bits)  # + 0.0 turns -0.0 into 0.0
        return torch.where(bits < 0, bits ^ torch.iinfo(self.bits).max, bits).long()

    def values(self, keys: Tensor) -> Tensor:
        keys = keys.to(self.bits)
        bits = torch.where(keys < 0, keys ^ torch.iinfo(self.bits).max, keys)
        return bits.view(self.dtype).to(self.value_dtype)


def _guess(logits: Tensor, share: float, tp_group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum, and two numbers that probably have the cut between them.

    They are three standard errors around the quantile of a sample.
    """
    stride = max(1, logits.shape[-1] // _SAMPLE)
    sample = -logits[:, ::stride]
    length = sample.shape[-1]
    spread = 3.0 * math.sqrt(share * (1.0 - share) * length) + 1.0
    above, below = (min(length, max(1, round(share * length + sign * spread))) for sign in (-1, 1))
    bracket = [-sample.kthvalue(above).values, sample.kthvalue(below).values]
    highest = torch.stack([logits.amax(-1), *bracket])
    if tp_group is not None and tp_group.size() > 1:  # the widest bracket of all ranks
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp_group)
    return highest[0], highest[1], -highest[2]


def _interpolate(keys: Keys, low: Tensor, high: Tensor, count_low: Tensor, count_high: Tensor, n: int) -> Tensor:
    """The key where the count reaches n, if it falls evenly from one end to the other."""
    start, end = keys.values(low).double(), keys.values(high).double()
    # On the logarithms of the counts, which fall evenly in a tail; halves, because one of them may be 0.
    left, wanted, right = ((x + 0.5).double().log() for x in (count_low, torch.full_like(count_low, n), count_high))
    share = (left - wanted) / (left - right)
    return keys.of((start + (end - start) * share).nan_to_num(0.0))


def _count(logits: Tensor, cut: Tensor, tp_group: Group) -> Tensor:
    """How many logits of each row reach `cut`. int64 [rows], the same on all ranks."""
    rows = max(1, _COUNT_ELEMENTS // logits.shape[-1])
    # Counted in fp32, exact up to 2^24 tokens: torch adds booleans several times more slowly.
    counts = [
        torch.ge(z, c.unsqueeze(-1), out=torch.empty_like(z, dtype=torch.float32)).sum(-1)
        for z, c in zip(logits.split(rows), cut.split(rows), strict=True)
    ]
    count = torch.cat(counts)
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(count, group=tp_group)
    return count.long()
