"""The MTP-D loss on materialised logits: the reference, and the path that needs nothing but autograd.

    L = CE(main) + sum_k [ alpha_k CE(head k) + beta_k D_k ]            (arXiv 2603.23911; D_k: see objectives.py)

Reduction. Megatron's loss function sums the returned per-token losses times the loss mask and divides by the number of
tokens, so the terms of the heads are returned as sums on that scale: each head's mean over its own targets times the
number of unmasked tokens of the main head (`per_head_mean`, as Megatron does), or plainly its sum. The plain sum is for
`--calculate-per-token-loss`, where one division by the tokens of the *global* batch follows: it does not depend on how
the batch is split, whereas a local ratio does.

Deliberately absent: hidden states, output layers and process groups other than the vocabulary's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import objectives
from megatron_mtpd.losses.alignment import Shift, shift_left
from megatron_mtpd.losses.report import LossReport, acceptance
from megatron_mtpd.losses.vocab_parallel import Group


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads' terms, each of length K: `alpha` of cross-entropy, `beta` of distillation (0: not
    computed)."""

    alpha: Sequence[float]
    beta: Sequence[float]
    per_head_mean: bool = True
    count_group: Group = None
    """Ranks that hold parts of the same sequences: a mean of a head is over all their tokens."""

    def scale(self, main_tokens: Tensor, tokens: Tensor) -> Tensor:
        """[] and [K] tokens of main head and heads -> [K]: what each head's sum is multiplied by."""
        if not self.per_head_mean:
            return torch.ones_like(tokens)
        if self.count_group is not None:
            counts = torch.cat([main_tokens[None], tokens])
            dist.all_reduce(counts, group=self.count_group)
            main_tokens, tokens = counts[0], counts[1:]
        return main_tokens / tokens.clamp(min=1)


def mtpd_loss(
    main_logits: Tensor,
    ce_logits: Sequence[Tensor],
    kd_logits: Sequence[Tensor],
    labels: Tensor,
    loss_mask: Tensor,
    masks: Tensor,
    weights: HeadWeights,
    config: MTPDConfig,
    tp_group: Group = None,
    shift: Shift = shift_left,
) -> tuple[Tensor, Tensor, LossReport]:
    """Per-token loss of the main head, the sum of all terms of the heads, and the report.

    Args:
        main_logits: [s, b, V / tp], any float dtype.
        ce_logits, kd_logits: of each head, [s, b, V / tp]: equal in value; two lists so that a caller can let the
            gradients of cross-entropy and of distillation go different ways. Usually the same list.
        labels: int64 [s, b], the main head's: token j + 1 at position j.
        loss_mask: [s, b] of 0 and 1.
        masks: [K, s, b] of 0 and 1, from `alignment.head_masks`.

    Returns:
        `main_loss` [s, b] fp32, not masked; `heads_loss` [] fp32, to be added to `(main_loss * loss_mask).sum()`;
        a detached `LossReport`.
    """
    main_loss = objectives.cross_entropy(main_logits, labels, tp_group)
    loss_mask, masks = loss_mask.to(main_loss.dtype), masks.to(main_loss.dtype)
    main_tokens, tokens = loss_mask.sum(), masks.flatten(1).sum(1)
    scale = weights.scale(main_tokens, tokens)

    # A masked position may hold inf or nan. It is emptied before any arithmetic: 0 * nan would return in the gradient.
    is_masked = (masks == 0).unsqueeze(-1)

    def usable(logits: Sequence[Tensor]) -> list[Tensor]:
        return [z.masked_fill(m, 0.0) for z, m in zip(logits, is_masked, strict=True)]

    teachers = usable([shift(main_logits.detach(), k) for k in range(1, len(ce_logits) + 1)])
    is_same = kd_logits is ce_logits
    ce_logits = usable(ce_logits)
    kd_logits = ce_logits if is_same else usable(kd_logits)

    cross_entropies = [objectives.cross_entropy(z, shift(labels, k), tp_group) for k, z in enumerate(ce_logits, 1)]
    cross_entropy = _masked_sums(cross_entropies, masks)
    heads_loss = torch.dot(cross_entropy, scale * scale.new_tensor(weights.alpha))
    # Where there is no weight, the distance to the main head is reported all the same, but no gradient is made.
    couples_heads = config.objective == "e2e_tv"
    has_weight = [any(weights.beta) if couples_heads else beta > 0 for beta in weights.beta]
    kd_logits = [z if w else z.detach() for z, w in zip(kd_logits, has_weight, strict=True)]
    beta = scale.new_tensor(weights.beta)
    if couples_heads:
        alphas = [
            objectives.overlap(*objectives.log_probabilities(t, z, config.temperature, tp_group), tp_group)
            for t, z in zip(teachers, kd_logits, strict=True)
        ]
        # One term couples the heads: it counts with the sum of their weights, over the drafts that head 1 makes.
        drafts = objectives.e2e_tv(torch.stack(alphas), torch.cumprod(masks, 0))
        distillation = (drafts * masks).flatten(1).sum(1)  # of the drafts that head k takes part in
        heads_loss = heads_loss + drafts.sum() * scale[0] * beta.sum()
    else:
        distances = [objectives.distillation(t, z, config, tp_group) for t, z in zip(teachers, kd_logits, strict=True)]
        distillation = _masked_sums(distances, masks)
        heads_loss = heads_loss + torch.dot(distillation, scale * beta)
    report = LossReport(
        main_loss=torch.where(loss_mask > 0, main_loss.detach(), 0.0).sum(),
        main_tokens=main_tokens,
        cross_entropy=cross_entropy.detach(),
        distillation=distillation.detach(),
        tokens=tokens,
        **acceptance(teachers, [z.detach() for z in ce_logits], masks, tp_group),
    )
    return main_loss, heads_loss, report


def _masked_sums(losses: list[Tensor], masks: Tensor) -> Tensor:
    return (torch.stack(losses) * masks).flatten(1).sum(1)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, main_loss: Tensor, loss_mask: Tensor, heads_loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss_mask)
        return main_loss.view_as(main_loss)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (mask,) = ctx.saved_tensors
        mask = mask.to(grad.dtype)
        scale = (grad * mask).sum() / (mask * mask).sum().clamp(min=1)
        torch._assert_async(
            ((grad - scale * mask).abs() <= 1e-4 * scale.abs()).all(),
            "The gradient of the per-token losses must be one number times the loss mask (as Megatron's loss function "
            "gives): the heads' losses are scaled by that number.",
        )
        return grad, None, scale


def attach_heads_loss(main_loss: Tensor, loss_mask: Tensor, heads_loss: Tensor) -> Tensor:
    """`main_loss`, carrying `heads_loss` into backward.

    For a caller that reduces per-token losses as `c * (losses * loss_mask).sum()`, the gradients are those of
    `c * ((losses * loss_mask).sum() + heads_loss)`, whatever c is (token count, micro-batches, loss scale). Raises
    RuntimeError in backward when the upstream gradient is not of that form; on a GPU that is an assertion on the
    device, which shows at the next synchronisation and without the message. Shapes: same, same, [].
    """
    return _Attach.apply(main_loss, loss_mask, heads_loss)
