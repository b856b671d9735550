"""Which rank ended a step, and which rank hung, read from the log of its ranks (`srun --label`, `rank.py`).

    python slurm/explain.py runs/dense-2b/logs/pretrain_mtpd-1234-0.log --ranks-per-node 8 --nodes node1,node2

The rank to look at is the first one with an error that is not about waiting for another. Where every error is, some
rank hung or died without a word: what it was doing shows in the stack that it left when the step was ended, and it is
the one whose stack is like no other's.

Deliberately absent: GPU kernels. What NCCL waited for is in the flight recorder's files, see slurm/README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

WAITED = re.compile(r"time[d ]*out|connection (was )?(closed|reset)|broken pipe|DistBackendError|socket", re.IGNORECASE)
"""Errors of a rank that waited for another."""
GROUPS_SHOWN, FRAMES_SHOWN = 3, 10


@dataclass
class Rank:
    """What a rank wrote about its end."""

    traceback: list[str] = field(default_factory=list)
    """The last traceback, from its first frame to the line of the error."""
    stack: list[str] = field(default_factory=list)
    """The main thread when the rank was ended, the innermost frame first."""

    @property
    def error(self) -> str:
        """The line that names the error; empty without one."""
        return self.traceback[-1] if self.traceback and not self.traceback[-1].startswith(" ") else ""


def read(lines: Iterable[str]) -> dict[int, Rank]:
    """What ranks wrote about their ends, in the order in which they ended."""
    ranks: dict[int, Rank] = {}
    reading: dict[int, list[str]] = {}  # what the next line of a rank is added to
    for line in lines:
        match = re.match(r"\s*(\d+): (?:\[rank\d+\]: )?(.*)", line)  # the second label is torch's
        if not match:
            continue
        number, text = int(match[1]), match[2]
        if text.startswith("Traceback (most recent call last)"):
            reading[number] = ranks.setdefault(number, Rank()).traceback
            reading[number].clear()
        elif text.startswith(("Thread 0x", "Current thread 0x")):  # the main thread comes last
            reading[number] = ranks.setdefault(number, Rank()).stack
            reading[number].clear()
        elif number in reading:
            reading[number].append(text)
            if not text.startswith(" "):
                del reading[number]
    for rank in ranks.values():
        rank.stack = [frame for frame in rank.stack if frame.startswith("  File ")]
    return ranks


def explain(ranks: dict[int, Rank], node: dict[int, str]) -> list[str]:
    """Lines for a person, from what the ranks wrote; empty when that tells nothing. `node` names the node of a rank."""
    failed = {number: rank for number, rank in ranks.items() if rank.error}
    causes = {number: rank for number, rank in failed.items() if not WAITED.search(rank.error)}
    if not failed:
        return _where_they_were(ranks, node)
    number, rank = next(iter((causes or failed).items()))
    frames = [line for line in rank.traceback[:-1] if line.startswith("  File ")]
    lines = [f"Rank {number} on {node.get(number, 'its node')} failed first: {rank.error}", *frames[-FRAMES_SHOWN:]]
    return lines if causes else [*lines, "It waited for another rank.", *_where_they_were(ranks, node)]


def _where_they_were(ranks: dict[int, Rank], node: dict[int, str]) -> list[str]:
    """The ranks that were ended, those that did the same together, the rarest first."""
    alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, rank in ranks.items():
        if rank.stack and not rank.error:
            alike[tuple(rank.stack)].append(number)
    lines = []
    for stack, numbers in sorted(alike.items(), key=lambda group: len(group[1]))[:GROUPS_SHOWN]:
        who = ", ".join(f"{number} on {node.get(number, 'its node')}" for number in numbers[:4])
        more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
        lines += [f"Rank {who}{more} was here when the step was ended:", *stack[:FRAMES_SHOWN]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("log", type=Path, help="what `srun --label` wrote")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="[%(default)s]")
    parser.add_argument("--nodes", default="", metavar="A,B", help="their names, in the order of the ranks")
    options = parser.parse_args()
    with open(options.log, errors="replace") as file:
        ranks = read(file)
    names = [name for name in options.nodes.split(",") for _ in range(options.ranks_per_node)]
    lines = explain(ranks, dict(enumerate(names)))
    print("\n".join(lines))
    sys.exit(0 if lines else 1)


if __name__ == "__main__":
    main()
