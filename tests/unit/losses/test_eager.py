"""The whole loss on logits, against `naive.mtpd_loss`: loops over positions, sequences and heads in float64.

`EXACT`: both sides add the same few hundred float64 terms in another order. 1e-11 is far above that rounding and far
below any term.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.eager import HeadWeights, mtpd_loss
from tests.unit.losses import naive
from tests.unit.losses.cases import OBJECTIVES, Case, make_case, run_eager

EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def check(case: Case, config: MTPDConfig, weights: HeadWeights) -> None:
    """Value, every field of the report, and the gradient of every logit."""
    actual = run_eager(case, config, weights)
    leaves = [z.clone().requires_grad_() for z in case.logits]
    alpha, beta = list(weights.alpha), list(weights.beta)
    expected = naive.mtpd_loss(
        leaves[0],
        leaves[1:],
        case.labels,
        case.loss_mask,
        case.document_ends,
        config,
        alpha,
        beta,
        weights.per_head_mean,
    )
    torch.testing.assert_close(actual.total, expected.total.detach(), **EXACT)
    for name, ours in actual.report._asdict().items():
        theirs = torch.tensor(getattr(expected, name), dtype=torch.float64)
        # Counts and sums of the report may be fp32: 2^-24 of a sum of tens.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    gradients = torch.autograd.grad(expected.total, leaves, allow_unused=True)
    for k, (ours, theirs) in enumerate(zip(actual.gradients, gradients, strict=True)):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda m, k=k: f"gradient of logits {k}: {m}")


@pytest.mark.parametrize("per_head_mean", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective, temperature, per_head_mean):
    config = MTPDConfig.as_published(objective=objective, top_n=4, temperature=temperature)
    check(make_case(), config, HeadWeights((0.1, 0.3, 0.2), (0.5, 0.7, 0.4), per_head_mean))


@pytest.mark.parametrize("cross_documents", [False, True])
@pytest.mark.parametrize("objective", ["topn_kl", "e2e_tv"])
def test_document_ends_and_masks(objective, cross_documents):
    # By sequence: two documents and a masked stretch; ends side by side; masked at both ends.
    loss_mask = torch.tensor(
        [[1, 1, 1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]]
    ).T.double()
    ends = torch.tensor(
        [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]]
    ).T.bool()
    case = make_case(length=10, batch=3)._replace(loss_mask=loss_mask, document_ends=ends)
    config = MTPDConfig.as_published(objective=objective, top_n=4, cross_documents=cross_documents)
    check(case, config, HeadWeights((0.1,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "what", ["nothing", "one position", "every second position", "a sequence shorter than the heads"]
)
def test_masks_that_leave_little(objective, what):
    case = make_case(length=2 if "shorter" in what else 7)
    mask = torch.ones_like(case.loss_mask)
    if what == "nothing":
        mask[:] = 0
    elif what == "one position":
        mask[1:] = 0
    elif "second" in what:
        mask[::2] = 0
    case = case._replace(loss_mask=mask, document_ends=None)
    config = MTPDConfig.as_published(objective=objective, top_n=4)
    check(case, config, HeadWeights((0.1,) * 3, (0.5,) * 3))
    if what != "a sequence shorter than the heads":  # there, head 1 has a pair
        outcome = run_eager(case, config, HeadWeights((0.1,) * 3, (0.5,) * 3))
        assert outcome.heads_loss == 0 and not any(g.any() for g in outcome.gradients[1:])


@settings(deadline=None, derandomize=True, database=None, max_examples=25)
@given(
    length=st.integers(1, 5),
    batch=st.integers(1, 2),
    num_heads=st.integers(1, 4),
    vocab=st.integers(2, 5),
    top_n=st.integers(1, 6),
    flags=st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=10, max_size=10),
    objective=st.sampled_from(OBJECTIVES),
    cross_documents=st.booleans(),
)
def test_any_small_case(length, batch, num_heads, vocab, top_n, flags, objective, cross_documents):
    case = make_case(length, batch, num_heads, vocab)
    values = torch.tensor(flags[: length * batch]).reshape(length, batch)
    case = case._replace(loss_mask=(values != 0).double(), document_ends=values == 2)
    config = MTPDConfig.as_published(objective=objective, top_n=top_n, cross_documents=cross_documents)
    weights = HeadWeights([0.1 * (k + 1) for k in range(num_heads)], [0.5 / (k + 1) for k in range(num_heads)])
    check(case, config, weights)


# Weights and paths of the gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_lists_part_the_gradients_and_change_nothing_else(objective):
    case, config = make_case(), MTPDConfig.as_published(objective=objective, top_n=4)
    weights = HeadWeights((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    together = run_eager(case, config, weights)
    apart = run_eager(case, config, weights, two_lists=True)
    assert torch.equal(apart.total, together.total)
    num_heads = case.num_heads
    of_ce, of_kd = apart.gradients[1 : 1 + num_heads], apart.gradients[1 + num_heads :]
    for whole, ce, kd in zip(together.gradients[1:], of_ce, of_kd, strict=True):
        torch.testing.assert_close(ce + kd, whole, **EXACT)
    no_distillation = run_eager(case, config, HeadWeights((0.1, 0.2, 0.3), (0.0,) * 3))
    for ce, expected in zip(of_ce, no_distillation.gradients[1:], strict=True):
        torch.testing.assert_close(ce, expected, **EXACT)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_beta_of_zero_is_plain_mtp(objective):
    """No graph at all for the distillation, and the report as ever."""
    case, config = make_case(), MTPDConfig.as_published(objective=objective, top_n=4)
    plain = run_eager(case, config, HeadWeights((0.1,) * 3, (0.0,) * 3), two_lists=True)
    assert all(g is None for g in plain.raw_gradients[1 + case.num_heads :])
    assert plain.heads_loss == 0.1 * (plain.report.cross_entropy * scales(case)).sum()
    with_beta = run_eager(case, config, HeadWeights((0.1,) * 3, (1.0,) * 3))
    for name, ours, theirs in zip(plain.report._fields, plain.report, with_beta.report, strict=True):
        assert torch.equal(ours, theirs), name


def scales(case: Case) -> Tensor:
    return case.loss_mask.sum() / case.masks().flatten(1).sum(1).clamp(min=1)


def test_a_head_without_a_weight_gets_no_gradient():
    case, config = make_case(), MTPDConfig.as_published(top_n=4)
    some = run_eager(case, config, HeadWeights((0.1,) * 3, (0.5, 0.0, 0.5)), two_lists=True)
    assert [g is None for g in some.raw_gradients[1 + case.num_heads :]] == [False, True, False]


def test_the_main_head_gets_its_cross_entropy_alone():
    """The stop-gradient on the teacher: the gradient of the main head's logits does not depend on the heads."""
    case = make_case()
    with_heads = run_eager(case, MTPDConfig.as_published(top_n=4), HeadWeights((1.0,) * 3, (5.0,) * 3))
    without = run_eager(case, MTPDConfig.as_published(top_n=4), HeadWeights((0.0,) * 3, (0.0,) * 3))
    assert torch.equal(with_heads.gradients[0], without.gradients[0])


