"""Output layer, cross-entropy and distillation of all heads together, never holding more than a chunk of logits.

The walk goes over chunks of *target* positions (`walk.py`). At target j the main head's logits serve its own
cross-entropy and are the teacher of every head; the logits of head k for the same token come from its hidden state at
the source position j - k. So hidden states are shifted, never logits, and the teacher's softmax and top-N set are made
once.

Gradients are taken in the forward pass, while a chunk's logits are at hand, for an upstream gradient of 1; backward
multiplies them by the one number that the upstream gradient is (see `eager.attach_heads_loss`). Recomputing the logits
in backward would cost a fourth matrix product beside the three that a head needs (1.39 times the section's CPU time,
measured at 1,024 tokens, hidden 512, V = 32,768, 4 heads), and would save only the buffer of the weight's gradient
between the two passes, which follow each other on the stage that has the output layer.

The contract is that of `eager.mtpd_loss`, with hidden states and the weight in the place of logits. Deliberately
absent: context parallelism (`halo.py` lays a rank's part out as whole sequences) and a bias of the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import objectives
from megatron_mtpd.losses.alignment import shift_left
from megatron_mtpd.losses.eager import HeadWeights
from megatron_mtpd.losses.hidden import gather_sequences
from megatron_mtpd.losses.kernels import Choice, choose
from megatron_mtpd.losses.precomputed import Deliver, Precomputed
from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.losses.rows import RowLosses, RowWeights
from megatron_mtpd.losses.vocab_parallel import Group
from megatron_mtpd.losses.walk import Gradients, Inputs, logits_dtype, walk


def fused_mtpd_loss(
    main: Tensor,
    for_ce: Sequence[Tensor],
    for_kd: Sequence[Tensor],
    output_weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    masks: Tensor,
    weights: HeadWeights,
    config: MTPDConfig,
    tp_group: Group = None,
    *,
    sequence_parallel: bool = False,
    logit_scale: float = 1.0,
    accumulate_into_main_grad: bool = False,
    chunk_rows: int | None = None,
    kernels: Choice | None = None,
) -> tuple[Tensor, Tensor, LossReport]:
    """Per-token loss of the main head, the sum of all terms of the heads, and the report.

    Args:
        main: hidden states of the main model after its final norm, [s, b, h], or [s / tp, b, h] if `sequence_parallel`.
        for_ce, for_kd: of each head, equal in value: two lists so that a caller can let the gradients of cross-entropy
            and of distillation go different ways. Usually the same tensors, which costs less.
        output_weight: [V / tp, h], this rank's rows. Without `requires_grad`, no gradient of it is computed.
        labels: int64 [s, b], the main head's: token j + 1 at position j.
        loss_mask: [s, b] of 0 and 1.
        masks: [K, s, b] of 0 and 1, from `alignment.head_masks`, of whole sequences.
        config: its `ce_output_share` and `kd_output_share` scale the heads' gradients of `output_weight`.
        logit_scale: logits are this times hidden states times weight.
        accumulate_into_main_grad: where `output_weight` has a `main_grad`, add its gradient there in backward, as
            Megatron's layers do when gradient accumulation is fused.
        chunk_rows: rows of logits, of all heads, that are held at a time. None: a default of the device.
        kernels: which kernels run, see `kernels.choose`. None: as the environment says, or by the device.

    Returns:
        `main_loss` [s, b] fp32 (fp64 for a weight of fp64), not masked; `heads_loss` [], the same dtype; a detached
        `LossReport`. They must be reduced as `c * ((main_loss * loss_mask).sum() + heads_loss)` for some number c:
        `eager.attach_heads_loss` does that in Megatron's loop. Any other gradient, and a second backward, raise
        RuntimeError in backward.

    Logits have the dtype of `output_weight`; losses, softmaxes and the sum of the weight's gradients are fp32. Raises
    ValueError where shapes do not fit together.
    """
    _check_shapes(main, for_ce, for_kd, output_weight, labels, masks, tp_group if sequence_parallel else None)
    two_lists = any(x is not y for x, y in zip(for_ce, for_kd, strict=True))
    hidden = [main, *for_ce, *(for_kd if two_lists else [])]
    of_weight = torch.is_grad_enabled() and output_weight.requires_grad
    of_hidden = [torch.is_grad_enabled() and x.requires_grad for x in hidden]

    with torch.no_grad():
        dtype = logits_dtype(output_weight)
        loss_mask, masks = loss_mask.to(dtype), masks.to(dtype)
        main_tokens, tokens = loss_mask.sum(), masks.flatten(1).sum(1)
        scale = weights.scale(main_tokens, tokens)
        alpha, beta = (scale * scale.new_tensor(w) for w in (weights.alpha, weights.beta))
        inputs = Inputs(
            gather_sequences([main, *for_ce], tp_group, sequence_parallel),
            output_weight.detach(),
            labels.flatten(),
            _is_live(loss_mask, masks),
            labels.shape[1],
            config,
            choose(output_weight.device, kernels),
            tp_group,
            logit_scale,
            chunk_rows,
        )
        gradients = row_weights = None
        if of_weight or any(of_hidden):
            shares = (config.ce_output_share, config.kd_output_share)
            gradients = Gradients(inputs, shares, two_lists, of_weight, of_hidden)
            kd = None
            if config.objective == "e2e_tv" and any(weights.beta):
                alphas = _to_sources(walk(inputs).overlap_kd, masks)
                kd = -_gradient_of_e2e_tv(alphas, masks) * (scale[0] * scale.new_tensor(weights.beta).sum())
            elif any(weights.beta):
                kd = beta.view(-1, 1, 1) * masks
            ce = torch.cat([loss_mask.flatten()[None], _to_targets(alpha.view(-1, 1, 1) * masks)])
            row_weights = RowWeights(ce, None if kd is None else _to_targets(kd))
        rows = walk(inputs, row_weights, gradients)
        main_loss, heads_loss, report = _reduce(rows, loss_mask, masks, scale, weights, config)

    if gradients is not None:
        precomputed = Precomputed(
            gradients, main.shape, loss_mask, tp_group, sequence_parallel, accumulate_into_main_grad
        )
        main_loss, heads_loss = Deliver.apply(main_loss, heads_loss, precomputed, output_weight, *hidden)
    return main_loss, heads_loss, report


def _check_shapes(
    main: Tensor,
    for_ce: Sequence[Tensor],
    for_kd: Sequence[Tensor],
    weight: Tensor,
    labels: Tensor,
    masks: Tensor,
    gather_group: Group,
) -> None:
    length = main.shape[0] * (gather_group.size() if gather_group is not None else 1)
    wrong = [f"head's {tuple(x.shape)}" for x in (*for_ce, *for_kd) if x.shape != main.shape]
    if main.ndim != 3 or wrong or (length, main.shape[1]) != labels.shape or main.shape[2] != weight.shape[1]:
        raise ValueError(
            f"Hidden states {tuple(main.shape)} {' '.join(wrong)}, output weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not fit: give [s, b, h], [V / tp, h] and [s, b], and with sequence parallelism "
            "hidden states of [s / tp, b, h]."
        )
    if not len(for_ce) == len(for_kd) == len(masks) > 0:
        raise ValueError(
            f"{len(for_ce)} and {len(for_kd)} hidden states of heads with {len(masks)} masks: give one of each a head."
        )


# From the source positions of a head to its targets and back -------------------------------------------------------


def _to_targets(x: Tensor) -> Tensor:
    """[K, s, b] by source -> [K, s * b] by target: what head k has at i goes to i + k."""
    return torch.stack(
        [torch.cat([torch.zeros_like(y[:k]), y[: max(0, len(y) - k)]]).flatten() for k, y in enumerate(x, 1)]
    )


def _to_sources(x: Tensor, like: Tensor) -> Tensor:
    """[K, s * b] by target -> [K, s, b] by source, zeros where there is no target."""
    return torch.stack([shift_left(y, k) for k, y in enumerate(x.view_as(like), 1)])


def _is_live(loss_mask: Tensor, masks: Tensor) -> Tensor:
    """bool [1 + K, s * b], by target: rows of which a loss counts."""
    return torch.cat([loss_mask.flatten()[None], _to_targets(masks)]) > 0


# Reductions over positions -----------------------------------------------------------------------------------------


def _gradient_of_e2e_tv(alphas: Tensor, masks: Tensor) -> Tensor:
    """Of the sum over all drafts, for each head's overlap. [K, s, b]."""
    with torch.enable_grad():
        alphas = alphas.requires_grad_()
        return torch.autograd.grad(objectives.e2e_tv(alphas, torch.cumprod(masks, 0)).sum(), alphas)[0]


