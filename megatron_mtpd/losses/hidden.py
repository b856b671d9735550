"""Hidden states of all heads under tensor and sequence parallelism: brought together once, and their gradients back
once.

With tensor parallelism every rank has the whole sequence and finds the gradient that its slice of the vocabulary gives,
so gradients are summed over ranks. With sequence parallelism a rank has s / tp positions: all heads' are gathered in
one call before the loss, and their gradients summed and scattered in one call after it. All calls are of all heads
together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.losses.vocab_parallel import Group


def gather_sequences(hidden: Sequence[Tensor], tp_group: Group, sequence_parallel: bool) -> list[Tensor]:
    """Every position of every head: [s, b, h] each, or [s / tp, b, h] if `sequence_parallel`, -> [s * b, h] each."""
    if tp_group is None or tp_group.size() == 1 or not sequence_parallel:
        return [x.flatten(0, 1) for x in hidden]
    mine = torch.stack([x.detach() for x in hidden])
    everyone = mine.new_empty(tp_group.size() * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(everyone, mine, group=tp_group)
    return list(everyone.view(tp_group.size(), *mine.shape).transpose(0, 1).flatten(1, 3))


def reduce_gradients(gradients: Tensor, shape: torch.Size, tp_group: Group, sequence_parallel: bool) -> Tensor:
    """Gradients [n, s * b, h] of this rank's slice of the vocabulary -> [n, *shape], whole, of this rank's positions.

    `shape` is that of a rank's hidden states: [s, b, h], or [s / tp, b, h] if `sequence_parallel`.
    """
    if tp_group is None or tp_group.size() == 1:
        return gradients.view(-1, *shape)
    if not sequence_parallel:
        dist.all_reduce(gradients, group=tp_group)
        return gradients.view(-1, *shape)
    of_ranks = gradients.view(len(gradients), tp_group.size(), *shape).transpose(0, 1).contiguous()
    mine = of_ranks.new_empty(of_ranks.shape[1:])
    dist.reduce_scatter_tensor(mine, of_ranks.flatten(0, 1), group=tp_group)
    return mine
