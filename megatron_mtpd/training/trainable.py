"""What is trained and what is frozen (`--mtpd-train`), for heads that are added to a trained model.

A frozen part costs a forward pass and nothing else: its parameters have no gradient buffer and no optimizer state,
because Megatron builds both from what requires a gradient; it runs under no_grad, so that it keeps no activations and
computes no weight gradients; and it stays in evaluation mode, so that its dropout and auxiliary losses are off. Its
hidden states reach the loss as numbers, so that no gradient of their logits is computed; their own losses are, because
the reports of the heads behind them are conditional on theirs.

Deliberately absent: loading weights into the frozen parts, which is the checkpoint's business.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_mtpd.checkpoint.common_state import read_common_state
from megatron_mtpd.checkpoint.iterations import read_tracker, resolve
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata
from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.model import MTPDModel


class _ZeroGradient(torch.autograd.Function):
    """`y`, with a gradient of zero for `x` beside its own: the pipeline stage before expects to be sent one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(ctx.saved_tensors[0]), grad


def settle_old_heads(args: Namespace) -> None:
    """Fill in `--mtpd-old-heads` from the checkpoint that is loaded: looped extension stores it there.

    Raises ValueError where the flag would freeze heads that are copies still to be trained.
    """
    stored = _stored_old_heads(args) if args.mtpd_train == "new-heads" else 0
    if stored and args.mtpd_old_heads > stored:
        raise ValueError(
            f"--mtpd-old-heads is {args.mtpd_old_heads}, but the checkpoint was extended from {stored} heads: head "
            f"{stored + 1} would stay an untrained copy. Leave the flag out."
        )
    args.mtpd_old_heads = args.mtpd_old_heads or stored


def _stored_old_heads(args: Namespace) -> int:
    for root in (args.load, args.pretrained_checkpoint):  # the order in which Megatron looks
        try:
            if root is not None and read_tracker(Path(root)) is not None:
                directory = resolve(Path(root), args.ckpt_step)[1]
                return read_common_state(read_metadata(directory)).args.get("mtpd_old_heads") or 0
        except CheckpointError:  # loading it says what is wrong, and what to do instead
            return 0
    return 0


def freeze(models: list[MTPDModel], config: MTPDConfig) -> list[MTPDModel]:
    """Freeze what `config.train` does not name, in the chunks of a model not yet wrapped. Returns the chunks.

    Raises ValueError when no head is left to train.
    """
    for model in models:
        for module in _frozen_modules(model, config):
            _freeze(module)
        if config.train != "all" and model.mtp_process:
            _detach_from_the_loss(model, config.old_heads)
        elif config.train != "all" and not model.pre_process:
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


def _detach_from_the_loss(model: MTPDModel, old_heads: int) -> None:
    """Give the loss the hidden states of the main model and of the first heads without a graph.

    They would have one, which leads nowhere: the heads' block stacks all hidden states into one tensor.
    """
    of_all_heads = model.hidden_states_of_all_heads

    @functools.wraps(of_all_heads)
    def detached(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        main, for_ce, for_kd = of_all_heads(*args, **kwargs)
        for heads in (for_ce,) if for_kd is for_ce else (for_ce, for_kd):
            heads[:old_heads] = [hidden.detach() for hidden in heads[:old_heads]]
        if not model.pre_process:
            for_ce[-1] = _with_answer(model, for_ce[-1])
        return main.detach(), for_ce, for_kd

    model.hidden_states_of_all_heads = detached  # type: ignore[method-assign]


def _answer_the_stage_before(model: MTPDModel) -> None:
    forward = model.decoder.forward

    @functools.wraps(forward)
    def answering(*args: Any, **kwargs: Any) -> Tensor:
        return _with_answer(model, forward(*args, **kwargs))

    model.decoder.forward = answering


def _with_answer(model: MTPDModel, output: Tensor) -> Tensor:
    received = model.decoder.input_tensor
    return _ZeroGradient.apply(received, output) if torch.is_grad_enabled() and received.requires_grad else output
