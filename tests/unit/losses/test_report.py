"""What is counted, by hand on drafts of known fate; the fields of the whole report are checked in test_eager.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mtpd.losses.report import LossReport, acceptance
from tests.unit.losses import naive

# Main head's argmax is token 0 everywhere. Five drafts (positions) of three heads: which heads agree with it.
AGREES = [[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]]


def logits_for(tokens: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """[positions, 1, 4] with these tokens on top."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 4).unsqueeze(1).to(dtype)


def known_drafts(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    teachers = [logits_for([0] * 5, dtype)] * 3
    students = [logits_for([0 if draft[k] else 2 for draft in AGREES], dtype) for k in range(3)]
    return teachers, students


def counts(report: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: report[name].tolist() for name in ("drafted", "accepted", "reached", "cumulative", "tokens_per_step")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_drafts_of_known_fate(dtype):
    report = acceptance(*known_drafts(dtype), torch.ones(3, 5, 1))
    assert counts(report) == {
        "drafted": [5, 5, 5],
        "accepted": [4, 4, 4],  # each head by itself
        "reached": [5, 4, 3],  # the heads before it were all accepted
        "cumulative": [4, 3, 2],
        "tokens_per_step": 4 + 2 + 1 + 3 + 4,
    }
    assert all(x.dtype == torch.float32 for x in report.values())


def test_a_draft_ends_where_a_head_has_no_target():
    masks = torch.ones(3, 5, 1)
    masks[2, 0] = 0  # draft 0 has two heads
    masks[1, 3] = 0  # draft 3 has one, though head 3 would have a target (as with --mtpd-cross-documents)
    masks[0, 4] = 0  # draft 4 has none
    report = acceptance(*known_drafts(), masks)
    assert counts(report) == {
        "drafted": [4, 3, 2],
        "accepted": [3, 2, 2],
        "reached": [4, 2, 0],
        "cumulative": [3, 1, 0],
        "tokens_per_step": 2 + 1,  # of the drafts of full length, 1 and 2
    }


def test_no_drafts():
    report = acceptance(*known_drafts(), torch.zeros(3, 5, 1))
    assert not any(x.any() for x in report.values())


def test_a_tie_is_one_token_for_both():
    """Equal logits: the lowest id is taken in main head and head alike, so agreement does not depend on the device."""
    teacher = torch.tensor([[[1.0, 3.0, 3.0]], [[3.0, 3.0, 3.0]]])
    student = torch.tensor([[[0.0, 5.0, 5.0]], [[1.0, 2.0, 2.0]]])
    assert acceptance([teacher], [student], torch.ones(1, 2, 1))["accepted"].tolist() == [1]


def test_overlaps_are_probabilities_of_sampled_drafts():
    generator = torch.Generator().manual_seed(0)
    teachers = [torch.randn(4, 2, 7, generator=generator) for _ in range(3)]
    students = [t + torch.randn(4, 2, 7, generator=generator) for t in teachers]
    report = acceptance(teachers, students, torch.ones(3, 4, 2))
    alphas = torch.stack(
        [naive.rows(naive.acceptance, t.double(), z.double()) for t, z in zip(teachers, students, strict=True)]
    )
    chain = alphas.cumprod(0)
    # Eight fp32 sums of probabilities: 1e-7 each.
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(report["overlap"].double(), alphas.sum((1, 2)), **close)
    torch.testing.assert_close(report["cumulative_overlap"].double(), chain.sum((1, 2)), **close)
    torch.testing.assert_close(report["tokens_per_step_sampled"].double(), (1 + chain.sum(0)).sum(), **close)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_masked_position_holds_is_not_counted(bad):
    teachers, students = known_drafts()
    masks = torch.ones(3, 5, 1)
    masks[:, 1] = 0
    masks[2, 3] = 0
    clean = acceptance(teachers, students, masks)
    teachers, students = ([x.clone() for x in group] for group in (teachers, students))
    for x in (*teachers, *students):
        x[1] = bad
    teachers[2][3] = students[2][3] = bad
    dirty = acceptance(teachers, students, masks)
    assert all(torch.equal(dirty[name], clean[name]) for name in clean)


def test_no_graph_is_kept():
    teachers, students = known_drafts()
    report = acceptance(teachers, [z.requires_grad_() for z in students], torch.ones(3, 5, 1))
    assert not any(x.requires_grad for x in report.values())


def test_the_fields_are_those_that_the_report_has():
    names = set(acceptance(*known_drafts(), torch.ones(3, 5, 1)))
    assert names == set(LossReport._fields[LossReport._fields.index("drafted") :])
