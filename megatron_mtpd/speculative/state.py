"""What a batch keeps between steps: tokens, lengths, and the caches of the main model and of every head.

A *slot* is the place of one sequence in all of these. Active sequences fill the first slots; one that ends gives its
place to the last. Lengths live on the host, which knows them anyway to see what has ended.

Deliberately absent: the model; `decoder` runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mtpd.speculative.attention import KVCache, Window


class State:
    """Memory of `slots` sequences of up to `capacity` tokens, drafts included.

    Attributes:
        tokens: int64 [slots, capacity]: the committed tokens, then the drafts of this step.
        lengths: int64 [slots] on the CPU: committed tokens.
        valid: int64 [depths, slots] on the CPU: how many entries, from position 0, of the main model (depth 0) and of
            head k (depth k) were computed from committed tokens alone.
        caches: one `KVCache` for each attention layer of each depth.
        hidden: [slots, capacity, h] for each depth but the last: what it hands to the next one. Made at the first use.
    """

    def __init__(self, slots: int, capacity: int, num_layers: list[int], device: torch.device) -> None:
        depths = len(num_layers)
        # One more position than can be reached: padding of short rows is written there.
        self.slots, self.capacity, self.device = slots, capacity, device
        self.tokens = torch.zeros(slots, capacity + 1, dtype=torch.int64, device=device)
        self._rows = torch.arange(slots, device=device).unsqueeze(1)
        self._positions = torch.arange(capacity, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.valid = torch.zeros(depths, slots, dtype=torch.int64)
        self.caches = [[KVCache(slots, capacity + 1) for _ in range(n)] for n in num_layers]
        self.hidden: list[Tensor | None] = [None] * (depths - 1)

    def window(self, slots: slice, start: Tensor, stop: Tensor) -> Window:
        """The positions [start, stop) of each slot, int64 [b] on the CPU, padded to the longest."""
        width = int((stop - start).max())
        positions = start.unsqueeze(1) + torch.arange(width)
        positions = torch.where(positions < stop.unsqueeze(1), positions, self.capacity).to(self.device)
        rows = self._rows[: len(start)]
        if not bool(start.any()):
            return Window(slots, rows, positions, None, None)
        visible = int(stop.max())
        if positions.numel() == 1:  # the last position of one sequence sees everything
            return Window(slots, rows, positions, visible, None)
        mask = self._positions[:visible] > positions.unsqueeze(-1)
        return Window(slots, rows, positions, visible, mask.unsqueeze(1))

    def store_hidden(self, depth: int, window: Window, values: Tensor) -> None:
        """Keep [s, b, h] of a window, if a next depth needs it."""
        if depth < len(self.hidden):
            store = self._store(depth, values)
            store[window.slots].index_put_((window.rows, window.positions), values.transpose(0, 1))

    def store(self, depth: int, values: Tensor, slot: int) -> None:
        """Keep [s, h] of the first positions of a slot."""
        self._store(depth, values)[slot, : len(values)] = values

    def _store(self, depth: int, like: Tensor) -> Tensor:
        store = self.hidden[depth]
        if store is None:
            store = self.hidden[depth] = like.new_zeros(self.slots, self.capacity + 1, like.shape[-1])
        return store

    def stored(self, depth: int) -> Tensor:
        """All hidden states that a depth has handed on, [slots, capacity + 1, h]."""
        store = self.hidden[depth]
        assert store is not None, "the depth has run before"
        return store

    def hidden_at(self, depth: int, window: Window) -> Tensor:
        """[s, b, h] of a window."""
        return self.stored(depth)[window.slots][window.rows, window.positions].transpose(0, 1).contiguous()

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for tensor in (self.tokens, self.lengths, *(h for h in self.hidden if h is not None)):
            tensor[target] = tensor[source]
        self.valid[:, target] = self.valid[:, source]
        for cache in (cache for depth in self.caches for cache in depth):
            cache.move(source, target)
