"""Heads for a model that has none: copies of the trunk's last layer, or random ones.

A head computes `layer(eh_proj [enorm(embedding), hnorm(hidden)])`, normalises the result and hands it to the shared
output layer. As a copy of the last layer (`last-layer`), the layer is the trunk's last one, the final norm the trunk's,
and `eh_proj` adds its two inputs; every head is the same bytes, which training then tells apart. At random, linear
layers are normal with Megatron's standard deviations and norms are ones, as they start in a pretraining.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf.architectures import Architecture
from megatron_mtpd.checkpoint.hf.blocks import flat, ranges
from megatron_mtpd.checkpoint.hf.shape import EXPERT_BIAS, Shape
from megatron_mtpd.checkpoint.hf.torch_dist import Writer
from megatron_mtpd.checkpoint.metadata import ITEM_SIZES

STD = 0.02
_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def write_heads(writer: Writer, architecture: Architecture, shape: Shape, init: str, seed: int) -> None:
    """Add `shape.num_heads` heads to a checkpoint whose trunk is written. Raises ValueError for an unknown `init`."""
    if init not in ("last-layer", "random"):
        raise ValueError(f"--init {init}: choose last-layer or random.")
    random = torch.Generator().manual_seed(seed)
    last = 2 * (shape.num_layers - 1)
    block = [key for key, _ in architecture.block("{}.", 0, "")]
    for head in range(shape.num_heads):
        prefix = f"mtp.layers.{head}."
        if init == "last-layer" and head:
            for name in _parts(block):
                writer.alias(prefix + name, f"mtp.layers.0.{name}")
            continue
        for name in _parts(block):
            key = prefix + name
            if init == "last-layer" and name.startswith("mtp_model_layer."):
                layer, rest = name.removeprefix("mtp_model_layer.layers.").split(".", 1)
                writer.alias(key, f"decoder.layers.{last + int(layer)}.{rest}")
            elif init == "last-layer" and name == "final_layernorm.weight":
                writer.alias(key, "decoder.final_norm.weight")
            elif init == "last-layer" and name == "eh_proj.weight":
                writer.tensor(key, _blocks(key, shape, _adds_both), shape.size_of(key))
            else:
                writer.tensor(key, _blocks(key, shape, _fresh(name, shape, random)), shape.size_of(key))


def written_bytes(architecture: Architecture, shape: Shape, init: str) -> int:
    """About how many bytes `write_heads` will write: of copies, what the first head has that the trunk has not."""
    names = _parts([key for key, _ in architecture.block("{}.", 0, "")])
    if init == "last-layer":
        names = names[: names.index("eh_proj.weight") + 1]
    keys = [f"mtp.layers.{head}.{name}" for head in range(shape.num_heads) for name in names]
    size = sum(math.prod(shape.size_of(key)) * ITEM_SIZES[shape.dtype_of(key)] for key in keys)
    return size if init == "random" else size // max(1, shape.num_heads)


def _blocks(key: str, shape: Shape, make: Callable[[int, int, int], Tensor]) -> Iterator[Tensor]:
    """A tensor in blocks, of what `make` gives for first row, last row and width."""
    size, dtype = shape.size_of(key), getattr(torch, shape.dtype_of(key))
    for first, last in ranges(size, torch.float32.itemsize):
        yield make(first, last, flat(size)[2]).to(dtype)


def _adds_both(first: int, last: int, width: int) -> Tensor:
    """Rows of two identities side by side."""
    rows = torch.zeros(last - first, width)
    rows[:, first:last].fill_diagonal_(1.0)
    rows[:, width // 2 + first : width // 2 + last].fill_diagonal_(1.0)
    return rows


def _parts(block: list[str]) -> list[str]:
    """The names of all tensors of a head, without its prefix."""
    layers = [f"mtp_model_layer.layers.{key}" for key in block]
    return ["enorm.weight", "hnorm.weight", "eh_proj.weight", *layers, "final_layernorm.weight"]


def _fresh(name: str, shape: Shape, random: torch.Generator) -> Callable[[int, int, int], Tensor]:
    """What a tensor holds at the start of a pretraining."""
    if name.endswith((".bias", EXPERT_BIAS)):
        return lambda first, last, width: torch.zeros(last - first, width)
    if len(shape.size_of(name)) == 1:
        return lambda first, last, width: torch.ones(last - first, width)
    scale = STD / math.sqrt(2.0 * shape.num_layers) if name.endswith(_OUTPUTS) else STD
    return lambda first, last, width: torch.randn(last - first, width, generator=random) * scale
