"""Count what was read, and what could not be: nothing is dropped without a number and an example.

A bad record (invalid UTF-8, invalid JSON, no text in it) counts by reason, keeps its first places for the
report, and too many of them are an error. An empty document is counted and reported too, but it is not bad:
it holds nothing that could be lost, and every Python package has empty files.

Absent on purpose: repairing a record.
"""

from collections import Counter, defaultdict

EMPTY = "empty document"
EXAMPLES = 3  # places kept for each reason
HOPELESS = 1000  # this many records without one document: the wrong key or format, not bad luck


class BadRecord(Exception):
    """A record that gives no document: `reason`, the same words for all of its kind, and `detail`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both as arguments: it travels between processes by pickle
        self.reason, self.detail = reason, detail


class Tally:
    """Counts of a run, and the judgement whether its bad records are too many.

    max_bad: "100", at most so many records, judged at once; or "1%", at most this share of all, judged at the
        end. Raises ValueError when `max_bad` is neither, and from `bad` and `finish` when there are too many.
    """

    def __init__(self, max_bad: str | int = "1%") -> None:
        self.max_bad = str(max_bad).strip()
        number = self.max_bad.removesuffix("%")
        self._is_share = number != self.max_bad
        try:
            self._limit = float(number) if self._is_share else int(number)
        except ValueError:
            self._limit = -1.0
        if not 0 <= self._limit <= (100 if self._is_share else float("inf")):
            raise ValueError(f"--max-bad {max_bad}: give a number of records (100) or a share of them (1%)")
        self.documents = 0
        self.text_bytes = 0
        self.empty = 0
        self.reasons: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    @property
    def bad_records(self) -> int:
        return sum(self.reasons.values())

    @property
    def records(self) -> int:
        return self.documents + self.empty + self.bad_records

    def good(self, documents: int, text_bytes: int) -> None:
        self.documents += documents
        self.text_bytes += text_bytes

    def bad(self, where: str, bad: BadRecord) -> None:
        if len(self.examples[bad.reason]) < EXAMPLES:
            place = f"{where}: {bad.detail}" if bad.detail else where
            self.examples[bad.reason].append(place.encode(errors="backslashreplace").decode())
        if bad.reason == EMPTY:
            self.empty += 1
        else:
            self.reasons[bad.reason] += 1
            if not self._is_share and self.bad_records > self._limit:
                raise self._too_many()
        if not self.documents and self.records == HOPELESS:
            raise self._nothing(f"no document among the first {HOPELESS} records")

    def finish(self) -> None:
        """All has been read: judge the share of bad records, and that there is anything at all."""
        if self._is_share and self.bad_records * 100 > self._limit * self.records:
            raise self._too_many()
        if not self.documents:
            raise self._nothing(f"no document in {self.records} records")

    def as_dict(self) -> dict:
        return {
            "records": self.records,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "empty": self.empty,
            "bad": dict(sorted(self.reasons.items())),
            "first_skipped": {reason: list(places) for reason, places in sorted(self.examples.items())},
            "max_bad": self.max_bad,
        }

    def report(self) -> str:
        return report(self.as_dict())

    def _too_many(self) -> ValueError:
        return ValueError(
            f"too many bad records: {self.bad_records} of {self.records}, --max-bad allows {self.max_bad}; "
            f"mend the input, or allow more\n{self.report()}"
        )

    def _nothing(self, found: str) -> ValueError:
        return ValueError(f"{found}; check --input, --format and --json-key\n{self.report()}".rstrip())


def report(counts: dict) -> str:
    """`Tally.as_dict()` for a person: each reason and its first places; "" if nothing was skipped."""
    reasons = sorted(counts["bad"].items(), key=lambda item: -item[1])
    if counts["empty"]:
        reasons.append((EMPTY, counts["empty"]))
    lines = []
    for reason, count in reasons:
        lines.append(f"  {reason}: {count}" + (f", the first {EXAMPLES}:" if count > EXAMPLES else ""))
        lines += [f"    {place}" for place in counts["first_skipped"][reason]]
    if lines:
        lines.insert(0, f"skipped {sum(count for _, count in reasons)} of {counts['records']} records")
    return "\n".join(lines)
