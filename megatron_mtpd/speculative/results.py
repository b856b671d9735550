"""Results of single prompts on disk: what makes a benchmark resumable and its gathering exact.

A folder holds `settings.json`, which says what was asked for, and one append-only file of JSON lines for each rank. A
line is the result of one prompt in one run; it is whole or it is ignored. Sums of integers are taken over lines, so
they do not depend on how prompts were dealt or how often a job was started again.

Deliberately absent: rates and tables; `report` makes them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import written_whole

SETTINGS = "settings.json"
FOLDER = "results"
Run = int | str
"""A number of heads, or `teacher_forced`."""


class Results:
    """The folder of one benchmark. One writer a rank.

    Raises ValueError when the folder holds results of other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], rank: int) -> None:
        self.directory = directory / FOLDER
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.exists():
            found = json.loads(path.read_text())
            other = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
            if other:
                raise ValueError(
                    f"--output {directory} holds results of other settings ({', '.join(other)}): choose another, "
                    "or delete it."
                )
        elif rank == 0:
            with written_whole(path) as file:
                file.write(json.dumps(settings, indent=1).encode())
        self._path = self.directory / f"rank{rank:05d}.jsonl"
        self._file, self._flushed = None, 0.0

    def append(self, run: Run, prompt: int, **values: Any) -> None:
        """Add the result of a prompt."""
        if self._file is None:
            self._file = self._path.open("a+b")
            self._file.seek(0, os.SEEK_END)
            if self._file.tell():  # a killed writer may have left half a line
                self._file.write(b"\n")
        self._file.write(json.dumps({"run": run, "prompt": prompt, **values}).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._flushed > 5.0:  # a machine that dies loses five seconds
            os.fsync(self._file.fileno())
            self._flushed = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """All results of all ranks, the first of each run and prompt; `rank` says where it comes from."""
        return read_lines(self.directory.parent)

    def done(self) -> set[tuple[Run, int]]:
        """Runs and prompts that need no more work."""
        return {(record["run"], record["prompt"]) for record in self.lines()}


def read_lines(directory: Path) -> Iterator[dict[str, Any]]:
    """As `Results.lines`, of the folder of a benchmark that nobody writes to now."""
    seen = set()
    for path in sorted((directory / FOLDER).glob("rank*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                key = record["run"], record["prompt"]
            except (ValueError, KeyError, TypeError):
                continue
            if key not in seen:
                seen.add(key)
                yield record | {"rank": path.stem}
