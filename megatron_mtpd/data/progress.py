"""Say how far a long read has come: a bar on a terminal, a line now and then in a log.

Contract: `update` takes running totals, so a late or skipped call loses nothing. The share done is that of
the bytes on disk, which are known beforehand; the rates are those of documents and of the text inside,
averaged over the whole run.

Absent on purpose: more than one bar at a time.
"""

import sys
import time
from datetime import timedelta
from typing import IO

from tqdm import tqdm


class Progress:
    """label: what is going on; total_bytes: to read, on disk; every: seconds between the lines of a log."""

    def __init__(
        self,
        label: str,
        total_bytes: int,
        *,
        stream: IO[str] | None = None,
        every: float = 10.0,
        enabled: bool = True,
    ) -> None:
        self._label, self._total, self._every, self._enabled = label, total_bytes, every, enabled
        self._stream = stream or sys.stderr
        self._start = self._said = time.monotonic()
        self._bar = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                desc=label,
                total=total_bytes,
                file=self._stream,
                bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}",
            )

    def update(self, position: int, documents: int, text_bytes: int) -> None:
        """Totals so far: bytes on disk consumed, documents read, bytes of their text."""
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        speed = f"{documents / elapsed:,.0f} documents/s, {text_bytes / elapsed / 1e6:.1f} MB/s"
        rates = f"{documents:,} documents, {speed}"
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(position - self._bar.n)
        elif self._enabled and now - self._said >= self._every:
            self._said = now
            left = elapsed * (self._total - position) / max(position, 1)
            percent = 100 * position / max(self._total, 1)
            line = f"{self._label}: {percent:.0f}% | {rates} | {timedelta(seconds=round(left))} left"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
