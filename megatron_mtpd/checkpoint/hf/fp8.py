"""Weights in fp8 with a scale for each block of them, as DeepSeek-V3 is published: read as what they stand for.

A weight [rows, columns] in e4m3 has a tensor of fp32 beside it, `..._scale_inv` [rows / b, columns / b] rounded up, and
stands for weight * scale, block by block (config.json: `quantization_config`, `weight_block_size`). An export is not
quantised again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCALE = "_scale_inv"
Block = tuple[int, int]


def block_size(quantization: Any, where: str) -> Block | None:
    """Of the entry of config.json; None without one. Raises ValueError for any other quantisation."""
    if quantization is None:
        return None
    found = quantization if isinstance(quantization, dict) else vars(quantization)
    size = found.get("weight_block_size")
    if found.get("quant_method") != "fp8" or found.get("fmt", "e4m3") != "e4m3" or not size:
        raise ValueError(
            f"{where}: config.json has quantization_config {found}. Only blocks of fp8 (quant_method fp8, fmt e4m3, "
            "weight_block_size) can be read: take the model's weights in bf16, or dequantise them first."
        )
    return int(size[0]), int(size[1])


def scales_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Of the scales of a weight."""
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True))


def dequantised(rows: Tensor, first: int, scale: Tensor, block: Block) -> Tensor:
    """[n, columns] in e4m3, rows `first` and on of a weight, to what they stand for, fp32."""
    of_row = torch.arange(first, first + len(rows)) // block[0]
    return rows.float() * scale[of_row].repeat_interleave(block[1], 1)[:, : rows.shape[1]]
