"""Whether the files of one checkpoint are those that were written.

Three things tell, each with what the others cannot see:

- `.metadata` says which bytes of which file each tensor is in: a missing or truncated file shows without
  reading it.
- Each of those entries is a zip archive, written by `torch.save` with a CRC-32 of every record computed from
  memory. Loading never looks at it, so flipped bytes load silently; a full check reads it, for checkpoints of
  any origin.
- The manifest, `integrity.json`, has every file's exact size, and the SHA-256 of the two metadata files,
  which nothing else protects. It is written last, so its presence also says that the save ended. Its name and
  format are Megatron's (`--verify-integrity`), with `sizes` added; checkpoints without one are checked by the
  other two alone.

Absent on purpose: repair, and digests of the data files (Megatron's own flag adds them, and checks them).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import BLOCK, Progress, written_whole
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError, Metadata, Payload, read_metadata

MANIFEST = "integrity.json"
_DIGESTED = (METADATA, CONFIG)
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError)
"""What zipfile raises for damaged archives."""
_THREADS = 4  # a rank of a full node should not take all of its cores


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file of a checkpoint."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def write_manifest(directory: Path) -> None:
    """Write the manifest of a finished checkpoint, whole or not at all.

    One process calls it, after all have written. Digests that are in an existing manifest (Megatron's
    `--verify-integrity`) are kept.
    """
    sizes = {
        entry.name: entry.stat().st_size
        for entry in os.scandir(directory)
        if entry.is_file() and entry.name != MANIFEST and not entry.name.endswith((".partial", ".tmp"))
    }
    manifest = _read_manifest(directory) or {}
    digests = manifest.get("files", {}) | {
        name: _digest(directory / name) for name in _DIGESTED if (directory / name).exists()
    }
    document = {"algorithm": "sha256", "files": digests, "sizes": dict(sorted(sizes.items()))}
    with written_whole(directory / MANIFEST) as file:
        file.write(json.dumps(document, indent=1).encode())


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest, None if there is none. Raises CheckpointError where it cannot be read."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        if not all(isinstance(manifest.get(table, {}), dict) for table in ("files", "sizes")):
            raise ValueError("not a table of files")
        return manifest
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged: {error}.") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(directory: Path) -> bool:
    """Whether the save that wrote this directory came to its end. It may be damaged all the same."""
    return (directory / METADATA).exists() and (directory / CONFIG).exists()


def verify(
    directory: Path,
    full: bool = True,
    share: tuple[int, int] = (0, 1),
    metadata: Metadata | None = None,
) -> list[Problem]:
    """What is wrong with a checkpoint's files; an empty list if nothing is.

    Without `full` it looks at presence, sizes and the metadata files: milliseconds. With it, every byte that a load
    can read is read and compared with its checksum. `share` = (i, n) reads the i-th of n equal parts of the data, so
    that n processes read it once between them; the first of them shows how far it is. `metadata` is the checkpoint's,
    where it was read already.
    """
    if not directory.is_dir():
        return [Problem(directory.name, "no such directory")]
    missing = [
        Problem(name, "missing: the save did not finish") for name in _DIGESTED if not (directory / name).exists()
    ]
    if missing:
        return missing
    try:
        manifest = _read_manifest(directory) or {}
    except CheckpointError as error:
        return [Problem(MANIFEST, str(error))]
    digests, sizes = manifest.get("files", {}), manifest.get("sizes", {})
    for name in _DIGESTED:
        if name in digests and digests[name] != _digest(directory / name):
            return [Problem(name, "its bytes are not those that were written (SHA-256 differs)")]
    try:
        if metadata is None and (full or not sizes):
            metadata = read_metadata(directory)
    except CheckpointError as error:
        return [Problem(METADATA, str(error))]

    problems = {}
    for name, least in ((metadata.files() if metadata else {}) | sizes).items():
        try:
            found = (directory / name).stat().st_size
        except OSError:
            problems[name] = "missing"
            continue
        if name in sizes and found != least:
            problems[name] = f"{found:,} bytes, {least:,} were written"
        elif found < least:
            problems[name] = f"truncated: {found:,} bytes, at least {least:,} were written"
    if full and metadata:
        payloads = [payload for payload in _part(metadata.archives(), *share) if payload.file not in problems]
        label = f"verify {directory}" if share[0] == 0 else None
        for payload, what in _damaged(payloads, directory, label):
            problems.setdefault(payload.file, f"bytes {payload.offset:,} to {payload.end:,} are damaged ({what})")
    return [Problem(name, what) for name, what in problems.items()]


def _part(payloads: list[Payload], index: int, count: int) -> list[Payload]:
    """Consecutive payloads that make up the index-th of `count` parts of about equal bytes."""
    total = sum(payload.length for payload in payloads)
    part, before = [], 0
    for payload in payloads:
        if before * count // max(total, 1) == index:
            part.append(payload)
        before += payload.length
    return part


def _damaged(payloads: list[Payload], directory: Path, label: str | None) -> list[tuple[Payload, str]]:
    def check(payload: Payload) -> str | None:
        try:
            with (directory / payload.file).open("rb") as file:
                what = _bad_record(Window(file.fileno(), payload))
        except _UNREADABLE as error:
            what = str(error)
        progress(payload.length)
        return what

    # Reading and checksums both release the interpreter's lock.
    with Progress(label, sum(p.length for p in payloads)) as progress, ThreadPoolExecutor(_THREADS) as threads:
        results = threads.map(check, payloads)
        return [(payload, what) for payload, what in zip(payloads, results, strict=True) if what]


def _bad_record(data: io.RawIOBase) -> str | None:
    """The first record of an archive that is not what its checksum says."""
    with zipfile.ZipFile(data) as archive:  # type: ignore[arg-type]
        for record in archive.infolist():
            if record.CRC == 0:  # torch.serialization.set_crc32_options(False), or four bytes that say so by chance
                continue
            with archive.open(record) as reader:
                while reader.read(BLOCK):
                    pass
    return None


class Window(io.RawIOBase):
    """A payload as a file of its own."""

    def __init__(self, descriptor: int, payload: Payload) -> None:
        self._descriptor, self._payload, self._position = descriptor, payload, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._payload.length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._payload.length - self._position)]
        count = os.preadv(self._descriptor, [room], self._payload.offset + self._position) if room else 0
        self._position += count
        return count
