"""Read and write the tensors of a `torch_dist` checkpoint one by one, without a model and without torch.distributed.

A checkpoint is what `torch.distributed.checkpoint` writes (see `checkpoint.metadata`): each piece of a tensor is what
`torch.save` makes of it, somewhere in a data file, and `.metadata` says where. `Writer` makes one of whole tensors;
`read_tensor` puts one together from whatever pieces its run's layout left.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from megatron_mtpd.checkpoint.integrity import write_manifest
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError
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

    def tensor(self, key: str, pieces: list[Tensor]) -> None:
        """A tensor, as pieces that follow each other in its first dimension."""
        chunks, row = [], 0
        for number, piece in enumerate(pieces):
            offset = torch.Size([row, *[0] * (piece.dim() - 1)])
            index = MetadataIndex(key, offset, number if len(pieces) > 1 else None)
            # Of a view, torch.save would write all that lies behind it.
            whole = piece.untyped_storage().nbytes() == piece.nbytes and piece.is_contiguous()
            self._places[index] = self._append(piece if whole else piece.clone(memory_format=torch.contiguous_format))
            chunks.append(ChunkStorageMetadata(offset, piece.shape))
            row += piece.shape[0]
        properties = TensorProperties(dtype=pieces[0].dtype)
        self._described[key] = TensorStorageMetadata(properties, torch.Size([row, *pieces[0].shape[1:]]), chunks)

    def alias(self, key: str, of: str) -> None:
        """A tensor that is the bytes of one written before."""
        self._described[key] = self._described[of]
        for index, place in [(index, place) for index, place in self._places.items() if index.fqn == of]:
            self._places[MetadataIndex(key, index.offset, index.index)] = place

    def extra_state(self, module: str) -> None:
        """What Megatron keeps for a linear layer beside its weight, and has nothing in it."""
        if self._extra_state is None:
            self._extra_state = self._append([None])
        self._object(f"{module}._extra_state/shard_0_1", self._extra_state)

    def finish(self, state: dict[str, Any]) -> None:
        """Write the arguments and the state of the run, and all that makes the directory a checkpoint."""
        self._object(common_state.KEY, self._append([state]))
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

    def _append(self, value: Any) -> _StorageInfo:
        if self._file is None or self._file.tell() >= FILE_SIZE:
            self._close()
            self._file = (self._directory / FILE.format(self._number)).open("xb")
            self._number += 1
        offset = self._file.tell()
        torch.save(value, self._file)
        return _StorageInfo(Path(self._file.name).name, offset, self._file.tell() - offset)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))
            self._file = None


def read_tensor(contents: Contents, key: str, progress: Callable[[int], object] = lambda count: None) -> Tensor:
    """A whole tensor, on the CPU. Raises CheckpointError naming the key or the file where it cannot be read."""
    if key not in contents.tensors:
        raise CheckpointError(f"{contents.directory} has no tensor {key}, which a model of its arguments has.")
    described = contents.tensors[key]
    whole = None
    for offset, payload in described.chunks.items():
        try:
            piece = torch.load(io.BytesIO(read_payload(contents.directory, payload)), weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"{contents.directory / payload.file}: bytes {payload.offset:,} to {payload.end:,}, a part of {key}, "
                f"are damaged: {error}."
            ) from error
        progress(piece.nbytes)
        if tuple(piece.shape) == described.shape:
            return piece.contiguous()
        if whole is None:
            whole = torch.empty(described.shape, dtype=piece.dtype)
        whole[tuple(slice(start, start + size) for start, size in zip(offset, piece.shape, strict=True))] = piece
    if whole is None:
        raise CheckpointError(f"{contents.directory} has no bytes of tensor {key}.")
    return whole
