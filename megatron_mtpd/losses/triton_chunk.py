"""`chunk.block_losses` on a GPU: the same contract, in three passes over the logits.

1. `_statistics` reads each row once and finds maximum, log-sum-exp and what the forward KL sums, on the way.
2. `_sums` reads it again and finds what needs both softmaxes: the overlap, and sum(q f) of `rows.py`.
3. `_gradient` reads it last and overwrites it with the gradient of all losses together.

Softmaxes are never stored: each pass makes them again from the logits and two numbers a row. So there are no
vocabulary-sized temporaries, and logits may have the dtype of the model (bf16): arithmetic is fp32, or fp64 for fp64,
and the gradient is rounded to their dtype when it is stored. What lies between the passes is a few numbers a row, in
torch (`rows.py`), as in `chunk.py`, which is the reference that these kernels are tested against.

Importing this module imports Triton; `kernels.py` decides when. Deliberately absent: tuning. The passes are bound by
memory, and one tile size serves.
"""

# pyright: reportIndexIssue=false
# A kernel is launched as kernel[grid](...), which pyright does not know.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import chunk, rows
from megatron_mtpd.losses.rows import FORWARD_KL, TOTAL_VARIATION, RowLosses, RowWeights, Statistics, Sums
from megatron_mtpd.losses.vocab_parallel import Group

TILE, WARPS = 4096, 8
LOWEST = tl.constexpr(chunk.LOWEST)
# The factor f of `rows.py`
ONE, IN_TOP, SIGN, LOG_RATIO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


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
    """As `chunk.block_losses`, but `logits` and `kd_gradient` may be bf16 or fp16, too."""
    heads, num_rows, size = logits.shape
    ranks = tp_group.size() if tp_group is not None else 1
    labels = labels - tp_group.rank() * size if tp_group is not None else labels
    cut = None if cut is None else cut.contiguous()
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tile = min(TILE, triton.next_power_of_2(size))
    common = {
        "num_rows": num_rows,
        "SIZE": size,
        "HEADS": heads,
        "PER_TEMPERATURE": 1.0 / config.temperature,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "TILE": tile,
        "num_warps": WARPS,
    }

    numbers = logits.new_empty(6, heads, num_rows, dtype=dtype)
    first = torch.empty_like(numbers[0], dtype=torch.int64)
    is_forward_kl = config.objective in FORWARD_KL
    _statistics[(heads * num_rows,)](
        logits, labels, cut, numbers, first, IS_FORWARD_KL=is_forward_kl, HAS_TOP=cut is not None, **common
    )
    top, label_logit, lse, lse_kd, dot, mass = numbers
    statistics = Statistics(top, first, label_logit, lse, lse_kd, dot, mass[:1])
    if tp_group is not None and ranks > 1:
        statistics = rows.gather_statistics(statistics, size, tp_group)

    normalisers = torch.stack([statistics.lse, statistics.lse_kd])
    factor = _factor_of(config, cut)
    sums = torch.empty_like(numbers[:3, 1:])
    is_variation = config.objective in TOTAL_VARIATION
    _sums[((heads - 1) * num_rows,)](logits, cut, normalisers, sums, FACTOR=factor, IS_VARIATION=is_variation, **common)
    sums = Sums(*sums)
    if tp_group is not None and ranks > 1:
        sums = rows.reduce_sums(sums, tp_group)

    if weights is not None:
        coefficients = torch.zeros_like(numbers[:3, 1:])
        if weights.distillation is not None:
            c = rows.coefficients(config, cut is not None, statistics, sums, weights.distillation)
            for into, values in zip(coefficients, c, strict=True):
                if values is not None:
                    into.copy_(values)
        cross_entropy = weights.cross_entropy.to(dtype).contiguous()
        _gradient[(num_rows, triton.cdiv(size, tile))](
            logits,
            kd_gradient,
            labels,
            cut,
            normalisers,
            cross_entropy,
            coefficients,
            FACTOR=factor,
            HAS_TOP=cut is not None,
            IS_APART=kd_gradient is not None,
            **common,
        )
    return rows.losses(config, cut is not None, statistics, sums)


def _factor_of(config: MTPDConfig, cut: Tensor | None) -> int:
    if config.objective in TOTAL_VARIATION:
        return SIGN.value
    if config.objective == "reverse_kl":
        return LOG_RATIO.value
    return ONE.value if cut is None else IN_TOP.value


# Kernels -----------------------------------------------------------------------------------------------------------
# Row r of head j of `z` [HEADS, num_rows, SIZE] starts at (j * num_rows + r) * SIZE; head 0 is the teacher.


