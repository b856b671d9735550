"""The seam of the fused loss with autograd: gradients that were taken in the forward pass, delivered in backward.

They were taken for an upstream gradient of 1. Backward checks that the one it gets is a number times the loss mask, for
the main head's losses, and the same number for the sum of the heads' terms, and multiplies by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mtpd.losses.hidden import reduce_gradients
from megatron_mtpd.losses.vocab_parallel import Group
from megatron_mtpd.losses.walk import Gradients


@dataclass
class Precomputed:
    """The gradients of this rank's slice of the vocabulary, and what it takes to deliver them."""

    gradients: Gradients
    hidden_shape: torch.Size
    """Of a rank's hidden states, [s, b, h] or [s / tp, b, h]."""
    loss_mask: Tensor
    tp_group: Group
    sequence_parallel: bool
    accumulate_into_main_grad: bool


class Deliver(torch.autograd.Function):
    """(main_loss, heads_loss, Precomputed, weight, *hidden states) -> (main_loss, heads_loss) with their gradients."""

    @staticmethod
    def forward(ctx, main_loss: Tensor, heads_loss: Tensor, precomputed: Precomputed, weight: Tensor, *hidden: Tensor):
        ctx.precomputed, ctx.weight, ctx.num_hidden = precomputed, weight, len(hidden)
        return main_loss.view_as(main_loss), heads_loss.view_as(heads_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_main: Tensor, of_heads: Tensor):
        if ctx.precomputed is None:
            raise RuntimeError(
                "The fused loss holds its gradients once: a second backward needs a second forward pass."
            )
        p, ctx.precomputed = ctx.precomputed, None
        torch._assert_async(
            ((of_main - of_heads * p.loss_mask).abs() <= 1e-4 * of_heads.abs()).all(),
            "The gradient of the fused loss must be one number times the loss mask for the main head's losses, and the "
            "same number for the sum of the heads' terms (see attach_heads_loss).",
        )
        hidden = p.gradients.hidden.mul_(of_heads)
        hidden = reduce_gradients(hidden, p.hidden_shape, p.tp_group, p.sequence_parallel)
        weight, p.gradients.weight = p.gradients.weight, None
        if weight is not None:
            weight = _deliver(ctx.weight, weight.mul_(of_heads), p.accumulate_into_main_grad)
        needed = ctx.needs_input_grad[4:]
        return None, None, None, weight, *(x if wanted else None for x, wanted in zip(hidden, needed, strict=True))


def _deliver(weight: Any, gradient: Tensor, accumulate_into_main_grad: bool) -> Tensor | None:
    """What backward returns for the weight, in Megatron's convention for `main_grad`.

    A weight with `grad_added_to_main_grad` expects to be told, and a gradient of its shape to run its hooks with:
    zeros, which are right as well where other gradients are added to it (tied embeddings).
    """
    if not (accumulate_into_main_grad and hasattr(weight, "main_grad")):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
