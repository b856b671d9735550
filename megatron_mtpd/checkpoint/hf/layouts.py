"""How one tensor of ours is made of the tensors of a Hugging Face checkpoint, and back.

A layout names their tensors and knows three things: the shapes that they have (`shapes`), their values from ours
(`split`), and ours from theirs (`join`), as pieces that follow each other in the first dimension, so that nothing is
copied only to be put side by side. `split` after `join` is the identity, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf.shape import Shape

Size = tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """One tensor under another name."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [ours]

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return [ours]

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        return theirs


class Vocabulary(Same):
    """[padded vocabulary, h] of ours, without the padding.

    A padding row becomes the mean of the real rows: its logit is then the mean logit, which is never chosen and weighs
    nothing in the softmax. Rows of zeros would have the logit 0, which may be the largest.
    """

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [(shape.vocab_size, *ours[1:])]

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return [ours[: shape.vocab_size]]

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        padding = shape.padded_vocab_size - shape.vocab_size
        if not padding:
            return theirs
        mean = theirs[0].mean(0, keepdim=True, dtype=torch.float32).to(theirs[0].dtype)
        return [theirs[0], mean.expand(padding, -1).contiguous()]


@dataclass(frozen=True)
class Stacked:
    """Equal parts one after the other: the two projections of a gated MLP."""

    names: tuple[str, ...]

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [(ours[0] // len(self.names), *ours[1:])] * len(self.names)

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return list(ours.chunk(len(self.names)))

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        return theirs


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value projections, or their biases.

    Ours holds, for each group of query heads in turn, the group's queries, its key and its value: [groups * (q + 2) *
    d, ...] with q query heads a group and d channels a head. Theirs are all queries, all keys, all values.
    """

    names: tuple[str, str, str]

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        keys = shape.num_query_groups * shape.head_dim
        return [(shape.num_attention_heads * shape.head_dim, *ours[1:]), (keys, *ours[1:]), (keys, *ours[1:])]

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        groups, head = shape.num_query_groups, shape.head_dim
        queries = shape.num_attention_heads // groups
        by_group = ours.view(groups, (queries + 2) * head, *ours.shape[1:])
        parts = by_group.split([queries * head, head, head], 1)
        return [part.reshape(-1, *ours.shape[1:]) for part in parts]

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        groups, rest = shape.num_query_groups, theirs[0].shape[1:]
        return [torch.cat([part.reshape(groups, -1, *rest) for part in theirs], 1).reshape(-1, *rest)]


@dataclass(frozen=True)
class ConcatenatedQKV:
    """All queries, all keys, all values, in one tensor of theirs."""

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [ours]

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return [torch.cat(GroupedQKV(("q", "k", "v")).split(ours, shape))]

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        keys = shape.num_query_groups * shape.head_dim
        parts = theirs[0].split([shape.num_attention_heads * shape.head_dim, keys, keys])
        return GroupedQKV(("q", "k", "v")).join(list(parts), shape)


class ZeroBias(GroupedQKV):
    """Biases of zero, made of our weight of query, key and value, for an architecture that must have some."""

    def shapes(self, ours: Size, shape: Shape) -> list[Size]:
        return [size[:1] for size in super().shapes(ours, shape)]

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return [ours.new_zeros(size) for size in self.shapes(tuple(ours.shape), shape)]


class SwappedHalves(Same):
    """[h, 2h] whose input has its halves in the other order: hidden state first, embedding second."""

    def split(self, ours: Tensor, shape: Shape) -> list[Tensor]:
        return [torch.cat(list(ours.chunk(2, 1))[::-1], 1)]

    def join(self, theirs: list[Tensor], shape: Shape) -> list[Tensor]:
        return self.split(theirs[0], shape)


Layout = Same | Stacked | GroupedQKV | ConcatenatedQKV
Table = dict[str, Layout]
"""From our names, without what says which layer, to layouts of theirs."""


def prefixed(layout: Layout, prefix: str) -> Layout:
    """The same layout of names that start with a prefix."""
    names = tuple(prefix + name for name in layout.names)
    return type(layout)(names[0] if isinstance(layout, Same | ConcatenatedQKV) else names)  # pyright: ignore
