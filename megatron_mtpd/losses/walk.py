"""The walk over chunks of target positions: logits of all heads, their losses, and the gradients that follow.

Rows are positions of the flattened sequence, row = position * b + sequence. The rows of a chunk belong to target
tokens; head k's hidden state for target row t is at source row t - k * b, so bringing a chunk's hidden states together
is a shift, and each row of a head is met exactly once. A chunk is laid out in blocks, [blocks, 1 + K, R, V / tp]: the
matrix products run over the chunk, where they are efficient, the kernels over a block, which stays in the cache.

Deliberately absent: masks, weights and reductions over rows, which are the caller's (`fused.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.kernels import Kernels
from megatron_mtpd.losses.rows import RowLosses, RowWeights
from megatron_mtpd.losses.vocab_parallel import Group

# Rows of all heads in a chunk, of fp32 logits: few enough to be small beside the sequence and, on CPU, beside the
# output weight; but from the least on, matrix products are efficient.
CPU_CHUNK, GPU_CHUNK = 512, 2048
CPU_CHUNK_LOGITS, CPU_CHUNK_LEAST = 1 << 23, 128
# Logits of a block of torch's kernels. On CPU few enough for the caches, but worth some sixty calls from Python, or two
# collectives; on GPU few enough for temporaries of their size.
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 25


@dataclass(frozen=True)
class Inputs:
    """What the walk reads. n rows, K heads."""

    hidden: Sequence[Tensor]
    """Of the main head and of heads 1..K: [n, h] each."""
    weight: Tensor
    """[V / tp, h]."""
    labels: Tensor
    """int64 [n], the main head's."""
    is_live: Tensor
    """bool [1 + K, n], by target: rows of which any loss counts. Others may hold inf or nan."""
    batch: int
    """Rows between a position and the next."""
    config: MTPDConfig
    kernels: Kernels
    tp_group: Group = None
    logit_scale: float = 1.0
    chunk_rows: int | None = None
    """Rows of all heads in a chunk; None: a default of the device."""


class Gradients:
    """Sums of the gradients of output weight and hidden states, filled chunk by chunk.

    Attributes:
        weight: fp32 or fp64 [V / tp, h], or None.
        hidden: [n_hidden, n, h]: of the main head, of the heads, and, if `two_lists`, of the heads' other pass.
    """

    def __init__(
        self, inputs: Inputs, shares: tuple[float, float], two_lists: bool, of_weight: bool, of_hidden: Sequence[bool]
    ) -> None:
        """`shares`: how much of the heads' cross-entropy and distillation gradient reaches the weight. `of_hidden`:
        whose gradients are asked for, in the order of `hidden`."""
        self.inputs, self.shares, self.two_lists = inputs, shares, two_lists
        self.is_apart = two_lists or (of_weight and shares[0] != shares[1])
        dtype = logits_dtype(inputs.weight)
        self.weight = torch.empty_like(inputs.weight, dtype=dtype) if of_weight else None
        self._is_empty = True
        self.first = next((i for i, wanted in enumerate(of_hidden) if wanted), len(of_hidden))
        self.hidden = inputs.hidden[0].new_zeros(len(of_hidden), *inputs.hidden[0].shape)

    def add(self, start: int, hidden: Tensor, logits: Tensor, kd: Tensor | None) -> None:
        """A chunk's: `hidden` [blocks, 1 + K, R, h]; gradients of its logits, of all losses or, with `kd`, apart.

        Overwrites its arguments.
        """
        heads = hidden.shape[1]
        if kd is None:
            logits = logits.to(hidden.dtype)  # once for both products
        if kd is not None and not self.two_lists:
            kd.add_(logits[:, 1:])
            if self.first == 0:
                self._add_hidden(start, 0, logits[:, :1])
            self._add_hidden(start, 1, kd)
        else:
            self._add_hidden(start, 0, logits)
            if kd is not None:
                self._add_hidden(start, heads, kd)
        if self.weight is None:
            return
        ce_share, kd_share = self.shares
        if kd is not None and kd_share > 0.0:
            logits[:, 1:].mul_(ce_share if self.two_lists else ce_share - kd_share).add_(kd, alpha=kd_share)
        elif ce_share == 0.0:
            hidden, logits = hidden[:, :1], logits[:, :1]
        else:
            hidden[:, 1:].mul_(ce_share)
        self._add_weight(_rows(logits), _rows(hidden))

    def _add_hidden(self, start: int, first: int, logits: Tensor) -> None:
        skip = max(0, self.first - first)
        if skip >= logits.shape[1]:
            return
        inputs = self.inputs
        batch, num_rows, heads = inputs.batch, len(inputs.labels), len(inputs.hidden)
        gradient = _rows(logits[:, skip:]).to(inputs.weight.dtype) @ inputs.weight
        gradient = gradient.view(len(logits), -1, logits.shape[2], gradient.shape[-1])
        for index in range(first + skip, first + logits.shape[1]):
            k = index if index < heads else index - heads + 1
            rows = gradient[:, index - first - skip].flatten(0, 1)
            begin, end = max(start, k * batch), min(start + len(rows), num_rows)
            if begin < end:
                self.hidden[index, begin - k * batch : end - k * batch] = rows[begin - start : end - start]

    def _add_weight(self, logits: Tensor, hidden: Tensor) -> None:
        assert self.weight is not None
        left, right = logits.to(hidden.dtype).t(), hidden
        beta, self._is_empty = (0.0 if self._is_empty else 1.0), False
        if right.dtype == self.weight.dtype:
            self.weight.addmm_(left, right, beta=beta)
        elif left.is_cuda:  # torch's mixed product, which it has for no other device
            torch.addmm(self.weight, left, right, out_dtype=self.weight.dtype, beta=beta, out=self.weight)
        elif beta == 0.0:
            self.weight.copy_(left @ right)
        else:
            self.weight.add_(left @ right)


