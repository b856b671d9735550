"""Read and write the tensors of a `torch_dist` checkpoint one by one, without a model and without torch.distributed.

A checkpoint is what `torch.distributed.checkpoint` writes (see `checkpoint.metadata`): each piece of a tensor is what
`torch.save` makes of it, somewhere in a data file, and `.metadata` says where. `Writer` makes one of tensors that come
a block of rows at a time; `Reader` gives the rows that are asked for, from whatever pieces a run's layout left.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mtpd.checkpoint import common_state
from megatron_mtpd.checkpoint.common_state import read_payload
from megatron_mtpd.checkpoint.files import sync
from megatron_mtpd.checkpoint.hf.archive import checksum, place_of, write_archive
from megatron_mtpd.checkpoint.hf.blocks import flat
from megatron_mtpd.checkpoint.hf.stored import read_exactly
from megatron_mtpd.checkpoint.integrity import write_manifest
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError, Payload, size
from megatron_mtpd.checkpoint.metadata import Metadata as Contents

FILE = "__0_{}.distcp"
FILE_SIZE = 4 << 30


class Writer:
    """Writes a checkpoint into an empty directory: `tensor`, `alias` and `extra_state`, and `finish` at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._file, self._number = directory, None, 0
        self._described: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._extra_state: _StorageInfo | None = None
        self._written: dict[str, int] = {}

    def tensor(self, key: str, blocks: Iterable[Tensor], size: tuple[int, ...] | None = None) -> None:
        """A tensor, as blocks of rows that follow each other; `size` as in `rows`. None: that of blocks which have its
        dimensions."""
        if size is None:
            blocks = [block.contiguous() for block in blocks]
            size = (sum(len(block) for block in blocks), *blocks[0].shape[1:])
        for block in blocks:
            self.rows(key, size, block, checksum(block))

    def rows(self, key: str, size: tuple[int, ...], block: Tensor, crc: int) -> None:
        """The next rows of a tensor of `size`, [rows, width], contiguous on the CPU; of three dimensions, rows of one
        index of the first. `crc`: the block's `archive.checksum`."""
        row = self._written.get(key, 0)
        expert, first = divmod(row, flat(size)[1])
        offset = torch.Size(([expert, first] if len(size) > 2 else [first]) + [0] * (len(size) > 1))
        found = torch.Size(([1, len(block)] if len(size) > 2 else [len(block)]) + list(size[-1:]) * (len(size) > 1))
        if not row:
            self._described[key] = TensorStorageMetadata(TensorProperties(dtype=block.dtype), torch.Size(size), [])
        chunks = self._described[key].chunks
        write = partial(write_archive, rows=block, size=tuple(found), crc=crc)
        self._places[MetadataIndex(key, offset, len(chunks))] = self._append(write)
        chunks.append(ChunkStorageMetadata(offset, found))
        self._written[key] = row + len(block)

    def alias(self, key: str, of: str) -> None:
        """A tensor that is the bytes of one written before."""
        self._described[key] = self._described[of]
        for index, place in [(index, place) for index, place in self._places.items() if index.fqn == of]:
            self._places[MetadataIndex(key, index.offset, index.index)] = place

    def extra_state(self, module: str, copies: int = 1) -> None:
        """What Megatron keeps for a linear layer beside its weight, and has nothing in it; of experts, one for each."""
        if self._extra_state is None:
            self._extra_state = self._append(lambda file: torch.save([None], file))
        for number in range(copies):
            self._object(f"{module}._extra_state/shard_{number}_{copies}", self._extra_state)

    def finish(self, state: dict[str, Any]) -> None:
        """Write the arguments and the state of the run, and all that makes the directory a checkpoint."""
        self._object(common_state.KEY, self._append(lambda file: torch.save([state], file)))
        self._close()
        metadata = Metadata(self._described, None, self._places, StorageMeta())
        for name, data in (
            (METADATA, pickle.dumps(metadata)),
            (CONFIG, b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'),
        ):
            (self._directory / name).write_bytes(data)
            sync(self._directory / name)
        write_manifest(self._directory)

    def _object(self, key: str, place: _StorageInfo) -> None:
        self._described[key] = BytesStorageMetadata()
        self._places[MetadataIndex(key)] = place

    def _append(self, write: Callable[[IO[bytes]], object]) -> _StorageInfo:
        if self._file is None or self._file.tell() >= FILE_SIZE:
            self._close()
            self._file = (self._directory / FILE.format(self._number)).open("xb")
            self._number += 1
        offset = self._file.tell()
        write(self._file)
        return _StorageInfo(Path(self._file.name).name, offset, self._file.tell() - offset)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))
            self._file = None


