"""The plan of a checkpoint whose heads get other weights, and whose trunk keeps its bytes.

What `speculative.fitting` finds goes into the tensors of the heads, in the chunks that they have; everything else is
what a looped extension to as many heads as there are would make of it: `extend.extend` writes it. The result is a
`release`: weights without optimizer state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_mtpd.checkpoint.iterations import RELEASE
from megatron_mtpd.checkpoint.looping import Plan, Replacement, make_plan, zeros
from megatron_mtpd.checkpoint.metadata import CheckpointError, head_of, is_optimizer


def plan_replacement(
    load: Path,
    ckpt_step: int | None,
    eh_proj: Sequence[Tensor],
    final_norm: Mapping[str, Tensor],
    zeroed: Sequence[str],
) -> Plan:
    """The plan that gives each head its `eh_proj` [h, 2h], the values of `final_norm` (by the names of its parameters)
    as its own final norm, and zeros to all tensors that have one of `zeroed` in their key.

    Raises what `make_plan` raises, and CheckpointError for heads that have no such tensors.
    """
    plan = make_plan(load, num_heads=len(eh_proj), ckpt_step=ckpt_step)
    replaced: dict[str, Replacement] = {}
    for key, tensor in plan.source.tensors.items():
        head = head_of(key)
        if head is None or is_optimizer(key):
            continue
        dtype, name = tensor.dtype, key.rpartition(".")[2]
        if any(part in key for part in zeroed):
            replaced[key] = partial(_zeros, dtype)
        elif key.endswith("eh_proj.weight"):
            replaced[key] = partial(_part, eh_proj[head], dtype)
        elif f"final_layernorm.{name}" in key:
            replaced[key] = partial(_part, final_norm[name], dtype)
    if not any(key.endswith("eh_proj.weight") for key in replaced):
        raise CheckpointError(f"{plan.source.directory}: its heads have no eh_proj.weight.")
    return Plan(plan.source, plan.sources, False, RELEASE, replaced)


def _part(values: Tensor, dtype: str, offset: tuple[int, ...], size: tuple[int, ...]) -> bytes:
    index = tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))
    buffer = io.BytesIO()
    torch.save(values[index].to("cpu", getattr(torch, dtype), copy=True).contiguous(), buffer)
    return buffer.getvalue()


def _zeros(dtype: str, offset: tuple[int, ...], size: tuple[int, ...]) -> bytes:
    return zeros(dtype, size)
