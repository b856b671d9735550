"""Open a file for reading, decompressed by what its name ends with.

Contract: `open_binary` yields the decompressed stream and the file under it, whose `tell()` says how much of
the file on disk has been consumed. A name that cannot be read here is refused by `check_readable`, before any
long work. A damaged file raises ValueError that names it: it is never mistaken for a short one.

Absent on purpose: guessing a format from the content, archives (.tar, .zip), writing.
"""

import bz2
import gzip
import importlib
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def strip_suffix(path: str) -> str:
    """`path` without the suffix of its compression, if it has one: `a.txt.gz` -> `a.txt`."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in SUFFIXES else path


def check_readable(path: str) -> None:
    """Raise ValueError if the file may not be read, or if its compression has no decoder here."""
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: permission denied; make the file readable or leave it out")
    if path.lower().endswith(".zst") and _zstd() is None:
        raise ValueError(
            f"{path}: no decoder for .zst; use Python >= 3.14, `pip install backports.zstd`, "
            "or recompress the file as .gz, .bz2 or .xz"
        )


@contextmanager
def open_binary(path: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Yield (decompressed stream, file on disk); the `with` block is for reading alone.

    Raises ValueError if the compressed data turn out to be damaged or truncated, OSError as `open` does.
    """
    suffix = os.path.splitext(path)[1].lower()
    with open(path, "rb") as raw:
        if suffix not in SUFFIXES:
            yield raw, raw
            return
        stream, damage = _decompress(suffix, raw)
        with stream:
            try:
                yield stream, raw
            except (EOFError, OSError, *damage) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk failed, not the format
                raise ValueError(
                    f"{path}: damaged or not a {suffix} file ({error}); fetch it again or leave it out"
                ) from error


def _decompress(suffix: str, raw: IO[bytes]) -> tuple[Any, tuple[type[Exception], ...]]:
    """The decompressing stream over `raw`, and what it raises beyond EOFError and OSError."""
    match suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=raw), (zlib.error,)
        case ".bz2":
            return bz2.BZ2File(raw), ()
        case ".xz":
            return lzma.LZMAFile(raw), (lzma.LZMAError,)
        case _:
            zstd = _zstd()
            assert zstd is not None, "check_readable comes first"
            return zstd.ZstdFile(raw), (zstd.ZstdError,)


def _zstd() -> Any:
    """Python 3.14's module, or its backport; not `zstandard`, which reads a truncated file as a short one."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return None
