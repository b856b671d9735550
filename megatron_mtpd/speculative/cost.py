"""What a speculative step costs, what it yields, and so which number of heads is fastest.

With K heads of cumulative acceptance CAR_1 .. CAR_K, a step

    yields    1 + CAR_1 + .. + CAR_K tokens,
    drafts    in head * K + position * P(K) seconds,   P(K) = K (K + 1) / 2 + sum_j j CAR_j,
    verifies  in base + token * K seconds:  a plain step, and K more tokens in the same pass.

`head` is what a head's pass costs whatever it computes, `position` what each position of it adds. P(K) counts these: a
step that follows a accepted drafts recomputes max(a + 1, k) positions of head k (see `decoder`), and the expectation of
that over a, summed over k, is P(K). The fastest K maximises tokens over seconds.

The four are fitted to measured times by least squares of relative errors, without negative values.

Deliberately absent: how the cost grows with context length and batch size: measure where you will serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


def tokens_per_step(cumulative_acceptance: Sequence[float], num_heads: int) -> float:
    """Expected tokens of a step; `cumulative_acceptance` holds CAR_1, CAR_2, .. at least so far."""
    return 1 + sum(cumulative_acceptance[:num_heads])


def drafted_positions(cumulative_acceptance: Sequence[float], num_heads: int) -> float:
    """P(K), the expected positions that the heads compute in a step of one sequence."""
    rates = cumulative_acceptance[:num_heads]
    return num_heads * (num_heads + 1) / 2 + sum(j * rate for j, rate in enumerate(rates, 1))


@dataclass(frozen=True)
class StepCost:
    """Seconds of the parts of a step of one sequence, as above."""

    base: float
    token: float
    head: float
    position: float

    def draft_seconds(self, cumulative_acceptance: Sequence[float], num_heads: int) -> float:
        return self.head * num_heads + self.position * drafted_positions(cumulative_acceptance, num_heads)

    def verify_seconds(self, num_heads: int) -> float:
        return self.base + self.token * num_heads

    def tokens_per_second(self, cumulative_acceptance: Sequence[float], num_heads: int) -> float:
        """Expected speed with `num_heads` heads."""
        seconds = self.draft_seconds(cumulative_acceptance, num_heads) + self.verify_seconds(num_heads)
        return tokens_per_step(cumulative_acceptance, num_heads) / seconds

    def best_num_heads(self, cumulative_acceptance: Sequence[float]) -> int:
        """The number of heads, 0 to all, with the highest expected speed."""
        sizes = range(len(cumulative_acceptance) + 1)
        return max(sizes, key=lambda k: self.tokens_per_second(cumulative_acceptance, k))


def fit(draft: Mapping[int, float], verify: Mapping[int, float], cumulative_acceptance: Sequence[float]) -> StepCost:
    """The cost from measured seconds a step of drafting and of the rest, by number of heads.

    Raises ValueError with fewer than two numbers of heads.
    """
    if len(verify) < 2 or draft.keys() != verify.keys():
        raise ValueError("The cost of a step needs measurements with at least two numbers of heads.")
    used = sorted(k for k in draft if k)
    base, token = _fit([[1.0, float(k)] for k in sorted(verify)], [verify[k] for k in sorted(verify)])
    head, position = _fit(
        [[float(k), drafted_positions(cumulative_acceptance, k)] for k in used], [draft[k] for k in used]
    )
    return StepCost(base, token, head, position)


def _fit(rows: list[list[float]], seconds: list[float]) -> list[float]:
    """Coefficients >= 0 of the two columns, with the least relative errors (timings scatter in proportion).

    Every subset of the columns is tried, which for two is simpler than a general solver; one row fits the first alone.
    """
    table, times = np.array(rows), np.array(seconds)
    best, best_error = np.zeros(2), np.inf
    for size in range(1, min(2, len(rows)) + 1):
        for used in map(list, combinations(range(2), size)):
            values, *_ = np.linalg.lstsq(table[:, used] / times[:, None], np.ones_like(times), rcond=None)
            error = float(((table[:, used] @ values / times - 1) ** 2).sum())
            if (values >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(2), error
                best[used] = values
    return best.tolist()
