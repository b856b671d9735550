"""Which kernels compute the losses of a block of logits: torch's (`chunk.py`, `topn.py`) or Triton's.

The rule is `choose`: what the caller names; else what the environment variable MTPD_LOSS_KERNELS names; else, and for
"auto", Triton's for tensors on a GPU and torch's for others. What a process chooses is logged, once, and nothing falls
back in silence: where Triton is named and cannot run, that is an error, and where a GPU has no Triton, a warning.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_mtpd.losses import chunk, topn
from megatron_mtpd.losses.rows import RowLosses

Choice = Literal["auto", "torch", "triton"]
VARIABLE = "MTPD_LOSS_KERNELS"
logger = logging.getLogger(__name__)


class Kernels(NamedTuple):
    name: str
    block_losses: Callable[..., RowLosses]
    """Contract: `chunk.block_losses`."""
    topn_cut: Callable[..., Tensor]
    """Contract: `topn.topn_cut`."""
    in_registers: bool
    """Reads logits of any float dtype and makes no vocabulary-sized temporaries: a block may be as large as a chunk."""


TORCH = Kernels("torch", chunk.block_losses, topn.topn_cut, in_registers=False)


def choose(device: torch.device, choice: Choice | None = None) -> Kernels:
    """The kernels for tensors on `device`. Raises ValueError for an unknown choice, or Triton where it cannot run."""
    source = "kernels" if choice is not None else VARIABLE
    choice = choice or os.environ.get(VARIABLE) or "auto"  # type: ignore[assignment]
    if choice not in get_args(Choice):
        raise ValueError(f"{source} is {choice!r}: choose one of {', '.join(get_args(Choice))}.")
    has_triton = importlib.util.find_spec("triton") is not None
    runs_triton = has_triton and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if choice == "triton" and not runs_triton:
        why = f"the tensors are on {device.type}" if has_triton else "Triton is not installed"
        raise ValueError(f"{source} is 'triton', but {why}: use 'torch' or 'auto'.")
    if choice == "auto":
        choice = "triton" if device.type == "cuda" and has_triton else "torch"
        if device.type == "cuda" and not has_triton:
            _say(logging.WARNING, "Triton is not installed: the loss runs on torch's kernels, which take longer.")
    _say(logging.INFO if device.type == "cuda" else logging.DEBUG, f"Loss kernels on {device.type}: {choice}")
    return _triton() if choice == "triton" else TORCH


@functools.cache
def _triton() -> Kernels:
    from megatron_mtpd.losses import triton_chunk, triton_topn

    return Kernels("triton", triton_chunk.block_losses, triton_topn.topn_cut, in_registers=True)


@functools.cache
def _say(level: int, message: str) -> None:
    logger.log(level, message)
