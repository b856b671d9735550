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
    weights: Sequence[Mapping[str, Tensor]],
    final_norm: Mapping[str, Tensor],
    zeroed: Sequence[str],
) -> Plan:
    """The plan that gives each head its `weights` [out, in] (by the ends of the modules' names, each of which it has
    once), the values of `final_norm` (by the names of its parameters) as its own final norm, and zeros to all other
    tensors that have one of `zeroed` in their key.

    Raises what `make_plan` raises, and CheckpointError for heads that lack a tensor.
    """
    plan = make_plan(load, num_heads=len(weights), ckpt_step=ckpt_step)
    replaced: dict[str, Replacement] = {}
    missing = {(head, name) for head, named in enumerate(weights) for name in named}
    for key, tensor in plan.source.tensors.items():
        head = head_of(key)
        if head is None or is_optimizer(key):
            continue
        dtype, parameter = tensor.dtype, key.rpartition(".")[2]
        found = [name for name in weights[head] if key.endswith(f".{name}.weight")]
        if found:
            replaced[key] = partial(_part, weights[head][found[0]], dtype)
            missing.discard((head, found[0]))
        elif any(part in key for part in zeroed):
            replaced[key] = partial(_zeros, dtype)
        elif f"final_layernorm.{parameter}" in key:
            replaced[key] = partial(_part, final_norm[parameter], dtype)
    if missing:
        head, name = min(missing)
        raise CheckpointError(f"{plan.source.directory}: its head {head + 1} has no {name}.weight.")
    return Plan(plan.source, plan.sources, False, RELEASE, replaced)


def _part(values: Tensor, dtype: str, offset: tuple[int, ...], size: tuple[int, ...]) -> bytes:
    index = tuple(slice(first, first + length) for first, length in zip(offset, size, strict=True))
    buffer = io.BytesIO()
    torch.save(values[index].to("cpu", getattr(torch, dtype), copy=True).contiguous(), buffer)
    return buffer.getvalue()


def _zeros(dtype: str, offset: tuple[int, ...], size: tuple[int, ...]) -> bytes:
    return zeros(dtype, size)
