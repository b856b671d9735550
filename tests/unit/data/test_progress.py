import io
import re

from megatron_mtpd.data.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_in_a_log():
    log = io.StringIO()
    progress = Progress("reading", 4_000_000, stream=log, every=0)
    progress.update(1_000_000, 50, 2_000_000)
    progress.update(4_000_000, 200, 8_000_000)
    progress.close()
    first, last = log.getvalue().splitlines()
    assert re.fullmatch(r"reading: 25% \| 50 documents, [\d,]+ documents/s, [\d.,]+ MB/s \| \d:\d\d:\d\d left", first)
    assert last.startswith("reading: 100% | 200 documents") and last.endswith("0:00:00 left")


def test_few_lines_in_a_log():
    log = io.StringIO()
    progress = Progress("reading", 100, stream=log, every=3600)
    progress.update(50, 1, 1)
    assert log.getvalue() == ""


def test_a_bar_on_a_terminal():
    terminal = Terminal()
    progress = Progress("reading", 100, stream=terminal)
    progress.update(50, 10, 100)
    progress.update(100, 20, 200)
    progress.close()
    assert re.search(
        r"reading: 100% \|[█#]+\| \d\d:\d\d<\d\d:\d\d, 20 documents, [\d,]+ documents/s, [\d.]+ MB/s",
        terminal.getvalue(),
    )


def test_silence_when_not_wanted():
    terminal = Terminal()
    progress = Progress("reading", 100, stream=terminal, every=0, enabled=False)
    progress.update(50, 10, 100)
    progress.close()
    assert terminal.getvalue() == ""
