"""Prompts from files: our own JSONL, plain text, and the formats in which benchmarks are published.

A record's fields tell its format, so a file needs no option:

| fields of a record | benchmarks | prompt |
|---|---|---|
| `tokens`, `prompt_tokens` | `generate_data.py` | the first tokens, which were given; the others are its answer |
| `prompt` | HumanEval, own files | as it is |
| `turns` | Spec-Bench, MT-bench | the first turn |
| `question`, `options` (and `passage`) | AGIEval, SuperGPQA | passage, question, options, "Answer:" |
| `problem` | MATH, SimpleQA (csv) | problem, "Answer:" |
| `question` or `Question` | GSM8K, Natural Questions, TriviaQA | question, "Answer:" |
| `text` | own files | as it is |

Files: .jsonl, .json (a list, a record, or TriviaQA's `Data`), .csv, anything else is text with a prompt on each line;
each may be compressed (.gz). A folder stands for the files in it (MATH is one file a problem).

Deliberately absent: chat templates, few-shot examples, downloading, answers of anybody else.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = (".jsonl", ".json", ".csv", ".txt")


class Prompt(NamedTuple):
    """A prompt, or why there is none: then `text` is empty and `error` says what is wrong with the record."""

    benchmark: str
    name: str
    """Where it stands: file and number of the record, from 1."""
    text: str
    error: str = ""
    tokens: tuple[int, ...] = ()
    """Instead of `text`: prompt and answer of the model, as ids."""
    given: int = 0
    """How many of `tokens` are the prompt."""


def read_prompts(sources: Sequence[str]) -> list[Prompt]:
    """All prompts of the sources, `PATH` or `NAME=PATH`; the name of a benchmark is otherwise that of its file.

    Raises ValueError for a source that cannot be read at all, or that holds nothing.
    """
    found: list[Prompt] = []
    for source in sources:
        name, _, path = source.rpartition("=")
        path = Path(path)
        if not path.exists():
            raise ValueError(f"--prompts {source}: {path} does not exist.")
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in FORMATS) if path.is_dir() else [path]
        before = len(found)
        for file in files:
            found += _read_file(name or path.name.split(".")[0], file)
        if len(found) == before:
            raise ValueError(f"--prompts {source}: no prompt in it.")
    return found


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _read_file(benchmark: str, path: Path) -> Iterator[Prompt]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path} cannot be read as UTF-8 text: {error}") from error
    for number, record in enumerate(_records(_kind(path), text), 1):
        name = f"{path.name}:{number}"
        try:
            record = record() if callable(record) else record
            if isinstance(record, dict) and record.keys() >= {"tokens", "prompt_tokens"}:
                yield Prompt(benchmark, name, "", "", *_document(record))
            else:
                yield Prompt(benchmark, name, render(record))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            yield Prompt(benchmark, name, "", f"{type(error).__name__}: {error}")


def _records(kind: str, text: str) -> Iterator[Any]:
    if kind == ".jsonl":
        for line in text.splitlines():
            if line.strip():
                yield lambda line=line: json.loads(line)
    elif kind == ".json":
        try:
            whole = json.loads(text)
        except ValueError as error:  # one bad file of many is one bad prompt
            message = str(error)
            yield lambda: _raise(message)
            return
        whole = whole.get("Data", whole) if isinstance(whole, dict) else whole
        yield from whole if isinstance(whole, list) else [whole]
    elif kind == ".csv":
        yield from csv.DictReader(io.StringIO(text))
    else:
        yield from (line for line in text.splitlines() if line.strip())


def _raise(message: str) -> None:
    raise ValueError(message)


def _document(record: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    tokens, given = record["tokens"], record["prompt_tokens"]
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens is not a list of token ids")
    if type(given) is not int or not 0 < given <= len(tokens):
        raise ValueError(f"prompt_tokens is {given!r}, of {len(tokens)} tokens")
    return tuple(tokens), given


def render(record: Any) -> str:
    """The prompt of a record. Raises ValueError for one of no known format, or that is empty."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"a record is a {type(record).__name__}, not an object")
    text = _render(record)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _render(record: dict[str, Any]) -> Any:
    if "prompt" in record:
        return record["prompt"]
    if "turns" in record:
        return record["turns"][0]
    question = record.get("question") or record.get("Question")
    if question and record.get("options"):
        options = [o if o.startswith("(") else f"({chr(65 + i)}) {o}" for i, o in enumerate(record["options"])]
        passage = [record["passage"]] if record.get("passage") else []
        return "\n".join([*passage, f"Question: {question}", *options, "Answer:"])
    if "problem" in record:
        return f"Problem: {record['problem']}\nAnswer:"
    if question:
        return f"Question: {question}\nAnswer:"
    if "text" in record:
        return record["text"]
    raise ValueError(f"no known format has the fields {', '.join(map(str, record)) or '(none)'}")
