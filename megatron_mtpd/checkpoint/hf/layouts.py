"""Which rows of ours are which rows of the tensors of a Hugging Face checkpoint.

A layout names their tensors and knows the shapes that they have (`shapes`) and, for both directions, the runs of rows
that are the same in ours and in theirs (`runs`). So a tensor of any size is converted a block of rows at a time, and
what comes back is what went in, bit for bit. A row is what an index of the first dimension stands for; where ours has
three dimensions, one for the experts, their rows are counted through.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf.shape import Shape

Size = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """`count` rows, from `theirs` on in the tensor `name` of theirs, from `ours` on in ours."""

    name: str
    theirs: int
    ours: int
    count: int


class Layout(ABC):
    """Of one tensor of ours, whose size is `ours`."""

    names: tuple[str, ...]

    @abstractmethod
    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        """Of each of their tensors."""

    @abstractmethod
    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        """In the order of our rows. Rows of theirs that no run covers are zeros, rows of ours padding."""

    def turned(self, rows: Tensor) -> Tensor:
        """What each row becomes on its way, in either direction."""
        return rows


Table = dict[str, Layout]
"""From our names, without what says which layer, to layouts of theirs."""


class _Named(Layout):
    """One tensor of theirs."""

    def __init__(self, name: str) -> None:
        self.names = (name,)


class _Parts(Layout):
    """Several tensors of theirs."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names


class Same(_Named):
    """One tensor under another name."""

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [ours]

    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        return [Run(self.names[0], 0, 0, self.shapes(ours, shape)[0][0])]


class Vocabulary(Same):
    """[padded vocabulary, h] of ours, without the padding.

    A padding row becomes the mean of the real rows: its logit is then the mean logit, which is never chosen and weighs
    nothing in the softmax. Rows of zeros would have the logit 0, which may be the largest.
    """

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [(shape.vocab_size, *ours[1:])]


class SwappedHalves(Same):
    """[h, 2h] whose input has its halves in the other order: hidden state first, embedding second."""

    def turned(self, rows: Tensor) -> Tensor:
        return torch.cat(list(rows.chunk(2, 1))[::-1], 1)


class Stacked(_Parts):
    """Equal parts [rows, h] one after the other: the two projections of a gated MLP, and those of all experts."""

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        rows = math.prod(ours[:-1]) // len(self.names)
        return [(rows, ours[-1])] * len(self.names)

    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        rows = self.shapes(ours, shape)[0][0]
        return [Run(name, 0, rows * number, rows) for number, name in enumerate(self.names)]


class GroupedQKV(_Parts):
    """Query, key and value projections, or their biases.

    Ours holds, for each group of query heads in turn, the group's queries, its key and its value: [groups * (q + 2) *
    d, ...] with q query heads a group and d channels a head. Theirs are all queries, all keys, all values.
    """

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        keys = shape.num_query_groups * shape.head_dim
        return [(shape.num_attention_heads * shape.head_dim, *ours[1:]), (keys, *ours[1:]), (keys, *ours[1:])]

    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        groups, head = shape.num_query_groups, shape.head_dim
        parts = [shape.num_attention_heads // groups * head, head, head]
        runs, row = [], 0
        for group in range(groups):
            for name, rows in zip(self.names, parts, strict=True):
                runs.append(Run(name, group * rows, row, rows))
                row += rows
        return runs


class ConcatenatedQKV(_Named):
    """All queries, all keys, all values, in one tensor of theirs."""

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [ours]

    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        apart = GroupedQKV(("q", "k", "v"))
        queries, keys, _ = (size[0] for size in apart.shapes(ours, shape))
        first = {"q": 0, "k": queries, "v": queries + keys}
        return [replace(r, name=self.names[0], theirs=r.theirs + first[r.name]) for r in apart.runs(ours, shape)]


class ZeroBias(GroupedQKV):
    """Biases of zero, made of our weight of query, key and value, for an architecture that must have some."""

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [size[:1] for size in super().shapes(ours, shape)]

    def runs(self, ours: Size, shape: Shape) -> list[Run]:
        return []


def prefixed(layout: Layout, prefix: str) -> Layout:
    """The same layout of names that start with a prefix."""
    changed = copy(layout)
    changed.names = tuple(prefix + name for name in layout.names)
    return changed