def walk(inputs: Inputs, weights: RowWeights | None = None, gradients: Gradients | None = None) -> RowLosses:
    """Losses of all rows by target: [1 + K, n], and [K, n] for what a head has with its teacher.

    The first k * b targets have no source for head k: what stands there means nothing. `weights` are by target too;
    with them `gradients` gets the gradient of the weighted sum of all losses.
    """
    num_rows, heads = len(inputs.labels), len(inputs.hidden)
    vocab, low = inputs.weight.shape[0], inputs.weight.dtype
    is_apart = gradients is not None and gradients.is_apart
    # Where gradients are added up before the products, in the dtype of the sums.
    dtype = low if inputs.kernels.in_registers and not is_apart else logits_dtype(inputs.weight)
    block, blocks = _sizes(inputs, dtype)
    chunk = block * blocks
    device = inputs.weight.device
    chunk_logits = torch.empty(blocks, heads, block, vocab, dtype=dtype, device=device)
    chunk_kd = torch.empty_like(chunk_logits[:, 1:]) if is_apart else None
    # Padding to whole blocks: rows that are not live and have no weight.
    padding = (0, -num_rows % block)
    labels, is_live = (F.pad(x, padding) for x in (inputs.labels, inputs.is_live))
    if weights is not None:
        weights = weights.map(lambda w: F.pad(w * inputs.logit_scale, padding))
    results = []
    for start in range(0, num_rows, chunk):
        blocks = min(blocks, (len(labels) - start) // block)  # of the last chunk there may be fewer
        logits, kd = chunk_logits[:blocks], None if chunk_kd is None else chunk_kd[:blocks]
        hidden = _hidden_of(inputs, start, is_live[:, start : start + chunk], blocks)
        if low == dtype:
            torch.mm(_rows(hidden), inputs.weight.t(), out=_rows(logits))
        else:
            _rows(logits).copy_(_rows(hidden) @ inputs.weight.t())
        if inputs.logit_scale != 1.0:
            logits.mul_(inputs.logit_scale)
        cuts = _cut(inputs, logits[:, 0].flatten(0, 1))
        for i in range(blocks):
            rows = slice(start + i * block, start + (i + 1) * block)
            results.append(
                inputs.kernels.block_losses(
                    logits[i],
                    labels[rows],
                    inputs.config,
                    None if cuts is None else cuts[i * block : (i + 1) * block],
                    None if weights is None else weights.map(lambda w, rows=rows: w[:, rows]),
                    None if kd is None else kd[i],
                    inputs.tp_group,
                )
            )
        if gradients is not None:
            gradients.add(start, hidden, logits, kd)
    return RowLosses(*(torch.cat(parts, -1)[:, :num_rows] for parts in zip(*results, strict=True)))


def logits_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of everything inside: fp32, or fp64 for fp64 weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _sizes(inputs: Inputs, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a block and blocks of a chunk."""
    heads, num_rows = len(inputs.hidden), len(inputs.labels)
    on_cpu = inputs.weight.device.type == "cpu"
    if on_cpu:
        default = min(CPU_CHUNK, max(CPU_CHUNK_LEAST, CPU_CHUNK_LOGITS // inputs.weight.shape[0]))
    else:
        default = GPU_CHUNK * 4 // dtype.itemsize
    most = max(1, (inputs.chunk_rows or default) // heads)
    chunk = -(-num_rows // -(-num_rows // most))
    if inputs.kernels.in_registers:
        return chunk, 1
    block = min(chunk, max(1, (CPU_BLOCK if on_cpu else GPU_BLOCK) // (heads * inputs.weight.shape[0])))
    return block, -(-chunk // block)


def _hidden_of(inputs: Inputs, start: int, is_live: Tensor, blocks: int) -> Tensor:
    """[blocks, 1 + K, R, h]: the hidden state of each head that predicts a target of the chunk at `start`."""
    chunk = is_live.shape[1]
    targets = torch.arange(start, start + chunk, device=is_live.device)
    parts = []
    for k, hidden in enumerate(inputs.hidden):
        part = hidden[(targets - k * inputs.batch).clamp(0, len(hidden) - 1)]
        # 0 * nan is not 0: a row that does not count must be finite before it gets the weight 0.
        part = torch.where(is_live[k].unsqueeze(-1), part, part.nan_to_num(0.0, 0.0, 0.0))
        parts.append(part.view(blocks, chunk // blocks, -1))
    return torch.stack(parts, 1)


def _cut(inputs: Inputs, teacher: Tensor) -> Tensor | None:
    """The top-N cut of each row, or None where the distillation is not restricted."""
    config, group = inputs.config, inputs.tp_group
    vocab = inputs.weight.shape[0] * (group.size() if group is not None else 1)
    if config.objective != "topn_kl" or config.top_n >= vocab:
        return None
    # Scaled logits are no longer numbers of the weight's dtype.
    dtype = inputs.weight.dtype if inputs.logit_scale == 1.0 else None
    return inputs.kernels.topn_cut(teacher, config.top_n, group, dtype)
