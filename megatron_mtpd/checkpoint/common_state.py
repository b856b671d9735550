"""The part of a checkpoint that is no tensor: arguments, iteration, learning-rate schedule, versions.

Megatron stores it as one object, `common_state`, among the others; older versions in a file of its own,
`common.pt`. Either way it is what `torch.save` writes: a zip archive with a pickle and the bytes of a few
small tensors. It is read without torch (see `pickles`), and written again with the other members as they
were.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint import pickles
from megatron_mtpd.checkpoint.metadata import CheckpointError, Metadata, Payload

KEY = "common_state/shard_0_1"
LEGACY_FILE = "common.pt"

_ACCEPTED = (
    *("argparse.Namespace", "types.SimpleNamespace", "pathlib", "signal", "io.BytesIO", "_codecs.encode"),
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytes", "complex", "range", "slice")),
    *("torch", "numpy", "megatron", "megatron_mtpd", "transformer_engine"),
)
"""What arguments and schedules are made of. None of it is imported."""


@dataclass
class CommonState:
    """`values` by name (`args`, `iteration`, `optimizer`, ...), to be changed in place."""

    source: str
    """The file it was read from, for messages."""
    values: dict[str, Any]
    _archive: dict[str, bytes]
    _document: Any

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the run that saved the checkpoint, by name, to be changed in place; empty if it
        kept none.
        """
        return vars(self.values["args"]) if "args" in self.values else {}

    def serialized(self) -> bytes:
        """What `torch.load` reads back."""
        members = dict(self._archive)
        members[_pickle_in(members)] = pickles.dumps(self._document)
        return archive(members)


def read_common_state(metadata: Metadata) -> CommonState:
    """Read it from a checkpoint. Raises CheckpointError naming the file."""
    legacy = metadata.directory / LEGACY_FILE
    if KEY in metadata.objects:
        payload = metadata.objects[KEY]
        source, data = payload.file, read_payload(metadata.directory, payload)
    elif legacy.exists():
        source, data = LEGACY_FILE, legacy.read_bytes()
    else:
        raise CheckpointError(
            f"{metadata.directory} holds no arguments: neither the entry {KEY} nor {LEGACY_FILE}. "
            "It was not saved by Megatron's training loop."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            contents = {info.filename: members.read(info) for info in members.infolist()}
        document = pickles.loads(contents[_pickle_in(contents)], _ACCEPTED)
        values = document[0] if isinstance(document, list) else document
        if not isinstance(values, dict):
            raise ValueError("it is no table of names and values")
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, EOFError) as error:
        raise CheckpointError(f"{metadata.directory / source}: the stored arguments are damaged: {error}.") from error
    return CommonState(source, values, contents, document)


def _pickle_in(members: dict[str, bytes]) -> str:
    for name in members:
        if name.endswith("/data.pkl"):
            return name
    raise ValueError("the archive has no data.pkl")


def archive(members: dict[str, bytes]) -> bytes:
    """A zip archive as `torch.load` reads it: not compressed. Reproducible: it holds no time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as writer:
        for name, data in members.items():
            writer.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def read_payload(directory: Path, payload: Payload) -> bytes:
    """The bytes of one entry. Raises CheckpointError naming the file when it is missing or too short."""
    path = directory / payload.file
    try:
        with path.open("rb") as file:
            file.seek(payload.offset)
            data = file.read(payload.length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) < payload.length:
        raise CheckpointError(f"{path} is truncated: it ends before byte {payload.end:,}.")
    return data
