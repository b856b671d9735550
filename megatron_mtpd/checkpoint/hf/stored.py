"""The tensors of safetensors files where they lie, and their bytes from and to files.

A safetensors file is the length of its header, a JSON header, and the tensors' bytes. The library's own reader maps
files into memory, where all that was read counts as used, and its writer takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.metadata import ITEM_SIZES

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FP8 = "float8_e4m3fn"
_NAMES: dict[str, str] = {name: dtype for dtype, name in DTYPES.items()} | {"F8_E4M3": FP8}
PIECE = 256 << 10
"""Bytes of a write. For more at once the kernel takes pages of up to 2 MB, which a virtual machine often has to be
given by its host first: ten times slower then."""
READ = frozenset(_NAMES.values())
"""The dtypes, as named in torch, that can be read."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `dtype` as named in torch, or as in the file where that is none that is read here."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file. Raises ValueError, naming it, where it is damaged or incomplete."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        ends = [0, *(entry["data_offsets"][1] for entry in header.values())]
        if max(ends) != size - 8 - length:
            raise ValueError(f"it has {size - 8 - length:,} bytes of tensors, its header describes {max(ends):,}")
        found = {}
        for name, entry in header.items():
            dtype, shape = _NAMES.get(entry["dtype"]) or str(entry["dtype"]), tuple(entry["shape"])
            first, end = entry["data_offsets"]
            if dtype in ITEM_SIZES and end - first != math.prod(shape) * ITEM_SIZES[dtype]:
                raise ValueError(f"{name} is {dtype} {list(shape)}, and has {end - first:,} bytes")
            found[name] = Stored(path, dtype, shape, 8 + length + first)
        return found
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}.") from error


def read_exactly(descriptor: int, offset: int, out: Any) -> bool:
    """Fill a contiguous tensor with the bytes of a file from `offset` on; False where it ends before."""
    import torch

    room = memoryview(out.view(-1).view(torch.uint8).numpy())
    while room:
        count = os.preadv(descriptor, [room], offset)
        if not count:
            return False
        room, offset = room[count:], offset + count
    return True


def write_exactly(file: Any, tensor: Any) -> None:
    """All bytes of a tensor on the CPU to a file, in pieces that go past a buffer of it."""
    import torch

    room = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    while room:
        room = room[file.write(room[:PIECE]) :]


def ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The same, each made in a thread of its own while the one before it is used: reading beside writing."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item
