"""The text that is on every machine: the sources of Python's own standard library, about 11 MB.

Which files: all `.py` files under the running interpreter's library folder, without installed packages,
tests, bundled data of the build, and empty files. They come sorted by the SHA-256 of their path inside the
library: the same order on every machine with this Python, and any part of it (a byte budget, a validation
split) is a fair sample of the whole.

Absent on purpose: other Python versions' sources; the text differs a little from version to version.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator

from megatron_mtpd.data.accounting import Tally
from megatron_mtpd.data.text import Document, TextFiles

_NOT_OURS = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}


def stdlib_files(max_bytes: int | None = None, *, include_tests: bool = False) -> list[str]:
    """Paths of the sources, in the order above; with `max_bytes`, each that still fits the budget."""
    root = sysconfig.get_path("stdlib")
    left_out = _NOT_OURS if include_tests else _NOT_OURS | _TESTS
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        names += [
            os.path.relpath(os.path.join(folder, file), root)
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")  # it describes this machine
        ]
    names.sort(key=lambda name: hashlib.sha256(name.replace(os.sep, "/").encode()).digest())
    chosen, total = [], 0
    for name in names:
        path = os.path.join(root, name)
        size = os.path.getsize(path)
        if size and (max_bytes is None or total + size <= max_bytes):
            chosen.append(path)
            total += size
    if not chosen:
        raise ValueError(f"no standard library source under {root} within {max_bytes} bytes; raise the budget")
    return chosen


def stdlib_corpus(max_bytes: int | None = None, *, include_tests: bool = False) -> TextFiles:
    """The sources as input for `preprocess` and `train_tokenizer`, a document a file."""
    name = f"standard library of Python {platform.python_version()}"
    return TextFiles(stdlib_files(max_bytes, include_tests=include_tests), format="text", name=name)


def stdlib_documents(max_bytes: int | None = None, *, include_tests: bool = False) -> Iterator[Document]:
    """The sources as texts. A few of Python's tests are not UTF-8, on purpose: those are left out."""
    return stdlib_corpus(max_bytes, include_tests=include_tests).documents(Tally("1%" if include_tests else "0"))
