"""Attention over a cache of keys and values.

Contract: a pass stores the keys and values of its positions in a `KVCache`, and `attend` lets its queries see what the
pass's `Window` leaves visible of everything stored.

Deliberately absent: paging, and quantised or sliding-window caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Window:
    """The positions that one pass computes.

    Attributes:
        slots: the rows of the caches, one for each row of the batch.
        rows: int64 [b, 1], 0 .. b - 1.
        positions: int64 [b, s]. Each row increases; what is beyond its end repeats the cache's last position, which is
            never visible.
        visible: number of positions, from the first, that any query of the pass may see; None: every row starts at
            position 0, so that the pass's own keys are all that there is.
        mask: bool [b, 1, s, visible], True where a key is not to be seen; None with `visible` None, and where
            one position alone sees all of it.
    """

    slots: slice
    rows: Tensor
    positions: Tensor
    visible: int | None
    mask: Tensor | None
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, [b, 1, repeats * s, visible]. Made once for all layers of a pass."""
        assert self.mask is not None, "where everything is seen there is nothing to add"
        if (repeats, dtype) not in self._biases:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._biases[repeats, dtype] = bias.masked_fill_(self.mask, float("-inf")).repeat(1, 1, repeats, 1)
        return self._biases[repeats, dtype]


class KVCache:
    """Keys and values of one attention layer, [slots, capacity, groups, d] each, made at the first pass.

    What has to be forgotten needs no erasing: a later pass writes over it, and until then no mask shows it.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self._shape = (slots, capacity)
        self.keys = self.values = torch.empty(0)

    def store(self, window: Window, key: Tensor, value: Tensor) -> None:
        """Keep [s, b, groups, d] at a window's positions."""
        if not self.keys.numel():  # zeros, not empty: a masked NaN times a weight of 0 would still be NaN
            self.keys = key.new_zeros(*self._shape, *key.shape[2:])
            self.values = torch.zeros_like(self.keys)
        for stored, new in ((self.keys, key), (self.values, value)):
            stored[window.slots].index_put_((window.rows, window.positions), new.transpose(0, 1))

    def seen(self, window: Window) -> tuple[Tensor, Tensor]:
        """The keys and values that any query of a window may see, [b, groups, visible, d]."""
        rows = (window.slots, slice(window.visible))
        return self.keys[rows].transpose(1, 2), self.values[rows].transpose(1, 2)

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        if self.keys.numel():
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]


def attend(query: Tensor, cache: KVCache, window: Window, scale: float) -> Tensor:
    """Attention of a pass, whose keys and values the cache has stored with those before them.

    Args:
        query: [s, b, groups, heads of a group, d].
        scale: of the scores, before the softmax.

    Returns: [s, b, heads * d].
    """
    s, b, groups, shared, d = query.shape
    # A group's heads as more positions of one head: a copy of the few queries, not of the cache for each head.
    query = query.permute(1, 2, 3, 0, 4).flatten(2, 3)
    bias = None if window.mask is None else window.bias(shared, query.dtype)
    out = scaled_dot_product_attention(query, *cache.seen(window), attn_mask=bias, scale=scale)
    return out.view(b, groups, shared, s, d).permute(3, 0, 1, 2, 4).flatten(2)
