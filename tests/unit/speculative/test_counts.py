import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtpd.speculative.counts import Z95, Acceptance, wilson


def test_a_worked_example():
    counts = Acceptance.of_heads(3)
    for drafted, accepted in [(3, 3), (3, 1), (3, 0), (2, 2), (0, 0)]:
        counts.add(drafted, accepted)
    report = counts.report()
    assert report["num_drafts"] == 4
    assert report["num_draft_tokens"] == 11
    assert report["num_accepted_tokens"] == 6
    assert report["num_accepted_tokens_per_pos"] == [3, 2, 1]
    assert report["acceptance_rate"] == [3 / 4, 2 / 3, 1 / 1]  # of the drafts whose earlier tokens were accepted
    assert report["cumulative_acceptance_rate"] == [3 / 4, 2 / 4, 1 / 4]
    assert report["acceptance_length"] == 1 + 6 / 4


def test_no_drafts_have_no_rates():
    report = Acceptance.of_heads(2).report()
    assert report["acceptance_rate"] == [None, None] and report["acceptance_length"] is None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(lambda t: (max(t), min(t))), max_size=30))
def test_counts_add_up_and_are_consistent(steps):
    whole, halves = Acceptance.of_heads(4), [Acceptance.of_heads(4), Acceptance.of_heads(4)]
    for i, step in enumerate(steps):
        whole.add(*step)
        halves[i % 2].add(*step)
    assert halves[0] + halves[1] == whole
    assert whole.num_accepted_tokens == sum(accepted for _, accepted in steps)
    accepted, reached = whole.num_accepted_tokens_per_pos, whole.num_reached_per_pos
    assert all(a <= r for a, r in zip(accepted, reached, strict=True))
    assert all(later <= earlier for earlier, later in pairwise(accepted))


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_rates_that_are_not_rejected(trial):
    """Wilson's bounds are where the score test just rejects: |p - p0| = z * sqrt(p0 (1 - p0) / n)."""
    successes, n = trial
    low, high = wilson(successes, n) or (1.0, 0.0)
    p = successes / n
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(p - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)
