"""Read files as documents: plain text, JSON lines or folders of them, compressed or not.

Two steps, so that the costly one can run in worker processes: `TextFiles.records()` cuts files into records
of raw bytes, and `parse` makes a record the text of a document or raises `BadRecord` with the reason. The
text is exactly what the file holds (only a byte order mark at its start is taken off, and the line end that
ended the record). A line of JSON may hold token ids in the place of text. The order of records is that of
the inputs; inside a folder, that of the sorted paths.

Absent on purpose: character sets other than UTF-8, cleaning, deduplication, shuffling.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, NamedTuple

from megatron_mtpd.data.accounting import EMPTY, BadRecord, Tally
from megatron_mtpd.data.compression import check_readable, open_binary, strip_suffix

SPLITS = ("file", "blank-line", "line")
FORMATS = ("auto", "text", "jsonl")
# SentencePiece needs some 50 bytes of memory a character: a larger file is hardly meant as one document.
LARGEST_DOCUMENT = 128 * 2**20


class Document(NamedTuple):
    """A text and where it stands: `path`, or `path:line`."""

    text: str
    where: str


class Record(NamedTuple):
    """The bytes of one document-to-be."""

    raw: bytes
    path: str
    line: int  # of its first line, from 1; 0 where the record is the whole file
    json_key: str | None  # the key of the text, where raw is a line of JSON
    position: int  # bytes on disk consumed up to the end of this record, over all files: for progress

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


def parse(record: Record) -> str:
    """The text of a record. Raises BadRecord: invalid UTF-8 or JSON, no such key, not a string, empty."""
    text = parse_text_or_tokens(record)
    if isinstance(text, list):
        raise BadRecord("text is not a string", f"{record.json_key!r} holds a list")
    return text


def parse_text_or_tokens(record: Record) -> str | list[int]:
    """The text of a record, or its token ids where the JSON key holds a list of them. Raises BadRecord as `parse`."""
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("invalid UTF-8", f"byte {record.raw[error.start]:#04x} at offset {error.start}") from None
    found: str | list[int] = text
    if record.json_key is not None and text and not text.isspace():
        found = _value_of_json(text, record.json_key)
    if not found or (isinstance(found, str) and found.isspace()):
        raise BadRecord(EMPTY, "")
    return found


def _value_of_json(line: str, key: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid JSON", str(error)) from None
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object", f"the line holds a {type(value).__name__}")
    if key not in value:
        raise BadRecord("missing key", f"no {key!r} among {sorted(value)[:8]}")
    text = value[key]
    if isinstance(text, list) and all(type(i) is int for i in text):  # a bool is no token
        return text
    if not isinstance(text, str):
        raise BadRecord("text is not a string", f"{key!r} holds a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON and no character
        raise BadRecord("lone surrogate", f"at character {error.start}") from None
    return text


def parsed(records: Iterable[Record], tally: Tally) -> Iterator[tuple[Record, str]]:
    """Records with their texts; what gives no text goes to `tally` alone."""
    for record in records:
        try:
            text = parse(record)
        except BadRecord as bad:
            tally.bad(record.where, bad)
        else:
            tally.good(1, len(text.encode()))
            yield record, text


class TextFiles:
    """Files and folders, listed and checked at once, read when asked.

    inputs: paths of files and folders. A folder gives all files under it, sorted, except hidden ones;
        `suffixes` (".py", ".md") keeps those whose name, without .gz and the like, ends so.
    format: "jsonl" (a document a line), "text", or "auto": .jsonl and .ndjson are JSON lines, the rest is
        text.
    split: what a document is in a text file: the whole "file", a paragraph between "blank-line"s, or a
        "line".
    json_key: where a line of JSON holds its text.
    name: what `summary` calls the inputs, in place of their paths.

    Raises ValueError: a missing, unreadable or doubly listed file, nothing found, an unknown option.
    """

    def __init__(
        self,
        inputs: Sequence[str | os.PathLike[str]],
        *,
        suffixes: Sequence[str] = (),
        format: str = "auto",
        split: str = "file",
        json_key: str = "text",
        name: str | None = None,
    ) -> None:
        _check_choice("--split", split, SPLITS)
        _check_choice("--format", format, FORMATS)
        self.inputs = [os.fspath(path) for path in inputs]
        self.suffixes = [suffix if suffix.startswith(".") else f".{suffix}" for suffix in suffixes]
        self.format, self.split, self.json_key, self.name = format, split, json_key, name
        self.files = [file for path in self.inputs for file in self._list(path)]
        if not self.files:
            raise ValueError("--input: no file given")
        self.sizes = [os.path.getsize(file) for file in self.files]
        self.total_bytes = sum(self.sizes)
        self._check()

    def records(self) -> Iterator[Record]:
        """All records in order. Raises ValueError for a damaged compressed file."""
        before = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            key = self.json_key if self._is_jsonl(file) else None
            with open_binary(file) as (stream, raw):
                for line, data in _cut(stream, "line" if key is not None else self.split):
                    yield Record(data, file, line, key, before + min(raw.tell(), size))
            before += size

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """All documents in order; `tally` counts them and judges the bad ones (default: none is accepted)."""
        tally = tally or Tally("0")
        for record, text in parsed(self.records(), tally):
            yield Document(text, record.where)
        tally.finish()

    def summary(self) -> dict:
        """What was read, for the record; `listing_sha256` covers every path and size."""
        listing = "".join(f"{size}\t{file}\n" for file, size in zip(self.files, self.sizes, strict=True))
        return {
            "inputs": [self.name] if self.name else [*self.inputs[:20], *["..."][: len(self.inputs) > 20]],
            "files": len(self.files),
            "bytes_on_disk": self.total_bytes,
            "listing_sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
            "suffixes": self.suffixes,
            "format": self.format,
            "split": self.split,
            "json_key": self.json_key,
        }

    def _list(self, path: str) -> list[str]:
        if os.path.isfile(path):
            return [path]
        if not os.path.isdir(path):
            raise ValueError(f"--input {path}: no such file or folder")
        found = []
        for folder, subfolders, names in os.walk(path, onerror=_raise):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found += [
                os.path.join(folder, name)
                for name in names
                if not name.startswith(".") and strip_suffix(name).endswith(tuple(self.suffixes) or "")
            ]
        found = sorted(file for file in found if os.path.isfile(file))
        if not found:
            wanted = f" ending in {' or '.join(self.suffixes)}" if self.suffixes else ""
            raise ValueError(f"--input {path}: the folder holds no file{wanted}; check the path and --suffix")
        return found

    def _is_jsonl(self, file: str) -> bool:
        if self.format == "auto":
            return strip_suffix(file).endswith((".jsonl", ".ndjson"))
        return self.format == "jsonl"

    def _check(self) -> None:
        seen: set[str] = set()
        for file, size in zip(self.files, self.sizes, strict=True):
            check_readable(file)
            if os.path.abspath(file) in seen:
                raise ValueError(f"--input: {file} is listed twice; name each file or its folder, not both")
            seen.add(os.path.abspath(file))
            if self.format == "auto" and strip_suffix(file).endswith(".json"):
                raise ValueError(f"{file}: .json can be lines or one text; say --format jsonl or --format text")
            if self.split == "file" and not self._is_jsonl(file) and size > LARGEST_DOCUMENT:
                raise ValueError(
                    f"{file}: {size / 1e6:.0f} MB as one document would not fit in memory when tokenized; "
                    "say where documents end, by --split blank-line or --split line, or --format jsonl"
                )


def _cut(stream: IO[bytes], split: str) -> Iterator[tuple[int, bytes]]:
    """Cut a file into (line number, bytes), where lines end in \\n or \\r\\n."""
    if split == "file":
        yield 0, stream.read().removeprefix(codecs.BOM_UTF8)
        return
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if split == "line":
            yield number, _without_line_end(line)
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield number - len(paragraph), _without_line_end(b"".join(paragraph))
            paragraph = []
    if paragraph:
        yield number - len(paragraph) + 1, _without_line_end(b"".join(paragraph))


def _without_line_end(data: bytes) -> bytes:
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option} {value}: choose one of {', '.join(choices)}")


def _raise(error: OSError) -> None:
    raise error
