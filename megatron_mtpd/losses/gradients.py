"""`scale_gradient`: the identity whose gradient is multiplied by a share. The boundary of all gradient shares."""

from __future__ import annotations

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.share, None


def scale_gradient(x: Tensor, share: float) -> Tensor:
    """`x` with its gradient times `share` (0 to 1). At 1 it is `x`, at 0 it is `x.detach()`: neither costs anything."""
    if share == 1.0:
        return x
    return x.detach() if share == 0.0 else _ScaleGradient.apply(x, share)