class Reader:
    """The tensors of a checkpoint, by rows. Raises CheckpointError naming the key or the file."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._last: tuple[str, list[_Chunk]] = ("", [])

    def read(self, name: str, first: int, out: Tensor) -> None:
        """Rows of a tensor from `first` on, into `out` [rows, width] of any dtype on the CPU."""
        described = self._described(name)
        dtype = getattr(torch, described.dtype)
        into = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype)
        _, rows, width = flat(described.shape)
        missing, row, last = into.numel(), first, first + len(into)
        while row < last:
            expert, begin = divmod(row, rows)
            end = min(rows, begin + last - row)
            for chunk in self._chunks(name):
                if chunk.experts[0] <= expert < chunk.experts[1]:
                    a, b = max(begin, chunk.rows[0]), min(end, chunk.rows[1])
                    if a < b:
                        target = into[row - first + a - begin : row - first + b - begin]
                        self._read(name, chunk, expert, a, target, width)
                        missing -= (b - a) * chunk.width
            row += end - begin
        if missing:
            raise CheckpointError(f"{self._contents.directory} has no bytes of a part of tensor {name}.")
        if into is not out:
            out.copy_(into)

    def _read(self, name: str, chunk: _Chunk, expert: int, row: int, target: Tensor, width: int) -> None:
        whole_rows = chunk.width == width
        rows = target if whole_rows else torch.empty(len(target), chunk.width, dtype=target.dtype)
        index = (expert - chunk.experts[0]) * (chunk.rows[1] - chunk.rows[0]) + row - chunk.rows[0]
        path = self._contents.directory / chunk.payload.file
        try:
            chunk.read(path, index, rows)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{path}: bytes {chunk.payload.offset:,} to {chunk.payload.end:,}, a part of {name}, are damaged: "
                f"{error}."
            ) from error
        if not whole_rows:
            target[:, chunk.column : chunk.column + chunk.width] = rows

    def _chunks(self, name: str) -> list[_Chunk]:
        if self._last[0] != name:
            payloads = self._described(name).chunks
            stored = self._contents.raw.state_dict_metadata[name].chunks
            sizes = {size(chunk.offsets): size(chunk.sizes) for chunk in stored}
            self._last = (name, [_chunk(payload, offset, sizes[offset]) for offset, payload in payloads.items()])
        return self._last[1]

    def _described(self, name: str) -> Any:
        if name not in self._contents.tensors:
            raise CheckpointError(
                f"{self._contents.directory} has no tensor {name}, which a model of its arguments has."
            )
        return self._contents.tensors[name]


@dataclass
class _Chunk:
    """A piece of a tensor: rows of some experts (from and to), from `column` on `width` elements of each row."""

    payload: Payload
    size: tuple[int, ...]
    experts: tuple[int, int]
    rows: tuple[int, int]
    column: int
    width: int
    place: int | None = None
    whole: Tensor | None = None

    def read(self, path: Path, row: int, out: Tensor) -> None:
        """Rows of it from `row` on, counted through, into `out` [rows, width] of its dtype."""
        if self.place is None and self.whole is None:
            self.place = place_of(path, self.payload, math.prod(self.size) * out.itemsize)
            if self.place is None:  # then torch knows how to put it together
                data = io.BytesIO(read_payload(path.parent, self.payload))
                self.whole = torch.load(data, weights_only=True).reshape(-1, self.width)
        if self.whole is not None:
            out.copy_(self.whole[row : row + len(out)])
            return
        assert self.place is not None
        with path.open("rb", buffering=0) as file:
            if not read_exactly(file.fileno(), self.place + row * self.width * out.itemsize, out):
                raise EOFError("the file ends there")


def _chunk(payload: Payload, offset: tuple[int, ...], found: tuple[int, ...]) -> _Chunk:
    experts, rows, width = flat(found)
    expert = offset[0] if len(found) > 2 else 0
    row = offset[1] if len(found) > 2 else offset[0]
    column = offset[-1] if len(found) > 1 else 0
    return _Chunk(payload, found, (expert, expert + experts), (row, row + rows), column, width)


def read_tensor(contents: Contents, key: str) -> Tensor:
    """A whole tensor, on the CPU. Raises CheckpointError naming the key or the file where it cannot be read."""
    reader = Reader(contents)
    described = reader._described(key)
    whole = torch.empty(described.shape, dtype=getattr(torch, described.dtype))
    reader.read(key, 0, whole.view(-1, flat(described.shape)[2]))
    return whole
