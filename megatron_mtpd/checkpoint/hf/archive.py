"""One tensor as `torch.save` writes it, an archive of its bytes and a few words about them, written and read in place.

`write_archive` is given the checksum of the bytes, so that it can be computed while others are written. `place_of` says
where in an archive the bytes are, so that any rows of a tensor can be read without the others. torch itself reads and
writes whole archives alone, and computes a checksum at a third of zlib's speed.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_mtpd.checkpoint import pickles
from megatron_mtpd.checkpoint.hf.stored import write_exactly
from megatron_mtpd.checkpoint.integrity import Window
from megatron_mtpd.checkpoint.metadata import Payload

_PREFIX = b"archive/"
_HEADER_SIGNATURE = b"PK\3\4"
_HEADER = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_KIND = 20, 0, zipfile.ZIP_STORED, 0, 0x21  # version, flags, method, time, and the first day that there is


def checksum(rows: Tensor) -> int:
    """Of the bytes of a contiguous tensor on the CPU, CRC-32."""
    return zlib.crc32(memoryview(rows.view(-1).view(torch.uint8).numpy()))


def write_archive(file: IO[bytes], rows: Tensor, size: tuple[int, ...], crc: int) -> None:
    """Append an archive of a contiguous tensor on the CPU, whose size is `size` and whose checksum `crc`, to a file.

    A zip archive of stored records, each with a header, and a directory of them at the end (PKWARE's APPNOTE, 4.3).
    """
    described = _described(rows.dtype, size)
    small = {"data.pkl": described, "byteorder": b"little", "version": b"3\n"}
    records = [(name, data, len(data), zlib.crc32(data)) for name, data in small.items()]
    directory, offset = b"", 0
    for short, data, length, found in [*records, ("data/0", None, rows.nbytes, crc)]:
        name = f"archive/{short}".encode()
        sizes = found, length, length, len(name)
        header = _HEADER.pack(_HEADER_SIGNATURE, *_KIND, *sizes, 0) + name
        directory += _ENTRY.pack(b"PK\1\2", _KIND[0], *_KIND, *sizes, 0, 0, 0, 0, 0, offset) + name
        file.write(header)
        if data is None:
            write_exactly(file, rows)
        else:
            file.write(data)
        offset += len(header) + length
    number = len(records) + 1
    file.write(directory + _END.pack(b"PK\5\6", 0, 0, number, number, len(directory), offset, 0))


@lru_cache(maxsize=256)
def _described(dtype: torch.dtype, size: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickles.PROTOCOL).dump(torch.empty(size, dtype=dtype))  # whose memory is never touched
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Leaves the bytes of a tensor out, by the words that torch.load understands."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return "storage", getattr(torch, obj._pickle_storage_type()), "0", "cpu", obj._size()
        if isinstance(obj, torch.UntypedStorage):  # of dtypes that are newer than typed storages
            return "storage", torch.UntypedStorage, "0", "cpu", obj.nbytes()
        return None


def place_of(path: Path, payload: Payload, nbytes: int) -> int | None:
    """Where in a file the `nbytes` bytes of the tensor in an archive begin; None where they are not simply there,
    one row after the other.

    Raises what zipfile raises for a damaged archive, zipfile.BadZipFile where its records and its directory differ, or
    pickle.UnpicklingError.
    """
    with path.open("rb") as file, zipfile.ZipFile(Window(file.fileno(), payload)) as archive:  # type: ignore[arg-type]
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        record = records.get("data/0")
        if (
            record is None
            or "data.pkl" not in records
            or record.compress_type != zipfile.ZIP_STORED
            or record.file_size != nbytes
        ):
            return None
        found = pickles.loads(archive.read(records["data.pkl"]), ("torch",))
        _, first, size, strides = (*getattr(found, "arguments", ()), None, None, None, None)[:4]
        if first != 0 or tuple(strides or ()) != torch.empty(tuple(size or ()), device="meta").stride():
            return None
        file.seek(payload.offset + record.header_offset)
        header = file.read(_HEADER.size)
        signature, *_, name_length, extra_length = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
        if signature != _HEADER_SIGNATURE or file.read(name_length) != record.orig_filename.encode():
            raise zipfile.BadZipFile(f"the header of {record.orig_filename} is not what the directory says")
        return payload.offset + record.header_offset + _HEADER.size + name_length + extra_length