@triton.jit
def _load(row, at, is_inside, DTYPE: tl.constexpr):
    return tl.maximum(tl.load(row + at, mask=is_inside, other=LOWEST).to(DTYPE), LOWEST)


@triton.jit
def _factor(z, teacher, p, q, cut, PER_TEMPERATURE: tl.constexpr, FACTOR: tl.constexpr):
    if FACTOR == IN_TOP:
        f = tl.where(teacher >= cut, 1.0, 0.0)
    elif FACTOR == SIGN:
        f = tl.where(p > q, 1.0, 0.0) - tl.where(p < q, 1.0, 0.0)
    elif FACTOR == LOG_RATIO:
        f = (z - teacher) * PER_TEMPERATURE
    else:
        f = tl.full(z.shape, 1.0, tl.float32)
    return f.to(z.dtype)


@triton.jit
def _statistics(
    z,
    labels,
    cuts,
    numbers,
    firsts,
    num_rows,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PER_TEMPERATURE: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    IS_FORWARD_KL: tl.constexpr,
    HAS_TOP: tl.constexpr,
):
    """A row of a head. numbers [6, HEADS, num_rows]: top, label_logit, lse, lse_kd, dot, mass; firsts: int64."""
    row, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    out = head * num_rows + row
    z_row, teacher_row = z + out.to(tl.int64) * SIZE, z + row.to(tl.int64) * SIZE
    cut = tl.load(cuts + row).to(DTYPE) if HAS_TOP else 0.0
    # Sums of exp(. - top), lane by lane: shrunk whenever the top rises.
    top, teacher_top = tl.full([], LOWEST, DTYPE), tl.full([], LOWEST, DTYPE)
    first = tl.full([], 0, tl.int32)
    nothing = tl.zeros([TILE], DTYPE)
    total, total_kd, teacher_total, dot, mass = nothing, nothing, nothing, nothing, nothing
    for start in range(0, SIZE, TILE):
        at = start + tl.arange(0, TILE)
        is_inside = at < SIZE
        logit = _load(z_row, at, is_inside, DTYPE)
        tile_top, tile_first = tl.max(logit, 0, return_indices=True)
        first = tl.where(tile_top > top, start + tile_first, first)
        higher = tl.maximum(top, tile_top)
        total = total * tl.exp(top - higher) + tl.where(is_inside, tl.exp(logit - higher), 0.0)
        if PER_TEMPERATURE != 1.0:
            shrink = tl.exp((top - higher) * PER_TEMPERATURE)
            total_kd = total_kd * shrink + tl.where(is_inside, tl.exp((logit - higher) * PER_TEMPERATURE), 0.0)
        top = higher
        if IS_FORWARD_KL:
            teacher = _load(teacher_row, at, is_inside, DTYPE)
            higher = tl.maximum(teacher_top, tl.max(teacher, 0))
            shrink = tl.exp((teacher_top - higher) * PER_TEMPERATURE)
            w = tl.where(is_inside, tl.exp((teacher - higher) * PER_TEMPERATURE), 0.0)
            teacher_total = teacher_total * shrink + w
            if HAS_TOP:
                w = tl.where(teacher >= cut, w, 0.0)
            mass = mass * shrink + w
            dot = dot * shrink + w * (logit * PER_TEMPERATURE)
            teacher_top = higher

    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < SIZE)
    label_logit = tl.load(z_row + label, mask=is_here, other=0.0).to(DTYPE)
    stride = HEADS * num_rows
    lse = top + tl.log(tl.sum(total, 0))
    tl.store(firsts + out, first.to(tl.int64))
    tl.store(numbers + out, top)
    tl.store(numbers + stride + out, tl.where(is_here, tl.maximum(label_logit, LOWEST), 0.0))
    tl.store(numbers + 2 * stride + out, lse)
    if PER_TEMPERATURE != 1.0:
        lse = top * PER_TEMPERATURE + tl.log(tl.sum(total_kd, 0))
    tl.store(numbers + 3 * stride + out, lse)
    if IS_FORWARD_KL:
        share = 1.0 / tl.sum(teacher_total, 0)
        tl.store(numbers + 4 * stride + out, tl.sum(dot, 0) * share)
        tl.store(numbers + 5 * stride + out, tl.sum(mass, 0) * share)
    else:
        tl.store(numbers + 4 * stride + out, 0.0)
        tl.store(numbers + 5 * stride + out, 1.0)


