"""Hugging Face folders: config.json, weights in safetensors files with an index, and the small files beside them.

`Folder` reads the rows that are asked for, and `write_weights` writes weights of any size, from blocks of rows.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import sync
from megatron_mtpd.checkpoint.hf import fp8
from megatron_mtpd.checkpoint.hf.stored import (
    DTYPES,
    FP8,
    READ,
    Stored,
    ahead,
    read_exactly,
    read_header,
    write_exactly,
)
from megatron_mtpd.checkpoint.metadata import ITEM_SIZES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_SIZE = 4 << 30
COMPARED = 1 << 20
_COMPANIONS = (
    *(
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "spiece.model",
        "tekken.json",
    ),
    *("generation_config.json", "chat_template*", "LICENSE*", "NOTICE*"),
)
"""What travels with a model beside its weights and config.json."""


class Folder:
    """A folder with a model's weights in safetensors. Raises ValueError where it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self._headers: dict[str, dict[str, Stored]] = {}
        self._scale = lru_cache(maxsize=8)(self._read_scale)

    @cached_property
    def names(self) -> dict[str, str]:
        """The file that holds each tensor."""
        if (self.path / SINGLE).exists():  # before an index, which a folder that was saved again may have kept
            found = dict.fromkeys(self._header(SINGLE), SINGLE)
        elif (self.path / INDEX).exists():
            found = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(found, dict):
                raise ValueError(f"{self.path / INDEX} has no weight_map of names and files: download it again.")
        else:
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}: give a folder with safetensors weights.")
        missing = sorted({file for file in found.values() if not (self.path / file).exists()})
        if missing:
            raise ValueError(f"{self.path / missing[0]} is missing, and {INDEX} names it: download it again.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape

    def dtype(self, name: str) -> str:
        return self._of(name).dtype

    @cached_property
    def block_size(self) -> fp8.Block | None:
        """Of weights in fp8. Raises ValueError for weights that are quantised in another way."""
        return fp8.block_size(self.config.get("quantization_config"), str(self.path))

    def read(self, name: str, first: int, out: Any) -> None:
        """Rows of a tensor from `first` on, into `out` [rows, width] of any dtype; of fp8, what they stand for.

        Raises ValueError, naming folder or file, where there is no such tensor, or its file is cut short.
        """
        stored = self._of(name)
        if stored.dtype == str(out.dtype).removeprefix("torch."):
            self._bytes(stored, first * out.shape[1], out)
            return
        import torch

        self.check_readable(name)
        rows = torch.empty(out.shape, dtype=getattr(torch, stored.dtype))
        self._bytes(stored, first * out.shape[1], rows)
        if stored.dtype == FP8:
            assert self.block_size is not None
            rows = fp8.dequantised(rows, first, self._scale(name + fp8.SCALE), self.block_size)
        out.copy_(rows)

    def check_readable(self, name: str) -> None:
        """Raises ValueError where `read` could not make numbers of a tensor: its dtype is unknown, or its scales are
        missing or of another size."""
        stored = self._of(name)
        if stored.dtype not in READ:
            raise ValueError(
                f"{stored.path}: {name} is {stored.dtype}, and only {', '.join(sorted(READ))} can be read."
            )
        if stored.dtype == FP8:
            if self.block_size is None:
                raise ValueError(f"{self.path}: {name} is fp8, and config.json has no quantization_config.")
            found, should = self.shape(name + fp8.SCALE), fp8.scales_shape(stored.shape, self.block_size)
            if found != should:
                raise ValueError(
                    f"{self.path}: {name + fp8.SCALE} is {list(found)}, and {name} of {list(stored.shape)} in blocks "
                    f"of {list(self.block_size)} needs {list(should)}."
                )

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same bytes."""
        a, b = self._of(name), self._of(other)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        with a.path.open("rb") as left, b.path.open("rb") as right:
            left.seek(a.offset)
            right.seek(b.offset)
            missing = math.prod(a.shape) * ITEM_SIZES[a.dtype]
            while missing:
                block = min(missing, COMPARED)
                if left.read(block) != right.read(block):
                    return False
                missing -= block
        return True

    def _read_scale(self, name: str) -> Any:
        import torch

        scale = torch.empty(self.shape(name))
        self.read(name, 0, scale)
        return scale

    def _bytes(self, stored: Stored, element: int, out: Any) -> None:
        with stored.path.open("rb", buffering=0) as file:
            if not read_exactly(file.fileno(), stored.offset + element * out.itemsize, out):
                raise ValueError(f"{stored.path} is damaged or incomplete: it ends early.")

    def _of(self, name: str) -> Stored:
        if name not in self.names:
            raise ValueError(f"{self.path} has no tensor {name}, which a model of its config.json has.")
        stored = self._header(self.names[name]).get(name)
        if stored is None:
            raise ValueError(f"{self.path / self.names[name]} has no tensor {name}, and {INDEX} says that it has.")
        return stored

    def _header(self, file: str) -> dict[str, Stored]:
        if file not in self._headers:
            self._headers[file] = read_header(self.path / file)
        return self._headers[file]


def refuse_overlap(source: Path, save: Path) -> None:
    """Raises ValueError where writing `save` would replace, or lie inside of, what is read."""
    source, save = source.resolve(), save.resolve()
    if source == save or save in source.parents or source in save.parents:
        raise ValueError(
            f"--save {save} and {source}, which is read, are one inside the other: name another directory."
        )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it is missing or holds no JSON object."""
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no table of names")
        return found
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: {path.parent} is no Hugging Face folder.") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def read_config(folder: Path) -> Any:
    """transformers' view of config.json, which fills in what the file leaves to the architecture's defaults.

    Raises ValueError, naming the file, where transformers is missing or refuses it.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ValueError("Reading config.json needs transformers: pip install 'megatron-mtpd[hf]'.") from error
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever it finds wrong; its validation raises errors of many kinds
        raise ValueError(f"{folder / CONFIG}: transformers refuses it: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
    sync(path)


def companions(folder: Path) -> list[Path]:
    """The files that travel with a model: tokenizer, generation settings, chat template, licence."""
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def copy_companions(source: Path, target: Path) -> None:
    for path in companions(source):
        shutil.copyfile(path, target / path.name)
        sync(target / path.name)


@dataclass(frozen=True)
class Entry:
    """A tensor to write: `read` gives it in contiguous pieces that follow each other, on the CPU and of its dtype."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Any]]
    dtype: str | None = None
    """None: that of the other weights."""

    def nbytes(self, dtype: str) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype or dtype]


