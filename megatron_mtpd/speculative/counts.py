"""Acceptance as serving engines count it, with the confidence interval of each rate.

Names: those of vLLM's metrics (`num_drafts`, `num_draft_tokens`, `num_accepted_tokens`, `num_accepted_tokens_per_pos`).
A *draft* is one speculative step of one sequence. AR_k is the share of accepted tokens among those of head k whose
earlier heads were all accepted; CAR_k is the share of drafts whose first k tokens were accepted. Like vLLM, what a step
accepts counts whole, also where the output is then cut at its length or at an end-of-document token.

Deliberately absent: time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Z95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


@dataclass
class Acceptance:
    """Counts of one or many sequences; they add up exactly with `+`. Lists have one entry a head."""

    num_drafts: int = 0
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)
    num_reached_per_pos: list[int] = field(default_factory=list)
    """Drafted tokens of head k whose earlier heads were all accepted."""
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    @classmethod
    def of_heads(cls, num_heads: int) -> Acceptance:
        return cls(0, [0] * num_heads, [0] * num_heads, [0] * num_heads)

    def add(self, drafted: int, accepted: int) -> None:
        """One step: `drafted` tokens were proposed, the first `accepted` of them were accepted."""
        if not drafted:
            return
        self.num_drafts += 1
        for k in range(drafted):
            self.num_draft_tokens_per_pos[k] += 1
            self.num_reached_per_pos[k] += k <= accepted
            self.num_accepted_tokens_per_pos[k] += k < accepted

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(
            self.num_drafts + other.num_drafts,
            *(
                [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)]
                for name in ("num_draft_tokens_per_pos", "num_reached_per_pos", "num_accepted_tokens_per_pos")
            ),
        )

    @property
    def num_draft_tokens(self) -> int:
        return sum(self.num_draft_tokens_per_pos)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_tokens_per_pos)

    def report(self) -> dict[str, Any]:
        """Counts, rates and their 95% intervals, by the names of `acceptance.json`. A rate of nothing is None."""
        accepted, reached = self.num_accepted_tokens_per_pos, self.num_reached_per_pos
        conditional = list(zip(accepted, reached, strict=True))
        cumulative = [(a, self.num_drafts) for a in accepted]
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_accepted_tokens_per_pos": accepted,
            "acceptance_rate": [rate(*pair) for pair in conditional],
            "acceptance_rate_interval": [wilson(*pair) for pair in conditional],
            "cumulative_acceptance_rate": [rate(*pair) for pair in cumulative],
            "cumulative_acceptance_rate_interval": [wilson(*pair) for pair in cumulative],
            "acceptance_length": 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None,
        }


def rate(successes: int, trials: int) -> float | None:
    return successes / trials if trials else None


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float] | None:
    """Wilson's score interval of a rate (1927): right also near 0 and 1, and for few trials.

    Trials are taken as independent. The tokens of one text are not quite, so the true interval is somewhat wider.
    """
    if not trials:
        return None
    p, weight = successes / trials, z * z / trials
    centre = (p + weight / 2) / (1 + weight)
    half = z * ((p * (1 - p) + weight / 4) / trials) ** 0.5 / (1 + weight)
    # At the ends the exact bounds are 0 and 1; rounding would miss them.
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half