def _reduce(
    rows: RowLosses, loss_mask: Tensor, masks: Tensor, scale: Tensor, weights: HeadWeights, config: MTPDConfig
) -> tuple[Tensor, Tensor, LossReport]:
    main_loss = rows.cross_entropy[0].view_as(loss_mask)
    cross_entropy, distillation, agree, overlap, overlap_kd = (
        _to_sources(x, masks) for x in (rows.cross_entropy[1:], *rows[1:])
    )
    cross_entropy = torch.where(masks > 0, cross_entropy, 0.0).flatten(1).sum(1)
    beta = scale.new_tensor(weights.beta)
    heads_loss = torch.dot(cross_entropy, scale * scale.new_tensor(weights.alpha))
    if config.objective == "e2e_tv":
        drafts = objectives.e2e_tv(overlap_kd, torch.cumprod(masks, 0))
        distillation = (drafts * masks).flatten(1).sum(1)  # of the drafts that head k takes part in
        heads_loss = heads_loss + drafts.sum() * scale[0] * beta.sum()
    else:
        distillation = torch.where(masks > 0, distillation, 0.0).flatten(1).sum(1)
        heads_loss = heads_loss + torch.dot(distillation, scale * beta)
    report = LossReport(
        main_loss=torch.where(loss_mask > 0, main_loss, 0.0).sum(),
        main_tokens=loss_mask.sum(),
        cross_entropy=cross_entropy,
        distillation=distillation,
        tokens=masks.flatten(1).sum(1),
        **_draft_sums(agree.to(masks.dtype), overlap, masks),
    )
    return main_loss, heads_loss, report


def _draft_sums(agree: Tensor, alpha: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The fields of `LossReport` from `drafted` on. All [K, s, b], by source."""
    chain_mask = torch.cumprod(masks, 0)
    chain, alpha_chain = torch.cumprod(agree, 0), torch.cumprod(alpha, 0)
    before = torch.cat([torch.ones_like(chain[:1]), chain[:-1]])

    def total(x: Tensor) -> Tensor:
        return torch.where(chain_mask > 0, x, 0.0).flatten(1).sum(1).float()

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
