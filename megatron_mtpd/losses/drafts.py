"""What a head drafts, for training on its own drafts: the tokens it ranks highest, and the positions that use them.

The drafts of a sequence are found chunk by chunk from its hidden states, so that its logits are never held. Nothing
here has a gradient. Deliberately absent: sampled drafts, and how a draft is fed to the next head (`model.py`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.losses.hidden import gather_sequences
from megatron_mtpd.losses.vocab_parallel import Group

CHUNK_LOGITS = 1 << 25
"""Logits that are held at a time: rows enough for an efficient matrix product, few beside the sequence."""


@torch.no_grad()
def draft_tokens(
    hidden: Tensor,
    output_weight: Tensor,
    tp_group: Group = None,
    *,
    sequence_parallel: bool = False,
    chunk_rows: int | None = None,
) -> Tensor:
    """The token that a head ranks highest at every position, the lowest id among equals. -> int64 [s, b].

    The same as `(hidden @ full_output_weight.t()).argmax(-1)`, on whole sequences and equal on all ranks.

    Args:
        hidden: the head's hidden states after its final norm, [s, b, h], or [s / tp, b, h] if `sequence_parallel`.
        output_weight: [V / tp, h], this rank's rows; logits have its dtype.
        chunk_rows: positions whose logits are held at a time. None: as many as make `CHUNK_LOGITS`.
    """
    (rows,) = gather_sequences([hidden], tp_group, sequence_parallel)
    size = len(output_weight)
    chunks = rows.split(chunk_rows or max(1, CHUNK_LOGITS // size))
    parts = [(rows @ output_weight.t()).max(-1) for rows in chunks]  # the first of equals, and of NaNs
    token = torch.cat([part.indices for part in parts])
    if tp_group is not None and tp_group.size() > 1:
        logit = torch.cat([part.values for part in parts])
        highest = logit.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=tp_group)
        last = tp_group.size() * size - 1  # where no rank has the highest: it is NaN, and the loss will say so
        token = torch.where(logit == highest, token + tp_group.rank() * size, last)
        dist.all_reduce(token, op=dist.ReduceOp.MIN, group=tp_group)
    return token.view(-1, hidden.shape[1])


def on_policy_positions(length: int, fraction: float, iteration: int, cp_group: Group = None) -> Tensor:
    """True at the positions where heads are fed drafts. bool [length], on the CPU.

    Each with probability `fraction`. It follows from the arguments alone: the same positions of a sequence on all
    ranks, in every parallel layout and after a checkpoint is loaded. With context parallelism, `length` positions are
    this rank's, in Megatron's order: of 2 C pieces, the r-th from the front and the r-th from the end.
    """
    generator = torch.Generator().manual_seed(iteration)
    ranks, rank = (1, 0) if cp_group is None else (cp_group.size(), cp_group.rank())
    drawn = torch.rand(ranks * length, generator=generator) < fraction
    if ranks == 1:
        return drawn
    pieces = drawn.chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[-1 - rank]])
