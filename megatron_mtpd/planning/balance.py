"""A pipeline layout in which no stage waits: contiguous layers for every stage, the last one with heads and loss.

Layers travel in blocks, an attention with the MLP or experts after it, because stages are cut where blocks meet.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import cache


def blocks(layers: str) -> list[str]:
    """`*-*E` -> [`*-`, `*E`]: every block ends before the next attention."""
    return re.findall(r"[*+]?[^*+]*", layers)[:-1] if layers else []


def balanced(layers: str, work: Sequence[float], end: float, stages: int) -> tuple[str, ...]:
    """Layers of each of `stages` stages, such that the slowest is as fast as can be, and among those the sum of squares
    least. `work` is that of each layer, `end` that of heads and loss, on the last stage.

    Raises ValueError where there are fewer blocks than stages.
    """
    parts = blocks(layers)
    if len(parts) < stages:
        raise ValueError(
            f"{len(parts)} blocks of layers cannot fill {stages} pipeline stages: lower --pipeline-model-parallel-size."
        )
    each = iter(work)
    before = [0.0, *itertools.accumulate(sum(next(each) for _ in part) for part in parts)]

    @cache
    def best(start: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(slowest, sum of squares, cuts) of the stages from block `start` on."""
        if left == 1:
            load = before[-1] - before[start] + end
            return load, load**2, ()
        choices = []
        for stop in range(start + 1, len(parts) - left + 2):
            load = before[stop] - before[start]
            slowest, squares, cuts = best(stop, left - 1)
            choices.append((max(load, slowest), squares + load**2, (stop, *cuts)))
        return min(choices)

    cuts = (0, *best(0, stages)[2], len(parts))
    return tuple("".join(parts[a:b]) for a, b in itertools.pairwise(cuts))


def pattern(stages: Sequence[str], head: str, heads: int) -> str:
    """The value of --hybrid-layer-pattern."""
    return "|".join(stages) + ("/" + head) * heads


def short_flags(stages: Sequence[str]) -> str | None:
    """`--decoder-first-...` and `--decoder-last-pipeline-num-layers` that say the same; None where they cannot."""
    if len(stages) < 2 or len({block for stage in stages for block in blocks(stage)}) != 1:
        return None
    sizes = [len(blocks(stage)) for stage in stages]
    first, middle, last = sizes[0], sizes[1:-1], sizes[-1]
    if len(set(middle)) > 1:
        return None
    flags = []
    if middle and first != middle[0]:
        flags.append(f"--decoder-first-pipeline-num-layers {first}")
    if not middle or last != middle[0]:
        flags.append(f"--decoder-last-pipeline-num-layers {last}")
    return " ".join(flags)
