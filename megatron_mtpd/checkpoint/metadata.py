"""What the `.metadata` file of a `torch_dist` checkpoint says: which tensors, of which shape, in which bytes
of which file.

`.metadata` is a pickle of `torch.distributed.checkpoint.metadata.Metadata`: `state_dict_metadata` maps a key
to its global shape and chunks, `storage_data` maps (key, chunk offset) to (file, byte offset, byte length).
`read_metadata` gives a typed view of both; the stand-in that it was read into stays beside it for those who
write a changed one (`extend`).

Keys of a Megatron model: `mtp.layers.K.` starts those of head K + 1; `optimizer.state.SLOT.` followed by a
model's key is that parameter's optimizer state; `.../shard_I_N` ends those of objects that are no tensors
(`_extra_state`, rng, arguments).
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint import pickles

METADATA = ".metadata"
CONFIG = "metadata.json"
"""What Megatron writes last into a checkpoint, and looks for to recognise one."""

ITEM_SIZES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("uint8", "int8", "bool", "float8_e4m3fn", "float8_e5m2"), 1),
}
"""Bytes of an element of each dtype that a checkpoint may hold."""

_ACCEPTED = (
    "torch.distributed.checkpoint",
    "torch.distributed._shard",  # where older versions of torch kept TensorProperties
    "megatron.core.dist_checkpointing",  # and older versions of Megatron their own data
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib",
    *(f"torch.{dtype}" for dtype in ITEM_SIZES),
)
_HEAD = re.compile(r"(?:^|(?<=\.))mtp\.layers\.(\d+)\.")
_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.")
_SLOT = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)$")


class CheckpointError(ValueError):
    """A checkpoint cannot be used: says which file, what is wrong with it, and what to do instead."""


@dataclass(frozen=True)
class Payload:
    """`length` bytes at `offset` of `file`: one serialized chunk or object, in the format of `torch.save`."""

    file: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Tensor:
    """A global tensor, `dtype` by its name in torch; its chunks by their offset in it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    chunks: dict[tuple[int, ...], Payload]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without what serialization adds."""
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Metadata:
    """Contents of a checkpoint; `raw` is the stand-in of torch's object, which `pickles.dumps` can write again."""

    directory: Path
    raw: Any = field(repr=False)
    tensors: dict[str, Tensor]
    objects: dict[str, Payload]

    def payloads(self) -> Iterator[tuple[str, Payload]]:
        """Key and bytes of every chunk and object, in the order of `storage_data`."""
        for index, info in self.raw.storage_data.items():
            yield index.fqn, Payload(info.relative_path, info.offset, info.length)

    def archives(self) -> list[Payload]:
        """The distinct payloads that are what `torch.save` wrote (others were compressed by an extension of torch),
        in their order on disk.
        """
        found = {
            Payload(info.relative_path, info.offset, info.length)
            for info in self.raw.storage_data.values()
            if not getattr(info, "transform_descriptors", None)
        }
        return sorted(found, key=lambda payload: (payload.file, payload.offset))

    def files(self) -> dict[str, int]:
        """Every data file, and the least number of bytes it must have."""
        sizes: dict[str, int] = {}
        for _, payload in self.payloads():
            sizes[payload.file] = max(sizes.get(payload.file, 0), payload.end)
        return sizes

    @property
    def num_heads(self) -> int:
        """How many multi-token prediction heads have weights of their own."""
        return 1 + max((head_of(key) or 0 for key in self.tensors if head_of(key) is not None), default=-1)


def read_metadata(directory: Path) -> Metadata:
    """Read a checkpoint's `.metadata`; runs nothing in it. Raises CheckpointError naming the file."""
    path = directory / METADATA
    try:
        raw = pickles.loads(path.read_bytes(), _ACCEPTED)
        return _view(directory, raw)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist. {directory} is no torch_dist checkpoint, or its save was cut short."
        ) from None
    except (pickle.UnpicklingError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint metadata: {error}.") from error


def _view(directory: Path, raw: Any) -> Metadata:
    chunks: dict[str, dict[tuple[int, ...], Payload]] = {}
    objects: dict[str, Payload] = {}
    for index, info in raw.storage_data.items():
        payload = Payload(info.relative_path, info.offset, info.length)
        if Path(payload.file).name != payload.file:
            raise ValueError(f"it points outside of the checkpoint, at {payload.file}")
        offset = getattr(index, "offset", None)  # objects have none
        if offset is None:
            objects[index.fqn] = payload
        else:
            chunks.setdefault(index.fqn, {})[size(offset)] = payload
    tensors = {
        key: Tensor(key, size(stored.size), _dtype(stored.properties), chunks.get(key, {}))
        for key, stored in raw.state_dict_metadata.items()
        if hasattr(stored, "size")
    }
    return Metadata(directory, raw, tensors, objects)


def size(stored: Any) -> tuple[int, ...]:
    """The numbers in a stand-in of torch.Size."""
    return tuple(stored.arguments[0])


def _dtype(properties: Any) -> str:
    state = properties._state  # (dtype, layout, requires_grad, memory_format, pin_memory), or a dict of them
    name = pickles.name_of(state["dtype"] if isinstance(state, dict) else state[0])
    if name is None or name.removeprefix("torch.") not in ITEM_SIZES:
        raise ValueError(f"dtype {name} is not known")
    return name.removeprefix("torch.")


def head_of(key: str) -> int | None:
    """Head, counted from 0, that a key of the model or the optimizer belongs to; None for the main model."""
    found = _HEAD.search(key)
    return int(found[1]) if found else None


def with_head(key: str, head: int) -> str:
    """The same key of another head."""
    return _HEAD.sub(f"mtp.layers.{head}.", key, count=1)


def is_optimizer(key: str) -> bool:
    """Whether a key belongs to the optimizer, in whichever layout it was saved."""
    return _OPTIMIZER.match(key) is not None


def optimizer_slot(key: str) -> str | None:
    """`exp_avg` of `optimizer.state.exp_avg.decoder...`; None where state is not kept by parameter."""
    found = _SLOT.match(key)
    return found[1] if found else None
