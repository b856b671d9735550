"""What one micro-batch says about the main head and each head: sums and counts, so that reports add up.

Sums over micro-batches and ranks, divided at the end, give exact means whatever the batch was split into.
Acceptance here is teacher-forced: heads see the true tokens, and a draft is accepted where the *main head* agrees.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mtpd.losses.objectives import log_probabilities, overlap
from megatron_mtpd.losses.vocab_parallel import Group, vocab_argmax


class LossReport(NamedTuple):
    """Sums over the positions of a micro-batch, fp32. K heads; a *draft* starts at every position."""

    main_loss: Tensor
    """[] cross-entropy of the main head, in nats."""
    main_tokens: Tensor
    """[] unmasked positions of the main head."""
    cross_entropy: Tensor
    """[K] in nats, without its weight alpha."""
    distillation: Tensor
    """[K] the objective, without its weight beta."""
    tokens: Tensor
    """[K] positions where head k has a target."""
    drafted: Tensor
    """[K] of the positions where heads 1..k all have a target: the drafts of length k."""
    accepted: Tensor
    """[K] drafts whose k-th token is the main head's argmax at its target."""
    reached: Tensor
    """[K] drafts whose first k - 1 tokens are all accepted."""
    cumulative: Tensor
    """[K] drafts whose first k tokens are all accepted."""
    overlap: Tensor
    """[K] sum of alpha_k = sum_v min(p, q): expected acceptances of head k when drafts are sampled."""
    cumulative_overlap: Tensor
    """[K] sum of alpha_1 * ... * alpha_k."""
    tokens_per_step: Tensor
    """[] over the drafts of full length K: 1 + the number of tokens accepted before the first rejection."""
    tokens_per_step_sampled: Tensor
    """[] the same when drafts are sampled: 1 + sum_k alpha_1 * ... * alpha_k. Both: divide by `drafted[-1]`."""


@torch.no_grad()
def acceptance(
    teachers: list[Tensor], students: list[Tensor], masks: Tensor, tp_group: Group = None
) -> dict[str, Tensor]:
    """The fields of `LossReport` from `drafted` on.

    `teachers[k - 1]`, `students[k - 1]`: [s, b, V / tp] logits for the same targets; `masks` [K, s, b].
    """
    chain_mask = torch.cumprod(masks, 0)
    agree = torch.stack(
        [(vocab_argmax(t, tp_group) == vocab_argmax(z, tp_group)) for t, z in zip(teachers, students, strict=True)]
    ).to(masks.dtype)
    alpha = torch.stack(
        [overlap(*log_probabilities(t, z, 1.0, tp_group), tp_group) for t, z in zip(teachers, students, strict=True)]
    )
    chain = torch.cumprod(agree, 0)
    before = torch.cat([torch.ones_like(chain[:1]), chain[:-1]])

    def total(x: Tensor) -> Tensor:
        # where() and not a product: a masked position may hold inf or nan.
        return torch.where(chain_mask > 0, x, 0.0).flatten(1).sum(1).float()

    alpha_chain = torch.cumprod(alpha, 0)
    return {
        "drafted": total(torch.ones_like(chain)),
        "accepted": total(agree),
        "reached": total(before),
        "cumulative": total(chain),
        "overlap": total(alpha),
        "cumulative_overlap": total(alpha_chain),
        "tokens_per_step": total((1 + chain.sum(0)).expand_as(chain))[-1],
        "tokens_per_step_sampled": total((1 + alpha_chain.sum(0)).expand_as(chain))[-1],
    }
