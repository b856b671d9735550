"""Every objective, value and gradient, against the naive forms in float64 (`naive.py`).

Two tolerances. In float64 both sides do some tens of additions and logarithms in another order: differences of 1e-15,
and 1e-11 leaves room for the cancellation in a divergence near zero while any wrong term would show. For logits of a
lower dtype the oracle gets the same rounded logits in float64, so what is left is our fp32 arithmetic (`FP32`).
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mtpd.config import MTPDConfig, Objective
from megatron_mtpd.losses import objectives
from tests.unit.losses import naive

INF = float("inf")
PAIRWISE: list[Objective] = ["topn_kl", "kl", "reverse_kl", "tv", "lk"]
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
# Log-probabilities of size 10 are rounded to 5e-7 each in fp32, and a divergence is a mean of differences of two.
FP32: dict[str, Any] = {"rtol": 1e-5, "atol": 3e-6}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = 2.0 * torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return teacher, student.requires_grad_()


def value_and_gradient(losses: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).reshape(losses.shape)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), student)
    return losses.detach(), gradient


def check(config: MTPDConfig, teacher: Tensor, student: Tensor, tolerance=EXACT) -> None:
    options = {"n": config.top_n, "temperature": config.temperature, "eta": config.lk_eta}
    ours, gradient = value_and_gradient(objectives.distillation(teacher, student, config), student)
    wide = student.detach().double().requires_grad_()
    function = lambda t, z: naive.objective(config.objective, t, z, **options)  # noqa: E731
    theirs, expected = value_and_gradient(naive.rows(function, teacher.double(), wide), wide)
    assert ours.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == student.dtype
    torch.testing.assert_close(ours.double(), theirs, **tolerance)
    # A gradient is rounded once more, to the dtype of the logits.
    eps = torch.finfo(student.dtype).eps
    torch.testing.assert_close(
        gradient.double(), expected, rtol=tolerance["rtol"] + eps, atol=tolerance["atol"] + eps / 64
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("objective", PAIRWISE)
def test_value_and_gradient(objective, temperature):
    check(MTPDConfig.as_published(objective=objective, top_n=5, temperature=temperature), *logits(3, 2, 13))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", PAIRWISE)
def test_lower_precision_is_fp32_inside(objective, dtype):
    check(MTPDConfig.as_published(objective=objective, top_n=9), *logits(4, 41, dtype=dtype), FP32)


@pytest.mark.parametrize("n", [*range(1, 8), 100])
def test_every_n_from_one_to_beyond_the_vocabulary(n):
    teacher, student = logits(4, 7)
    check(MTPDConfig.as_published(top_n=n), teacher, student)
    if n >= 7:  # then it is the full KL
        full = objectives.distillation(teacher, student, MTPDConfig.as_published(objective="kl"))
        torch.testing.assert_close(objectives.topn_kl(teacher, student, n), full, **EXACT)


def test_as_its_docstring_says_in_plain_pytorch():
    teacher, student = logits(3, 2, 30)
    ids = teacher.topk(8).indices
    plain = F.kl_div(
        student.gather(-1, ids).log_softmax(-1),
        teacher.gather(-1, ids).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    ours, gradient = value_and_gradient(objectives.topn_kl(teacher, student, 8), student)
    expected, expected_gradient = value_and_gradient(plain, student)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_ties_at_the_threshold_are_all_in_the_set(n, dtype):
    teacher = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [3, 2, 2, 2, 1, 0, 0, -1], [0, -0.0, 0, 5, -0.0, -1, -2, -3]])
    teacher = teacher.to(dtype)
    student = logits(3, 8, dtype=dtype)[1]
    check(MTPDConfig.as_published(top_n=n), teacher, student, EXACT if dtype == torch.float64 else FP32)
    gradient = value_and_gradient(objectives.topn_kl(teacher, student, n), student)[1]
    inside = torch.tensor([[i in naive.top_set(row, n) for i in range(8)] for row in teacher])
    assert not gradient[~inside].any()  # no gradient reaches a token outside the set


def test_the_set_is_that_of_the_logits_as_they_came():
    # 1.001 and 1.0 are equal in bf16: tied for the model, so both are distilled.
    teacher = torch.tensor([[1.001, 1.0, -1.0]])
    student = torch.tensor([[0.0, 1.0, 0.5]])
    assert objectives.topn_kl(teacher, student, 1).item() == 0.0  # one token: nothing to compare
    in_bf16 = objectives.topn_kl(teacher.bfloat16(), student.bfloat16(), 1)
    torch.testing.assert_close(in_bf16, objectives.topn_kl(torch.tensor([[1.0, 1.0]]), student[:, :2], 2))


@pytest.mark.parametrize("n", [1, 4, 6, 7, 9])  # below, at and above the number of tokens that can be
@pytest.mark.parametrize("objective", PAIRWISE)
def test_tokens_that_cannot_be_are_not_there(objective, n):
    """-inf in both rows, as for the padded end of a vocabulary: the result is that of the vocabulary without them."""
    teacher, student = logits(3, 9)
    impossible = torch.tensor([False, True, False, False, False, True, False, True, False])
    config = MTPDConfig.as_published(objective=objective, top_n=n)
    short = student.detach()[:, ~impossible].requires_grad_()
    expected, expected_gradient = value_and_gradient(
        objectives.distillation(teacher[:, ~impossible], short, config), short
    )
    teacher, student = (x.detach().masked_fill(impossible, -INF) for x in (teacher, student))
    ours, gradient = value_and_gradient(objectives.distillation(teacher, student.requires_grad_(), config), student)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(gradient[:, ~impossible], expected_gradient, **EXACT)
    assert not gradient[:, impossible].any()


@pytest.mark.parametrize("objective", ["topn_kl", "kl", "tv", "lk"])
def test_what_only_the_teacher_rules_out_gives_finite_gradients(objective):
    teacher, student = logits(3, 9)
    teacher[:, 2] = -INF
    losses, gradient = value_and_gradient(
        objectives.distillation(teacher, student, MTPDConfig.as_published(objective=objective, top_n=9)), student
    )
    assert losses.isfinite().all() and gradient.isfinite().all()
    # top_n covers the vocabulary, so the student still has to take its mass away from token 2.
    assert (gradient[:, 2] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("objective", PAIRWISE)
def test_large_logits_neither_overflow_nor_lose_the_gradient(objective, dtype):
    largest = 60_000.0 if dtype == torch.float16 else 1e30
    teacher = torch.tensor([[largest, 0.0, -largest], [largest, largest, 0.0]], dtype=dtype)
    student = torch.tensor([[largest, -largest, 0.0], [0.0, 1.0, 2.0]], dtype=dtype, requires_grad=True)
    losses, gradient = value_and_gradient(
        objectives.distillation(teacher, student, MTPDConfig.as_published(objective=objective, top_n=2)), student
    )
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("objective", PAIRWISE)
def test_an_equal_student_is_at_the_minimum(objective):
    teacher = logits(5, 17)[0]
    student = teacher.clone().requires_grad_()
    losses, gradient = value_and_gradient(
        objectives.distillation(teacher, student, MTPDConfig.as_published(objective=objective, top_n=6)), student
    )
    # Zero up to the rounding of sums that are 1.
    torch.testing.assert_close(losses, torch.zeros_like(losses), **EXACT)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


@pytest.mark.parametrize("objective", PAIRWISE)
def test_nothing_reaches_the_teacher_and_nothing_is_overwritten(objective):
    teacher, student = logits(2, 9, dtype=torch.float32)  # fp32 is where a promotion makes no copy
    teacher.requires_grad_()
    copies = teacher.clone(), student.clone()
    objectives.distillation(teacher, student, MTPDConfig.as_published(objective=objective, top_n=4)).sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert torch.equal(teacher, copies[0]) and torch.equal(student, copies[1])


def test_lk_goes_from_kl_to_total_variation():
    teacher, student = logits(4, 11)
    by_name = {
        name: objectives.distillation(teacher, student, MTPDConfig.as_published(objective=name)).detach()
        for name in ("kl", "tv")
    }
    never_tv = objectives.distillation(teacher, student, MTPDConfig.as_published(objective="lk", lk_eta=0.0))
    torch.testing.assert_close(never_tv.detach(), by_name["kl"], **EXACT)
    only_tv = objectives.distillation(teacher, student, MTPDConfig.as_published(objective="lk", lk_eta=1e9))
    torch.testing.assert_close(only_tv.detach(), by_name["tv"], **EXACT)


def test_e2e_tv_is_no_function_of_one_head():
    with pytest.raises(ValueError, match="e2e_tv"):
        objectives.distillation(*logits(2, 5), MTPDConfig.as_published(objective="e2e_tv"))


# Cross-entropy, overlap ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy(dtype):
    z = logits(4, 3, 19, dtype=dtype)[1]
    z.data[0, 0, 3] = -INF
    labels = torch.randint(19, (4, 3), generator=torch.Generator().manual_seed(2))
    labels[0, 0] = 5
    ours, gradient = value_and_gradient(objectives.cross_entropy(z, labels), z)
    wide = z.detach().double().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(4, 3), wide
    )
    tolerance = EXACT if dtype == torch.float64 else FP32
    torch.testing.assert_close(ours.double(), expected, **tolerance)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=tolerance["rtol"] + eps, atol=tolerance["atol"] + eps / 64
    )


def test_cross_entropy_keeps_its_precision_far_from_zero():
    z = torch.randint(-2048, 2048, (5, 50), generator=torch.Generator().manual_seed(1)) / 64.0
    labels = torch.arange(5)
    exact = F.cross_entropy(z.double(), labels, reduction="none")
    # z + 10,000 is exact in fp32 (multiples of 1/64); results of size up to 70 are rounded to 4e-6, twice.
    torch.testing.assert_close(objectives.cross_entropy(z + 1e4, labels).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_overlap(temperature):
    teacher, student = logits(4, 3, 19)
    ours, gradient = value_and_gradient(
        objectives.overlap(*objectives.log_probabilities(teacher, student, temperature)), student
    )
    expected, expected_gradient = value_and_gradient(
        naive.rows(naive.acceptance, teacher, student, temperature), student
    )
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)


def test_overlap_is_the_acceptance_of_rejection_sampling():
    """By simulation: draft from q, accept with probability min(1, p / q)."""
    teacher, student = logits(6, seed=3)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    accepted = torch.rand(drafts.shape, generator=generator) < (p / q)[drafts]
    expected = objectives.overlap(*objectives.log_probabilities(teacher, student)).item()
    # Standard error of 200,000 draws: at most 0.0011; four of them.
    assert abs(accepted.double().mean().item() - expected) < 0.0045


# e2e_tv --------------------------------------------------------------------------------------------------------------


def naive_e2e_tv(alphas: Tensor, masks: Tensor) -> Tensor:
    out = []
    for draft in range(alphas.shape[1]):
        present = [k for k in range(len(alphas)) if masks[k, draft]]
        terms = [math.prod(alphas[: k + 1, draft]) for k in present]
        out.append(1 - sum(terms) / len(terms) if terms else alphas.new_zeros(()))
    return torch.stack([torch.as_tensor(x) for x in out])


@pytest.mark.parametrize("zeros", [[], [(0, 1)], [(1, 2)], [(0, 0), (2, 0)]])
def test_e2e_tv_with_drafts_of_every_length(zeros):
    alphas = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for place in zeros:  # cumprod's gradient is another piece of code where a factor is 0
        alphas[place] = 0.0
    alphas.requires_grad_()
    masks = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])  # 3, 2, 1 and no heads
    ours, gradient = value_and_gradient(objectives.e2e_tv(alphas, masks), alphas)
    expected, expected_gradient = value_and_gradient(naive_e2e_tv(alphas, masks), alphas)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)


def test_e2e_tv_at_its_ends():
    ones, masks = torch.ones(3, 2), torch.ones(3, 2)
    assert objectives.e2e_tv(ones, masks).tolist() == [0.0, 0.0]
    assert objectives.e2e_tv(0 * ones, masks).tolist() == [1.0, 1.0]
    assert objectives.e2e_tv(ones[:1], masks[:1]).tolist() == [0.0, 0.0]


# Properties ----------------------------------------------------------------------------------------------------------

rows_of_logits = st.integers(2, 12).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-30, 30, width=32), min_size=size, max_size=size)] * 2)
)
properties = settings(deadline=None, derandomize=True, database=None, max_examples=40)


@properties
@given(rows_of_logits, st.integers(1, 13), st.sampled_from(PAIRWISE), st.floats(0.25, 4.0))
def test_bounds_and_invariance(pair, n, objective, temperature):
    teacher, student = (torch.tensor(row, dtype=torch.float64) for row in pair)
    config = MTPDConfig.as_published(objective=objective, top_n=n, temperature=temperature)
    loss = objectives.distillation(teacher, student, config)
    # A divergence of numbers up to 240 (30 / 0.25, twice) is exact to 1e-13 of that.
    assert loss >= -1e-10 and loss.isfinite()
    if objective == "tv":
        assert loss <= 1 + 1e-12
    shifted = objectives.distillation(teacher, student - 7.0, config)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-10)
    order = torch.arange(len(teacher) - 1, -1, -1)
    torch.testing.assert_close(
        objectives.distillation(teacher[order], student[order], config), loss, rtol=1e-9, atol=1e-10
    )


@properties
@given(rows_of_logits, st.integers(1, 13))
def test_what_is_known_about_each_pair(pair, n):
    teacher, student = (torch.tensor(row, dtype=torch.float64) for row in pair)
    by_name = {
        name: objectives.distillation(teacher, student, MTPDConfig.as_published(objective=name)).item()
        for name in PAIRWISE
    }
    assert by_name["tv"] ** 2 <= by_name["kl"] / 2 + 1e-10  # Pinsker
    assert by_name["tv"] ** 2 <= by_name["reverse_kl"] / 2 + 1e-10
    # Restricting to a set cannot add divergence inside it: P(S) KL_S <= KL (chain rule).
    share = teacher.softmax(-1)[naive.top_set(teacher, n)].sum().item()
    assert share * objectives.topn_kl(teacher, student, n).item() <= by_name["kl"] + 1e-9
