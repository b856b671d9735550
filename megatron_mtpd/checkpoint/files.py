"""Files and directories that appear whole or not at all, and the copying of bytes between them.

`written_whole` puts a file in its place only when all of it is on disk; `assembled` does the same for a
directory.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

BLOCK = 16 << 20


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` when the block ends, unless it raises.

    Killed at any moment, `path` is what it was or what it was to become; a temporary file may stay beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def assembled(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new directory to fill, beside `path`, that becomes `path` when the block ends, unless it raises.

    Raises ValueError, before the block and again after it, where `path` exists and is not empty, unless
    `replace`. Killed at any moment it leaves `path` as it was, or whole, or (while one is replaced by
    another) absent.
    """
    _refuse(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for directory in [*(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
            sync(directory)
        _refuse(path, replace)
        replaced = path.with_name(f".{path.name}.{secrets.token_hex(4)}.replaced")
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file. Name a directory that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise ValueError(f"{path} exists and is not empty. Name another directory, or replace it with --force.")


def sync(path: Path) -> None:
    """Have a file's contents, or a directory's names, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def can_link(source: Path, directory: Path) -> bool:
    """Whether a file can have a second name in that directory: the same file system, and one with hard links."""
    probe = directory / ".link"
    try:
        os.link(source.resolve(), probe)
    except OSError:
        return False
    probe.unlink()
    return True


def copied(reader: IO[bytes], writer: IO[bytes], length: int, progress: Callable[[int], object]) -> None:
    """Copy bytes from one open file to another, from where they stand. Raises EOFError if there are fewer."""
    while length:
        block = reader.read(min(BLOCK, length))
        if not block:
            raise EOFError(f"{reader.name} ends {length:,} bytes too early")
        writer.write(block)
        progress(len(block))
        length -= len(block)


def readable(count: int) -> str:
    """A number of bytes for people: 8.1 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


class Progress:
    """How far a long work over bytes is, or over what `unit` says: a bar on a terminal, a line every ten seconds
    elsewhere, nothing if short."""

    def __init__(self, label: str | None, total: int, every: float = 10.0, unit: str = "B") -> None:
        self._label, self._total, self._every, self._unit, self._done = label, total, every, unit, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        if label and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, delay=1.0, leave=False)

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(count)
        elif self._label and now - self._said >= self._every:
            self._said = now
            rate = self._done / max(now - self._start, 1e-9)
            left = (self._total - self._done) / rate
            speed = f"{rate / 1e6:,.0f} MB/s" if self._unit == "B" else f"{rate:,.0f} {self._unit}s/s"
            done = f"{self._done / max(self._total, 1):.0%}, {speed}, {left:,.0f} s left"
            print(f"{self._label}: {done}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
