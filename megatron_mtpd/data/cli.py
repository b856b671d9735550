"""What the commands in tools/ share: the flags that name text, and how a run ends.

A command that fails for a reason the user can mend says so in one line and ends with status 2; Ctrl-C and
SIGTERM end it with status 130 after its partial files are gone. Anything else is a bug and shows its
traceback.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from megatron_mtpd.data.stdlib_corpus import stdlib_corpus
from megatron_mtpd.data.text import FORMATS, SPLITS, TextFiles

STDLIB = "python-stdlib"


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that `take_corpus` reads, and those for what cannot be read."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders, plain or compressed (.gz, .bz2, .xz, .zst); folders are read recursively, in "
        f"the order of their paths, without hidden files; {STDLIB}: the sources of Python's own library",
    )
    group.add_argument(
        "--suffix",
        nargs="+",
        default=[],
        metavar="S",
        help="of a folder, take files ending so: --suffix .py .md",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="auto (default): .jsonl and .ndjson files hold a JSON document a line, all others are text",
    )
    group.add_argument(
        "--json-key", default="text", metavar="KEY", help="where a JSON line holds its text, or its token ids (text)"
    )
    group.add_argument(
        "--split",
        choices=SPLITS,
        default="file",
        help="what a document is in a text file (default: the whole file)",
    )
    group.add_argument(
        "--max-bad",
        default="1%",
        metavar="N|P%",
        help="more bad records (invalid UTF-8 or JSON, no text at the key) are an error (default: 1%%)",
    )
    group.add_argument("--strict", action="store_const", const="0", dest="max_bad", help="the same as --max-bad 0")


def take_corpus(options: dict[str, Any]) -> TextFiles:
    """The text that the flags name; takes those flags out of `options`, but `max_bad`. Raises ValueError."""
    inputs, suffixes = options.pop("input"), options.pop("suffix")
    reading = {name: options.pop(name) for name in ("format", "split", "json_key")}
    if STDLIB in inputs:
        if len(inputs) > 1:
            raise ValueError(f"--input {STDLIB} stands alone; to mix it with other text give its folder")
        return stdlib_corpus()
    return TextFiles(inputs, suffixes=suffixes, **reading)


def run(parser: argparse.ArgumentParser, command: Callable[[], str]) -> int:
    """Run `command`, print what it returns, and give the exit status."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as Ctrl-C does, not in mid-air
    try:
        print(command())
        return 0
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; no output was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
