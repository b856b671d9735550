"""Tensors a block of rows at a time, so that memory is that of one block whatever the size of a tensor.

`of_theirs` makes our tensor from a Hugging Face folder, `of_ours` one of theirs from a checkpoint; both follow the runs
of rows that a layout gives. All blocks share one buffer: a block is good until the next but one is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf.layouts import Layout, Run, Size
from megatron_mtpd.checkpoint.hf.shape import Shape

BLOCK = 32 << 20
"""Bytes of a block, and of the pieces that an imported tensor consists of."""
EXPORTED = 4 << 20
"""Bytes of a block of an export, which leaves no pieces: it stays in the cache from its reading to its writing."""


class Source(Protocol):
    """What rows can be read from."""

    def read(self, name: str, first: int, out: Tensor) -> None:
        """The rows of a tensor from `first` on, into `out` [rows, width], whatever the stored dtype."""
        ...


class Buffer:
    """The memory of two blocks: one to use while the next is made. What is asked for is not cleared."""

    def __init__(self) -> None:
        self._memory, self._other = bytearray(), bytearray()

    def rows(self, count: int, width: int, dtype: torch.dtype) -> Tensor:
        """[count, width], of a storage that holds nothing else."""
        self._memory, self._other = self._other, self._memory
        if len(self._memory) < count * width * dtype.itemsize:
            self._memory = bytearray(count * width * dtype.itemsize)
        return torch.frombuffer(self._memory, dtype=dtype, count=count * width).view(count, width)


def ranges(size: Size, itemsize: int, block: int | None = None) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of each block of `block` bytes of a tensor; none crosses to the next expert.

    >>> list(ranges((5, 3), itemsize=2, block=12))
    [(0, 2), (2, 4), (4, 5)]
    """
    experts, rows, width = flat(size)
    step = max(1, (block or BLOCK) // (width * itemsize))
    for expert in range(experts):
        for first in range(0, rows, step):
            yield expert * rows + first, expert * rows + min(first + step, rows)


def flat(size: Size) -> tuple[int, int, int]:
    """Experts, rows of each and elements of a row: [s] is 1, s, 1, and [s, h] is 1, s, h."""
    experts, rows, *_ = size if len(size) > 2 else (1, *size)
    return experts, rows, math.prod(size) // (experts * rows)


def of_theirs(
    folder: Source,
    layout: Layout,
    size: Size,
    dtype: torch.dtype,
    shape: Shape,
    buffer: Buffer,
) -> Iterator[Tensor]:
    """Our tensor in blocks [rows, width] of its dtype, in the order of its rows."""
    runs = layout.runs(size, shape)
    experts, rows, width = flat(size)
    covered = runs[-1].ours + runs[-1].count
    padding = experts * rows - covered
    total, number = torch.zeros(width), 0
    for first, last in ranges(size, dtype.itemsize):
        out = buffer.rows(last - first, width, dtype)
        number = _next(runs, number, first)
        for run in runs[number:]:
            if run.ours >= last:
                break
            begin, end = max(first, run.ours), min(last, run.ours + run.count)
            if begin >= end:  # padding begins before this block
                break
            folder.read(run.name, run.theirs + begin - run.ours, out[begin - first : end - first])
        if padding:
            real = max(0, min(last, covered) - first)
            total += out[:real].sum(0, dtype=torch.float32)
            out[real:] = total / covered
        yield layout.turned(out)


def of_ours(
    checkpoint: Source,
    key: str,
    layout: Layout,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    buffer: Buffer,
) -> Iterator[Tensor]:
    """One of the tensors of theirs that come from our tensor `key`, in blocks [rows, width], in the order of rows."""
    size = shape.size_of(key)
    theirs = dict(zip(layout.names, layout.shapes(size, shape), strict=True))[name]
    runs = sorted((run for run in layout.runs(size, shape) if run.name == name), key=lambda run: run.theirs)
    width = flat(theirs)[2]
    for first, last in ranges(theirs, dtype.itemsize, min(BLOCK, EXPORTED)):
        out = buffer.rows(last - first, width, dtype)
        if not runs:
            out.zero_()
        for run in runs:
            begin, end = max(first, run.theirs), min(last, run.theirs + run.count)
            if begin < end:
                checkpoint.read(key, run.ours + begin - run.theirs, out[begin - first : end - first])
        yield layout.turned(out)


def _next(runs: list[Run], number: int, row: int) -> int:
    """The first run from `number` on that does not end before a row."""
    while number < len(runs) - 1 and runs[number].ours + runs[number].count <= row:
        number += 1
    return number
