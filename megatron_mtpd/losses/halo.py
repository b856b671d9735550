"""The loss under context parallelism: each rank's part of the sequence, and the few positions that follow it.

Megatron deals a sequence in 2 C pieces to C ranks: rank r has pieces r and 2C - 1 - r. Heads look K positions ahead, so
a piece needs the labels, masks and teacher of the K positions after it, its *halo*, which the rank of the next piece
has. With it, a rank's two pieces are two short sequences of their own, laid side by side along the batch, and the loss
knows nothing of context parallelism:

    rank 0 of 2 has   p0 p1 | p6 p7          K = 1:    p0 p1 p2        halos: p2 from rank 1, none after the end
                      (pieces 0 and 3)                 p6 p7  .

What travels is K positions of each piece, once, in one call a tensor. It is a target's alone, detached as the teacher
is, so nothing travels in backward. No loss counts in a halo: its loss mask is 0 (`own`).

Deliberately absent: attention, and packed sequences.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.losses.vocab_parallel import Group


class Halo:
    """Pieces with the `size` positions after them. Without context parallelism (None, or a group of one), nothing is
    changed."""

    def __init__(self, size: int, cp_group: Group) -> None:
        self.size = size
        self.group = cp_group if cp_group is not None and cp_group.size() > 1 else None

    def extend(self, x: Tensor) -> Tensor:
        """[2 n, b, ...], this rank's two pieces -> [n + size, 2 b, ...], with what follows each; zeros after the end.

        Raises ValueError where a piece is shorter than the halo.
        """
        if self.group is None:
            return x
        pieces = self._side_by_side(x)
        return torch.cat([pieces, self._next_positions(x).to(x.dtype)])

    def pad(self, x: Tensor) -> Tensor:
        """The same layout, with zeros in the halo: for what is never a target."""
        if self.group is None:
            return x
        pieces = self._side_by_side(x)
        return torch.cat([pieces, pieces.new_zeros(self.size, *pieces.shape[1:])])

    def own(self, mask: Tensor) -> Tensor:
        """`mask` [..., n + size, 2 b], 0 in the halo."""
        if self.group is None:
            return mask
        is_own = torch.arange(mask.shape[-2], device=mask.device) < mask.shape[-2] - self.size
        return mask * is_own.unsqueeze(-1).to(mask.dtype)

    def restore(self, x: Tensor) -> Tensor:
        """[n + size, 2 b, ...] -> [2 n, b, ...]: the pieces one after the other again, without their halos."""
        if self.group is None:
            return x
        x = x[: len(x) - self.size]
        return x.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)

    def _side_by_side(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)

    @torch.no_grad()
    def _next_positions(self, x: Tensor) -> Tensor:
        assert self.group is not None
        pieces = x.detach().unflatten(0, (2, -1))
        if pieces.shape[1] < self.size:
            raise ValueError(
                f"--context-parallel-size {self.group.size()} cuts the sequence into pieces of {pieces.shape[1]} "
                f"positions, fewer than the {self.size} heads look ahead: lower it."
            )
        firsts = pieces[:, : self.size].contiguous()
        if firsts.dtype == torch.bool:
            firsts = firsts.to(torch.uint8)  # not every backend sends bool
        ranks, rank = self.group.size(), self.group.rank()
        everyone = firsts.new_empty(ranks * len(firsts), *firsts.shape[1:])
        dist.all_gather_into_tensor(everyone, firsts, group=self.group)
        early, late = everyone.unflatten(0, (ranks, 2)).unbind(1)  # first positions of pieces r, of pieces 2C - 1 - r
        after_early = early[rank + 1] if rank + 1 < ranks else late[rank]
        after_late = late[rank - 1] if rank else torch.zeros_like(late[0])
        return torch.cat([after_early, after_late], 1)
