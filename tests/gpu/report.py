"""The report: what each GPU test found and when, as a page for people, rendered from a JSON file beside it.

Both are written after every test, so that a command that is killed loses nothing; a later command replaces the tests
that it runs and keeps the others. A skip replaces nothing. A dry run is marked in the title and in every row, and never
shares a file with results of a GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.provenance import provenance

FOLDER = "tests/gpu/"
RAN = ("passed", "failed", "error")


class Report:
    """A plugin of pytest. Raises pytest.UsageError where the file cannot take these results."""

    def __init__(self, page: Path, is_dry: bool, command: str) -> None:
        if page.suffix != ".md":
            raise pytest.UsageError(f"--gpu-report {page}: name the page, FILE.md; its numbers go into FILE.json.")
        self._page, self._data = page, page.with_suffix(".json")
        self._found: dict[str, Any] = {"dry_run": is_dry, "commands": {}, "tests": {}}
        if self._data.exists():
            self._found = json.loads(self._data.read_text())
        if self._found["dry_run"] != is_dry:
            kinds = ("a GPU", "a dry run")
            raise pytest.UsageError(
                f"--gpu-report {page}: {self._data} holds results of {kinds[not is_dry]}, and this is {kinds[is_dry]}: "
                "name another file."
            )
        where = provenance()
        self._command = where["date"]
        self._source = {"command": command, **{name: where[name] for name in ("hardware", "versions")}}
        self._source["commit"] = where["commit"] or os.environ.get("MTPD_COMMIT")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.nodeid.startswith(FOLDER) or (report.when != "call" and report.outcome == "passed"):
            return
        tests, name = self._found["tests"], report.nodeid.removeprefix(FOLDER)
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        if outcome == "skipped" and tests.get(name, {}).get("outcome") in RAN:
            return
        measured = [list(pair) for pair in report.user_properties]
        tests[name] = {
            "outcome": outcome,
            "seconds": round(report.duration, 1),
            "why": _why(report),
            "measured": measured,
            "command": self._command,
        }
        used = {test["command"] for test in tests.values()}
        commands = self._found["commands"] | {self._command: self._source}
        self._found["commands"] = {date: commands[date] for date in sorted(used)}
        self._page.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((self._data, json.dumps(self._found, indent=1)), (self._page, rendered(self._found))):
            with written_whole(path) as file:
                file.write(text.encode() + b"\n")


def _why(report: pytest.TestReport) -> str:
    """The reason of a skip, the first line of a failure's message."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    return next(iter(text.strip().splitlines()), "")


def rendered(found: dict[str, Any]) -> str:
    """The page."""
    dry = " (dry run)" if found["dry_run"] else ""
    numbers = {date: number for number, date in enumerate(found["commands"], 1)}
    lines = ["# GPU report", ""]
    if dry:
        lines = ["# Dry run of the GPU tests", "", "Toy sizes on a CPU: nothing here was measured on a GPU.", ""]
    lines += _table("command", "date", "commit", "hardware", "versions")
    for date, source in found["commands"].items():
        hardware, versions = (", ".join(f"{k} {v}" for k, v in source[x].items()) for x in ("hardware", "versions"))
        lines.append(_row(f"{numbers[date]}: `{source['command']}`", date, source["commit"], hardware, versions))
    lines += ["", "## Tests", "", *_table("test", "outcome", "seconds", "command", "why")]
    for name, test in found["tests"].items():
        lines.append(_row(name, test["outcome"] + dry, test["seconds"], numbers[test["command"]], test["why"]))
    lines += ["", "## Measured", "", *_table("test", "what", "value", "command")]
    for name, test in found["tests"].items():
        lines += [_row(name, what, f"{value}{dry}", numbers[test["command"]]) for what, value in test["measured"]]
    return "\n".join(lines)


def _table(*titles: str) -> list[str]:
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
