"""What a speculative step costs, and which number of heads is fastest.

A step of K heads drafts in K passes of a head, the k-th over up to k positions or more, and verifies K + 1 positions in
one pass. So its time is close to `base + head * K + position * K (K + 1) / 2`: `base` is a plain step, `head` what a
head's pass and one more verified position cost whatever they compute, `position` what each position adds. It yields
1 + CAR_1 + .. + CAR_K tokens. The fastest K maximises tokens over time.

The three are fitted to measured times by least squares without negative values: with two measurements the last is 0.

Deliberately absent: how the cost grows with context length and batch size: measure where you will serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of one sequence: `base + head * K + position * K (K + 1) / 2`."""

    base: float
    head: float
    position: float

    def seconds(self, num_heads: int) -> float:
        return self.base + self.head * num_heads + self.position * num_heads * (num_heads + 1) / 2

    def tokens_per_second(self, cumulative_acceptance: Sequence[float], num_heads: int) -> float:
        """Expected speed with `num_heads` heads; `cumulative_acceptance` holds CAR_1, CAR_2, .. at least so far."""
        return (1 + sum(cumulative_acceptance[:num_heads])) / self.seconds(num_heads)

    def best_num_heads(self, cumulative_acceptance: Sequence[float]) -> int:
        """The number of heads, 0 to all, with the highest expected speed."""
        sizes = range(len(cumulative_acceptance) + 1)
        return max(sizes, key=lambda k: self.tokens_per_second(cumulative_acceptance, k))


def fit(seconds: Mapping[int, float]) -> StepCost:
    """The cost from measured seconds a step, by number of heads. Raises ValueError with fewer than two of them."""
    if len(seconds) < 2:
        raise ValueError("The cost of a step needs measurements with at least two numbers of heads.")
    heads = np.array(sorted(seconds), dtype=float)
    times = np.array([seconds[int(k)] for k in heads])
    columns = np.stack([np.ones_like(heads), heads, heads * (heads + 1) / 2], 1)
    # Relative errors: timings scatter in proportion. Every subset of the columns is tried, and the best without a
    # negative value is taken, which for three columns is simpler than a general solver.
    best, best_error = np.array([times.mean(), 0.0, 0.0]), np.inf
    for used in ([0], [0, 1], [0, 2], [0, 1, 2]):
        if len(used) > len(heads):
            continue
        values, *_ = np.linalg.lstsq(columns[:, used] / times[:, None], np.ones_like(times), rcond=None)
        error = float((((columns[:, used] @ values) / times - 1) ** 2).sum())
        if (values >= 0).all() and error < best_error - 1e-12:
            best, best_error = np.zeros(3), error
            best[used] = values
    return StepCost(*map(float, best))
