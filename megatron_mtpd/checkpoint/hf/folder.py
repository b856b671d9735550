"""Hugging Face folders: config.json, weights in safetensors files with an index, and the small files beside them.

`Folder` opens one for reading; a tensor is read when it is asked for. `write_weights` writes weights of any size with
one tensor in memory: a safetensors file is the length of its header, a JSON header, and the tensors' bytes, so what the
header says is known before the first tensor is. The library's own writer takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import sync
from megatron_mtpd.checkpoint.metadata import ITEM_SIZES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_SIZE = 4 << 30
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("generation_config.json", "chat_template*", "LICENSE*", "NOTICE*"),
)
"""What travels with a model beside its weights and config.json."""


class Folder:
    """A folder with a model's weights in safetensors. Raises ValueError where it is not one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self._files: dict[str, Any] = {}

    @cached_property
    def names(self) -> dict[str, str]:
        """The file that holds each tensor."""
        if (self.path / INDEX).exists():
            found = read_json(self.path / INDEX).get("weight_map", {})
        elif (self.path / SINGLE).exists():
            found = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}: give a folder with safetensors weights.")
        missing = sorted({file for file in found.values() if not (self.path / file).exists()})
        if missing:
            raise ValueError(f"{self.path / missing[0]} is missing, and {INDEX} names it: download it again.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._of(name).get_slice(name).get_shape())

    def tensor(self, name: str) -> Any:
        """A tensor. Raises ValueError naming the folder where there is none of that name."""
        return self._of(name).get_tensor(name)

    def _of(self, name: str) -> Any:
        if name not in self.names:
            raise ValueError(f"{self.path} has no tensor {name}, which a model of its config.json has.")
        return self._open(self.names[name])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import SafetensorError, safe_open

            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self.path / file} is damaged or incomplete: {error}.") from error
        return self._files[file]


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
    """Tensors that come from one read: their names and shapes, and how to get their values."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    read: Callable[[], list[Any]]

    def nbytes(self, dtype: str) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors) * ITEM_SIZES[dtype]


def write_weights(
    directory: Path,
    entries: Iterable[Entry],
    dtype: str,
    progress: Callable[[int], object],
    shard_size: int = SHARD_SIZE,
) -> None:
    """Write all entries into `directory`, in files of about `shard_size` bytes, with an index if there are several.

    `read` gives contiguous tensors of that dtype on the CPU.
    """
    shards = list(_shards(list(entries), dtype, shard_size))
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        _write_file(directory / file, shard, dtype, progress)
    if len(files) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for e in shard for name, _ in e.tensors
        }
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
    for name, shape in (tensor for entry in entries for tensor in entry.tensors):
        start, end = end, end + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned data
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for (name, shape), tensor in zip(entry.tensors, entry.read(), strict=True):
                assert tuple(tensor.shape) == shape and tensor.dtype == getattr(torch, dtype), name
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                file.write(data)
                progress(data.nbytes)
    sync(path)
