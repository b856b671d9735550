"""A checkpoint of many gigabytes that takes no room: the tensors' bytes are holes in sparse files.

Every entry is a real archive of `torch.save`, written around its hole, so it loads, as zeros and with true checksums.
Norms hold numbers of their own, to tell the heads apart. Saved as if by four tensor-parallel ranks.
"""

import argparse
import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mtpd.checkpoint.iterations import write_tracker

RANKS = 4
SHARD = (4096, 8192)  # 64 MiB of bfloat16
TRUNK_TENSORS, HEADS, HEAD_TENSORS = 24, 4, 2


def norm(head: int) -> torch.Tensor:
    return torch.arange(16, dtype=torch.bfloat16) + 100 * head


def serialized(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def make_sparse_checkpoint(root: Path) -> int:
    """Write it, with 4 heads, as iteration 1000 of a run; returns the bytes of its tensors."""
    directory = root / "iter_0001000"
    directory.mkdir(parents=True)
    whole = serialized(torch.zeros(SHARD, dtype=torch.bfloat16))
    hole = torch.Size(SHARD).numel() * 2
    start = whole.find(bytes(4096)) + 4095  # inside of the zeros, whatever precedes them
    head, tail = whole[:start], whole[start + hole - 8192 :]

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    files = [(directory / f"__{rank}_0.distcp").open("wb") for rank in range(RANKS)]

    def place(index: MetadataIndex, rank: int, *parts: bytes | int) -> None:
        offset = files[rank].tell()
        for part in parts:
            files[rank].seek(part, 1) if isinstance(part, int) else files[rank].write(part)
        storage[index] = _StorageInfo(f"__{rank}_0.distcp", offset, files[rank].tell() - offset)

    def describe(key: str, shape: tuple[int, ...], offsets: list[tuple[int, ...]], sizes: tuple[int, ...]) -> None:
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset in offsets]
        entries[key] = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(shape), chunks)

    names = [f"decoder.layers.{n}.mlp.linear_fc1.weight" for n in range(TRUNK_TENSORS)]
    names += [f"mtp.layers.{h}.mtp_model_layer.layers.{n}.weight" for h in range(HEADS) for n in range(HEAD_TENSORS)]
    for key in names:
        offsets = [(rank * SHARD[0], 0) for rank in range(RANKS)]
        describe(key, (RANKS * SHARD[0], SHARD[1]), offsets, SHARD)
        for rank, offset in enumerate(offsets):
            place(MetadataIndex(key, offset), rank, head, hole - 8192, tail)
    for number in range(HEADS):
        key = f"mtp.layers.{number}.enorm.weight"
        describe(key, (16,), [(0,)], (16,))
        place(MetadataIndex(key, (0,)), 0, serialized(norm(number)))
    arguments = argparse.Namespace(mtp_num_layers=HEADS, hybrid_layer_pattern="*-" * TRUNK_TENSORS + "/*-" * HEADS)
    entries["common_state/shard_0_1"] = BytesStorageMetadata()
    place(MetadataIndex("common_state/shard_0_1"), 0, serialized([{"args": arguments, "iteration": 1000}]))

    for file in files:
        file.close()
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, storage)))
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    write_tracker(root, 1000)
    return len(names) * RANKS * hole