@triton.jit
def _sums(
    z,
    cuts,
    normalisers,
    sums,
    num_rows,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PER_TEMPERATURE: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    FACTOR: tl.constexpr,
    IS_VARIATION: tl.constexpr,
):
    """A row of a head but the teacher. normalisers [2, HEADS, num_rows]: lse, lse_kd; sums [3, HEADS - 1, num_rows]:
    overlap, overlap_kd, qf."""
    row, head = tl.program_id(0) // (HEADS - 1), tl.program_id(0) % (HEADS - 1) + 1
    source, out = head * num_rows + row, (head - 1) * num_rows + row
    z_row, teacher_row = z + source.to(tl.int64) * SIZE, z + row.to(tl.int64) * SIZE
    lse, teacher_lse = tl.load(normalisers + source), tl.load(normalisers + row)
    kd = normalisers + HEADS * num_rows
    lse_kd, teacher_lse_kd = tl.load(kd + source), tl.load(kd + row)
    cut = tl.load(cuts + row).to(DTYPE) if FACTOR == IN_TOP else 0.0
    nothing = tl.zeros([TILE], DTYPE)
    overlap, overlap_kd, qf = nothing, nothing, nothing
    for start in range(0, SIZE, TILE):
        at = start + tl.arange(0, TILE)
        is_inside = at < SIZE
        logit, teacher = _load(z_row, at, is_inside, DTYPE), _load(teacher_row, at, is_inside, DTYPE)
        p, q = tl.exp(teacher - teacher_lse), tl.exp(logit - lse)
        overlap += tl.where(is_inside, tl.minimum(p, q), 0.0)
        if PER_TEMPERATURE != 1.0:
            p = tl.exp(teacher * PER_TEMPERATURE - teacher_lse_kd)
            q = tl.exp(logit * PER_TEMPERATURE - lse_kd)
            if IS_VARIATION:
                overlap_kd += tl.where(is_inside, tl.minimum(p, q), 0.0)
        if FACTOR != ONE:
            f = _factor(logit, teacher, p, q, cut, PER_TEMPERATURE, FACTOR)
            qf += tl.where(is_inside, q * f, 0.0)

    stride = (HEADS - 1) * num_rows
    total = tl.sum(overlap, 0)
    tl.store(sums + out, total)
    if PER_TEMPERATURE != 1.0 and IS_VARIATION:
        total = tl.sum(overlap_kd, 0)
    tl.store(sums + stride + out, total)
    tl.store(sums + 2 * stride + out, 1.0 if FACTOR == ONE else tl.sum(qf, 0))


@triton.jit
def _gradient(
    z,
    kd_gradient,
    labels,
    cuts,
    normalisers,
    cross_entropy,
    coefficients,
    num_rows,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PER_TEMPERATURE: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    FACTOR: tl.constexpr,
    HAS_TOP: tl.constexpr,
    IS_APART: tl.constexpr,
):
    """A tile of a row, of all heads: they read the teacher's logits before these are overwritten. cross_entropy
    [HEADS, num_rows]: weights; coefficients [3, HEADS - 1, num_rows]: c1, c2, c3 of `rows.py`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_inside = at < SIZE
    is_label = tl.where(at == tl.load(labels + row), 1.0, 0.0).to(DTYPE)
    cut = tl.load(cuts + row).to(DTYPE) if HAS_TOP else 0.0
    kd = normalisers + HEADS * num_rows
    teacher = _load(z + row * SIZE, at, is_inside, DTYPE)
    p = tl.exp(teacher - tl.load(normalisers + row))
    p_kd = tl.exp(teacher * PER_TEMPERATURE - tl.load(kd + row)) if PER_TEMPERATURE != 1.0 else p
    w = tl.where(teacher >= cut, p_kd, 0.0) if HAS_TOP else p_kd
    for head in range(1, HEADS):
        source, number = head * num_rows + row, (head - 1) * num_rows + row
        logit = _load(z + source * SIZE, at, is_inside, DTYPE)
        q = tl.exp(logit - tl.load(normalisers + source))
        q_kd = tl.exp(logit * PER_TEMPERATURE - tl.load(kd + source)) if PER_TEMPERATURE != 1.0 else q
        f = _factor(logit, teacher, p_kd, q_kd, cut, PER_TEMPERATURE, FACTOR)
        stride = (HEADS - 1) * num_rows
        c1 = tl.load(coefficients + number)
        c2 = tl.load(coefficients + stride + number)
        c3 = tl.load(coefficients + 2 * stride + number)
        of_ce = tl.load(cross_entropy + source) * (q - is_label)
        of_kd = q_kd * (c1 * f + c2) + c3 * w
        if IS_APART:
            tl.store(kd_gradient + number * SIZE + at, of_kd, mask=is_inside)
        else:
            of_ce += of_kd
        tl.store(z + source * SIZE + at, of_ce, mask=is_inside)
    tl.store(z + row * SIZE + at, tl.load(cross_entropy + row) * (p - is_label), mask=is_inside)