def test_sums_do_not_depend_on_how_the_batch_is_split():
    """What `--calculate-per-token-loss` needs of per_head_mean=False, and the report in any case."""
    case, config = make_case(batch=4), MTPDConfig.as_published(top_n=4)
    for per_head_mean in (False, True):
        weights = HeadWeights((0.1,) * 3, (0.5,) * 3, per_head_mean)
        whole = run_eager(case, config, weights)
        parts = [run_eager(case.sequences(part), config, weights) for part in ([0], [1, 2, 3])]
        for name, ours, *of_parts in zip(whole.report._fields, whole.report, *(p.report for p in parts), strict=True):
            # Some sums of the report are fp32.
            torch.testing.assert_close(sum(of_parts), ours, rtol=1e-6, atol=1e-6, msg=name)
        if not per_head_mean:
            torch.testing.assert_close(sum(p.heads_loss for p in parts), whole.heads_loss, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Low-precision logits: losses in fp32, gradients in the dtype of the logits, both as good as that dtype allows."""
    case, config = make_case(vocab=40), MTPDConfig.as_published(top_n=11)
    rounded = case._replace(logits=[z.to(dtype) for z in case.logits])
    weights = HeadWeights((0.1,) * 3, (0.5,) * 3)
    ours = run_eager(rounded, config, weights)
    exact = run_eager(case._replace(logits=[z.double() for z in rounded.logits]), config, weights)
    assert ours.main_loss.dtype == ours.heads_loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in ours.report)
    # Sums of some 60 fp32 losses, each good to 1e-6.
    torch.testing.assert_close(ours.total.double(), exact.total, rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(ours.gradients, exact.gradients, strict=True):
        assert mine.dtype == dtype
        # Rounded to the dtype where cross-entropy and distillation meet: each by eps / 2.
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * eps, atol=eps / 8 + 1e-6)


def test_logits_are_not_overwritten():
    case = make_case()
    case = case._replace(logits=[z.float() for z in case.logits])
    before = [z.clone() for z in case.logits]
    run_eager(case, MTPDConfig.as_published(top_n=4), HeadWeights((0.1,) * 3, (0.5,) * 3), clone=False)
    assert all(torch.equal(x, y) for x, y in zip(case.logits, before, strict=True))


# What a masked position may hold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_lists", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masked_positions_leak_nothing(objective, bad, two_lists):
    """Neither into a value nor, as 0 * inf, into a gradient: all is as if they held zeros."""
    case, config = make_case(batch=1), MTPDConfig.as_published(objective=objective, top_n=4)
    mask = torch.ones_like(case.loss_mask)
    mask[[2, 7]] = 0
    labels = case.labels.clone()
    labels[2] = -100  # as data loaders mark what is not to be learned
    case = case._replace(loss_mask=mask, labels=labels, document_ends=None)
    weights = HeadWeights((0.1,) * 3, (0.5,) * 3)
    masks = case.masks()

    def filled(value: float) -> Case:
        logits = [z.clone() for z in case.logits]
        logits[0][mask == 0] = value  # the teacher there serves no pair
        for z, head_mask in zip(logits[1:], masks, strict=True):
            z[head_mask == 0] = value
        return case._replace(logits=logits)

    clean, dirty = (run_eager(filled(value), config, weights, two_lists=two_lists) for value in (0.0, bad))
    assert torch.equal(dirty.heads_loss, clean.heads_loss)
    for name, ours, theirs in zip(dirty.report._fields, dirty.report, clean.report, strict=True):
        assert torch.equal(ours, theirs), name
    # The main head's own losses are returned unmasked, and its gradient there is the caller's: see the next test.
    for ours, theirs in zip(dirty.gradients[1:], clean.gradients[1:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(dirty.gradients[0][mask > 0], clean.gradients[0][mask > 0])


def test_labels_outside_the_vocabulary_are_harmless_where_masked():
    case, config = make_case(), MTPDConfig.as_published(top_n=4)
    mask = case.loss_mask
    outside = case._replace(labels=case.labels.masked_fill(mask == 0, -100))
    weights = HeadWeights((0.1,) * 3, (0.5,) * 3)
    clean, marked = run_eager(case, config, weights), run_eager(outside, config, weights)
    assert (mask == 0).any() and torch.equal(clean.total, marked.total)
    assert all(torch.equal(x, y) for x, y in zip(clean.gradients, marked.gradients, strict=True))


def test_masks_may_come_in_any_dtype():
    case, config, weights = make_case(), MTPDConfig.as_published(top_n=4), HeadWeights((0.1,) * 3, (0.5,) * 3)
    expected = run_eager(case, config, weights).total
    for dtype in (torch.bool, torch.int64, torch.bfloat16):
        mask = case.loss_mask.to(dtype)
        masks = head_masks(mask, case.num_heads, case.document_ends)
        main, heads, _ = mtpd_loss(
            case.logits[0], case.logits[1:], case.logits[1:], case.labels, mask, masks, weights, config
        )
        assert torch.equal((main * case.loss_mask).sum() + heads, expected)
