"""`topn.topn_cut` on a GPU: the cut is the N-th largest logit itself, found digit by digit.

Floats become integers of the same order (`topn.py`), and a pass counts, for each row, how often each value of the
highest eight bits occurs; the counts say which value the N-th largest has, and the next pass looks at the next eight
bits of the logits that share it. So bf16 takes two passes and fp32 four, whatever the numbers are, and the host waits
for none of them. With a vocabulary that is split over ranks the counts are reduced, 256 a row and pass.

Importing this module imports Triton; `kernels.py` decides when.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...), which pyright does not know.

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_mtpd.losses.topn import Keys
from megatron_mtpd.losses.vocab_parallel import Group, vocab_size

TILE, WARPS = 4096, 8
VALUES = tl.constexpr(256)


@torch.no_grad()
def topn_cut(logits: Tensor, n: int, tp_group: Group = None, dtype: torch.dtype | None = None) -> Tensor:
    """As `topn.topn_cut`; always the n-th largest logit. `dtype` is accepted and not needed."""
    if n < 1:
        raise ValueError(f"top-n of {n}: give at least 1.")
    num_rows, size = logits.shape
    if n >= vocab_size(logits, tp_group):
        return torch.full_like(logits[:, 0], -math.inf)
    keys = Keys(logits.dtype, logits.dtype)
    bits = torch.iinfo(keys.bits).bits
    bit_rows = logits.contiguous().view(keys.bits)
    counts = torch.empty(num_rows, 256, dtype=torch.int32, device=logits.device)
    key = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)  # known so far: its highest digits
    wanted = torch.full_like(key, n)  # the rank of the cut among the logits that share them
    for shift in range(bits - 8, -1, -8):
        is_top = shift == bits - 8
        _count_digits[(num_rows,)](
            bit_rows,
            key,
            counts,
            SIZE=size,
            LARGEST=torch.iinfo(keys.bits).max,
            SHIFT=shift,
            IS_TOP=is_top,
            TILE=min(TILE, triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
        if tp_group is not None and tp_group.size() > 1:
            dist.all_reduce(counts, group=tp_group)
        at_least = counts.flip(-1).cumsum(-1).flip(-1)  # how many have this digit or a larger one
        digit = (at_least >= wanted.unsqueeze(-1)).sum(-1, keepdim=True) - 1
        larger = (at_least - counts).gather(-1, digit)
        digit, wanted = digit.squeeze(-1), wanted - larger.squeeze(-1)
        key |= (digit - 128 if is_top else digit) << shift
    return keys.values(key)


@triton.jit
def _count_digits(
    bits,
    keys,
    counts,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SHIFT: tl.constexpr,
    IS_TOP: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row. counts [num_rows, 256]: logits that share the digits above SHIFT + 8 with the row's key, by the next."""
    row = tl.program_id(0).to(tl.int64)
    known = tl.load(keys + row)
    count = tl.zeros([VALUES], tl.int32)
    for start in range(0, SIZE, TILE):
        at = start + tl.arange(0, TILE)
        is_counted = at < SIZE
        key = tl.load(bits + row * SIZE + at, mask=is_counted, other=0).to(tl.int64)
        key = tl.where(key < 0, key ^ LARGEST, key)
        digit = key >> SHIFT
        if IS_TOP:
            digit += 128  # it has the sign
        else:
            is_counted = is_counted & (((key ^ known) >> (SHIFT + 8)) == 0)
        count += tl.histogram((digit & 255).to(tl.int32), VALUES, mask=is_counted)
    tl.store(counts + row * VALUES + tl.arange(0, VALUES), count)
