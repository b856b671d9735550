"""What is trained and what is frozen (`--mtpd-train`), for heads that are added to a trained model.

A frozen part costs a forward pass and nothing else: its parameters have no gradient buffer and no optimizer state,
because Megatron builds both from what requires a gradient; it runs under no_grad, so that it keeps no activations and
computes no weight gradients; and it stays in evaluation mode, so that its dropout and auxiliary losses are off.

Deliberately absent: loading weights into the frozen parts, which is the checkpoint's business.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.model import MTPDModel


class _ZeroGradient(torch.autograd.Function):
    """`y`, with a gradient of zero for `x`: the pipeline stage before expects to be sent one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(ctx.saved_tensors[0]), None


def freeze(models: list[MTPDModel], config: MTPDConfig) -> list[MTPDModel]:
    """Freeze what `config.train` does not name, in the chunks of a model not yet wrapped. Returns the chunks.

    Raises ValueError when no head is left to train.
    """
    for model in models:
        for module in _frozen_modules(model, config):
            _freeze(module)
        if config.train != "all" and not model.pre_process:
            _answer_the_stage_before(model)
    return models


def _frozen_modules(model: MTPDModel, config: MTPDConfig) -> Iterable[nn.Module]:
    if config.train == "all":
        return
    for name in ("embedding", "decoder", "output_layer"):
        if hasattr(model, name):
            yield getattr(model, name)
    if config.train == "new-heads" and model.mtp_process:
        if config.old_heads >= len(model.mtp.layers):
            raise ValueError(
                f"--mtpd-old-heads is {config.old_heads} and the model has {len(model.mtp.layers)} heads: none is left "
                "to train. Extend the checkpoint first (tools/loop_extend.py), or lower the number."
            )
        yield from model.mtp.layers[: config.old_heads]


def _freeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.train(False)
    # Megatron calls model.train() after every validation; a frozen part does not follow.
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    if isinstance(module, ColumnParallelLinear):
        return  # the output layer passes the heads' gradients on, and computes none for its frozen weight
    module.forward = functools.wraps(module.forward)(torch.no_grad()(module.forward))


def _answer_the_stage_before(model: MTPDModel) -> None:
    decoder = model.decoder
    forward = decoder.forward

    @functools.wraps(forward)
    def answering(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)
        received = decoder.input_tensor
        return _ZeroGradient.apply(received, output) if torch.is_grad_enabled() and received.requires_grad else output

    decoder.forward = answering