def write_weights(
    directory: Path,
    entries: Iterable[Entry],
    dtype: str,
    progress: Callable[[int], object],
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write all entries into `directory`, in files of about `shard_size` bytes, with an index if there are several."""
    shards = list(_shards(list(entries), dtype, shard_size))
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        _write_file(directory / file, shard, dtype, progress)
    if len(files) > 1:
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        total = sum(entry.nbytes(dtype) for shard in shards for entry in shard)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: list[Entry], dtype: str, shard_size: int) -> Iterator[list[Entry]]:
    shard, filled = [], 0
    for entry in entries:
        if shard and filled + entry.nbytes(dtype) > shard_size:
            yield shard
            shard, filled = [], 0
        shard.append(entry)
        filled += entry.nbytes(dtype)
    if shard:
        yield shard


def _write_file(path: Path, entries: list[Entry], dtype: str, progress: Callable[[int], object]) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes(dtype)
        of = DTYPES[entry.dtype or dtype]
        header[entry.name] = {"dtype": of, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with path.open("xb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = dict.fromkeys((entry.name for entry in entries), 0)
        for entry, piece in ahead((each, piece) for each in entries for piece in each.read()):
            assert piece.dtype == getattr(torch, entry.dtype or dtype), entry.name
            write_exactly(file, piece)
            written[entry.name] += piece.nbytes
            progress(piece.nbytes)
        assert written == {entry.name: entry.nbytes(dtype) for entry in entries}
        os.fsync(file.fileno())
