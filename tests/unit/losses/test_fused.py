"""The fused loss against the eager one: values and gradients, of one table of cases.

In fp64 both do the same sums in another order: relative differences of some 1e-13 at these sizes. The tolerance, 1e-9,
leaves room for the differences of large logarithms in a small loss and would still show any wrong term.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mtpd.config import MTPDConfig, Objective
from megatron_mtpd.losses import chunk, objectives, walk
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss, mtpd_loss
from megatron_mtpd.losses.fused import fused_mtpd_loss
from megatron_mtpd.losses.gradients import scale_gradient
from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.losses.rows import RowWeights
from megatron_mtpd.losses.topn import topn_cut

OBJECTIVES: list[Objective] = ["topn_kl", "kl", "reverse_kl", "tv", "lk", "e2e_tv"]
TOLERANCE = 1e-9


def assert_equal(actual: Any, expected: Any, what: str = "result", check_dtype: bool = True) -> None:
    torch.testing.assert_close(
        actual,
        expected,
        rtol=TOLERANCE,
        atol=TOLERANCE,
        check_dtype=check_dtype,
        msg=lambda text: f"{what}: {text}",
    )


class Case(NamedTuple):
    hidden: list[Tensor]
    """Of the main head and the heads, [s, b, h]; two lists: then those of the heads' other pass."""
    weight: Tensor
    labels: Tensor
    loss_mask: Tensor
    masks: Tensor
    weights: HeadWeights

    @property
    def num_heads(self) -> int:
        return len(self.masks)


def make_case(
    heads: int = 3,
    s: int = 11,
    b: int = 2,
    h: int = 8,
    vocab: int = 37,
    masked: float = 0.2,
    two_lists: bool = False,
    per_head_mean: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = [normal(s, b, h) for _ in range(1 + heads)]
    if two_lists:
        hidden += [x.clone() for x in hidden[1:]]
    loss_mask = (torch.rand(s, b, generator=generator) >= masked).to(torch.float64)
    ends = torch.rand(s, b, generator=generator) < 0.1
    labels = torch.randint(vocab, (s, b), generator=generator)
    alpha, beta = [0.3 / (k + 1) for k in range(heads)], [0.5 + 0.1 * k for k in range(heads)]
    return Case(
        hidden,
        normal(vocab, h),
        labels,
        loss_mask,
        head_masks(loss_mask, heads, ends),
        HeadWeights(alpha, beta, per_head_mean),
    )


class Outcome(NamedTuple):
    main_loss: Tensor
    heads_loss: Tensor
    report: LossReport
    gradients: list[Any]
    """Of the weight, then of the hidden states; None where there is none."""


def leaves(case: Case, frozen: frozenset[str]) -> tuple[list[Tensor], Tensor]:
    names = ["main", *(f"head{k}" for k in range(1, len(case.hidden)))]
    hidden = [x.clone().requires_grad_(name not in frozen) for name, x in zip(names, case.hidden, strict=True)]
    return hidden, case.weight.clone().requires_grad_("weight" not in frozen)


def split(case: Case, hidden: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    for_ce = hidden[1 : 1 + case.num_heads]
    return hidden[0], for_ce, hidden[1 + case.num_heads :] or for_ce


def finish(case: Case, main_loss, heads_loss, report, leaves: list[Tensor], c: float) -> Outcome:
    """Backward as Megatron does: c times the masked sum, the heads' losses attached."""
    attached = attach_heads_loss(main_loss, case.loss_mask, heads_loss)
    (c * (attached * case.loss_mask).sum()).backward()
    return Outcome(main_loss.detach(), heads_loss.detach(), report, [x.grad for x in leaves])


def eager(case: Case, config: MTPDConfig, frozen=frozenset(), logit_scale=1.0, c=0.25) -> Outcome:
    hidden, weight = leaves(case, frozen)
    main, for_ce, for_kd = split(case, hidden)

    def logits(x: Tensor, share: float) -> Tensor:
        return logit_scale * (x @ scale_gradient(weight, share).t())

    ce_logits = [logits(x, config.ce_output_share) for x in for_ce]
    same = for_kd is for_ce and config.ce_output_share == config.kd_output_share
    kd_logits = ce_logits if same else [logits(x, config.kd_output_share) for x in for_kd]
    losses = mtpd_loss(
        logits(main, 1.0), ce_logits, kd_logits, case.labels, case.loss_mask, case.masks, case.weights, config
    )
    return finish(case, *losses, [weight, *hidden], c)


def fused(
    case: Case, config: MTPDConfig, frozen=frozenset(), logit_scale=1.0, c=0.25, chunk_rows: int | None = 24
) -> Outcome:
    hidden, weight = leaves(case, frozen)
    losses = fused_mtpd_loss(
        *split(case, hidden),
        weight,
        case.labels,
        case.loss_mask,
        case.masks,
        case.weights,
        config,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows,
    )
    return finish(case, *losses, [weight, *hidden], c)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert_equal(actual.main_loss, expected.main_loss, "main loss")
    assert_equal(actual.heads_loss, expected.heads_loss, "heads' loss")
    for name, x, y in zip(LossReport._fields, actual.report, expected.report, strict=True):
        assert_equal(x, y, name)
    for i, (x, y) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        x, y = (torch.zeros(()) if g is None or not g.any() else g for g in (x, y))
        assert_equal(x, y, f"gradient {i}", check_dtype=x.ndim > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective, temperature):
    case, config = make_case(), MTPDConfig.as_published(objective=objective, top_n=9, temperature=temperature)
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("top_n", [1, 2, 36, 37, 1000])
def test_top_n_from_one_to_beyond_the_vocabulary(top_n):
    case, config = make_case(), MTPDConfig.as_published(top_n=top_n)
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 60, None])
@pytest.mark.parametrize("objective", ["topn_kl", "e2e_tv"])
def test_chunks_need_not_divide(objective, chunk_rows):
    case, config = make_case(), MTPDConfig.as_published(objective=objective, top_n=9)
    assert_same(fused(case, config, chunk_rows=chunk_rows), eager(case, config))


def test_blocks_within_a_chunk(monkeypatch):
    monkeypatch.setattr(walk, "CPU_BLOCK", 3 * 4 * 37)  # three rows of four heads: 5 blocks, the last with padding
    case, config = make_case(s=7), MTPDConfig.as_published(top_n=9, ce_output_share=0.5)
    assert_same(fused(case, config, chunk_rows=None), eager(case, config))


@pytest.mark.parametrize(
    "shape",
    [{"heads": 1}, {"heads": 5, "s": 3, "b": 1}, {"vocab": 64, "h": 3}, {"b": 1, "s": 40}, {"masked": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shapes(objective, shape):
    case, config = make_case(**shape), MTPDConfig.as_published(objective=objective, top_n=5)
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masks_that_leave_nothing(objective):
    case, config = make_case(masked=1.1), MTPDConfig.as_published(objective=objective, top_n=9)
    outcome = fused(case, config)
    assert_same(outcome, eager(case, config))
    assert outcome.heads_loss == 0 and all(not g.any() for g in outcome.gradients if g is not None)


@pytest.mark.parametrize("two_lists", [False, True], ids=["one_pass", "two_passes"])
@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.25, 0.75), (0.5, 0.5)])
@pytest.mark.parametrize("objective", ["topn_kl", "lk"])
def test_shares_of_the_output_layer(objective, shares, two_lists):
    case = make_case(two_lists=two_lists)
    config = MTPDConfig.as_published(objective=objective, top_n=9, ce_output_share=shares[0], kd_output_share=shares[1])
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_passes_of_the_heads(objective):
    case, config = make_case(two_lists=True), MTPDConfig.as_published(objective=objective, top_n=9, temperature=1.3)
    assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize(
    "frozen",
    [
        {"weight"},
        {"main"},
        {"main", "head1"},
        {"weight", "main", "head1", "head2"},
        {"main", "head1", "head2", "head3"},
    ],
    ids=lambda names: "+".join(sorted(names)),
)
@pytest.mark.parametrize("shares", [(1.0, 1.0), (1.0, 0.5)])
def test_frozen_parts_get_no_gradient(frozen, shares):
    case = make_case()
    config = MTPDConfig.as_published(top_n=9, ce_output_share=shares[0], kd_output_share=shares[1])
    outcome = fused(case, config, frozen=frozenset(frozen))
    assert_same(outcome, eager(case, config, frozen=frozenset(frozen)))
    names = ["weight", "main", "head1", "head2", "head3"]
    assert {n for n, g in zip(names, outcome.gradients, strict=True) if g is None} == frozen


def test_a_frozen_weight_costs_no_buffer(monkeypatch):
    made = []
    original = walk.Gradients.__init__
    monkeypatch.setattr(walk.Gradients, "__init__", lambda self, *a: (original(self, *a), made.append(self))[0])
    fused(make_case(), MTPDConfig.as_published(top_n=9), frozen=frozenset({"weight"}))
    assert made[0].weight is None


def test_without_gradients_nothing_is_held():
    case = make_case()
    with torch.no_grad():
        main_loss, heads_loss, report = fused_mtpd_loss(
            *split(case, case.hidden),
            case.weight.clone().requires_grad_(),
            *case[2:],
            MTPDConfig.as_published(top_n=9),
        )
    expected = eager(case, MTPDConfig.as_published(top_n=9))
    assert not main_loss.requires_grad and not heads_loss.requires_grad
    assert_equal((main_loss, heads_loss), expected[:2])
    assert_equal(tuple(report), tuple(expected.report))


@pytest.mark.parametrize("per_head_mean", [True, False])
@pytest.mark.parametrize("beta", [[0.0], [0.0, 0.3, 0.0]], ids=str)
def test_weights_of_zero_are_plain_mtp(beta, per_head_mean):
    case = make_case()
    case = case._replace(weights=HeadWeights(case.weights.alpha, (beta * 3)[:3], per_head_mean))
    for objective in OBJECTIVES:
        config = MTPDConfig.as_published(objective=objective, top_n=9)
        assert_same(fused(case, config), eager(case, config))


@pytest.mark.parametrize("logit_scale", [0.5, 3.0])
def test_logit_scale(logit_scale):
    case, config = make_case(), MTPDConfig.as_published(objective="lk", temperature=0.8)
    assert_same(fused(case, config, logit_scale=logit_scale), eager(case, config, logit_scale=logit_scale))


@pytest.mark.parametrize("objective", ["topn_kl", "lk", "e2e_tv"])
def test_ties(objective):
    """Integer hidden states and weights: most logits have equals, at the top, at the N-th and at the labels."""
    case = make_case(vocab=64, h=3, dtype=torch.float64)
    case = case._replace(hidden=[x.round() for x in case.hidden], weight=case.weight.round())
    for top_n in (1, 7, 31):
        config = MTPDConfig.as_published(objective=objective, top_n=top_n)
        assert_same(fused(case, config), eager(case, config))


def test_masked_positions_may_hold_anything():
    """Where no loss counts, nan in the hidden states reaches neither losses nor gradients."""
    clean, config = make_case(masked=0.3), MTPDConfig.as_published(top_n=9)
    dirty = clean._replace(hidden=[x.clone() for x in clean.hidden])
    dirty.hidden[0][clean.loss_mask == 0] = torch.nan
    for x, mask in zip(dirty.hidden[1:], clean.masks, strict=True):
        x[mask == 0] = torch.inf
    expected, outcome = fused(clean, config), fused(dirty, config)
    is_live = clean.loss_mask > 0
    assert_equal(outcome.main_loss[is_live], expected.main_loss[is_live])
    assert_same(outcome._replace(main_loss=expected.main_loss), expected)


def test_logits_of_minus_infinity():
    """A token that main head and head both exclude adds nothing; -inf has no gradient in the eager reference either."""
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 9, dtype=torch.float64)
    logits[..., 2] = logits[:, 1, 5] = -torch.inf
    kd_weights = torch.rand(2, 4).double()
    labels, weights = torch.tensor([0, 1, 3, 8]), RowWeights(torch.rand(3, 4).double(), kd_weights)
    for objective in OBJECTIVES[:-1]:
        config = MTPDConfig.as_published(objective=objective, top_n=4, temperature=1.5)
        reference: Any = logits.clone().requires_grad_()
        ce = objectives.cross_entropy(reference, labels.expand(3, -1))
        kd = torch.stack([objectives.distillation(reference[0], z, config) for z in reference[1:]])
        ((weights.cross_entropy * ce).sum() + (kd_weights * kd).sum()).backward()
        cut = topn_cut(logits[0], 4) if objective == "topn_kl" else None
        z = logits.clone()
        rows = chunk.block_losses(z, labels, config, cut, weights)
        assert_equal((rows.cross_entropy, rows.distillation), (ce, kd))
        assert_equal(z, reference.grad.nan_to_num(0.0))


# Autograd -----------------------------------------------------------------------------------------------------------


def test_tied_weights():
    """The output weight is an embedding, too: both gradients add up."""
    case, config = make_case(), MTPDConfig.as_published(top_n=9)
    embedded = case.weight.clone().requires_grad_()
    ids = case.labels
    hidden, _ = leaves(case, frozenset())
    main, for_ce, for_kd = split(case, hidden)
    losses = fused_mtpd_loss(main + embedded[ids], for_ce, for_kd, embedded, *case[2:], config)
    finish(case, *losses, [embedded], 0.25)
    reference = case.weight.clone().requires_grad_()
    logits = [x @ reference.t() for x in (hidden[0].detach() + reference[ids], *[x.detach() for x in for_ce])]
    losses = mtpd_loss(logits[0], logits[1:], logits[1:], *case[2:], config)
    finish(case, *losses, [reference], 0.25)
    assert_equal(embedded.grad, reference.grad)


@pytest.mark.parametrize("tells", [False, True])
def test_accumulates_into_main_grad(tells):
    case, config = make_case(), MTPDConfig.as_published(top_n=9)
    weight: Any = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.ones_like(weight)
    if tells:
        weight.grad_added_to_main_grad = False
    for _ in range(2):  # two micro-batches
        losses = fused_mtpd_loss(*split(case, case.hidden), weight, *case[2:], config, accumulate_into_main_grad=True)
        finish(case, *losses, [], 0.25)
    expected = 1.0 + 2 * eager(case, config).gradients[0]
    assert_equal(weight.main_grad, expected)
    if tells:
        assert weight.grad_added_to_main_grad and not weight.grad.any()
    else:
        assert weight.grad is None


def test_main_grad_is_left_alone_unless_asked():
    case = make_case()
    weight: Any = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.ones_like(weight)
    finish(
        case, *fused_mtpd_loss(*split(case, case.hidden), weight, *case[2:], MTPDConfig.as_published(top_n=9)), [], 0.25
    )
    assert (weight.main_grad == 1).all() and weight.grad.any()


@pytest.mark.parametrize("spoil", [lambda x: x.sum(), lambda x: (x * x).sum()], ids=["no_mask", "squared"])
def test_another_upstream_gradient_is_refused(spoil):
    case = make_case(masked=0.5)
    hidden, weight = leaves(case, frozenset())
    main_loss, heads_loss, _ = fused_mtpd_loss(
        *split(case, hidden), weight, *case[2:], MTPDConfig.as_published(top_n=9)
    )
    with pytest.raises(RuntimeError, match="loss mask"):
        (spoil(main_loss) + heads_loss).backward()


def test_a_second_backward_is_refused():
    case = make_case()
    hidden, weight = leaves(case, frozenset())
    main_loss, heads_loss, _ = fused_mtpd_loss(
        *split(case, hidden), weight, *case[2:], MTPDConfig.as_published(top_n=9)
    )
    total = (main_loss * case.loss_mask).sum() + heads_loss
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        total.backward()


def test_shapes_that_do_not_fit_are_named():
    case, config = make_case(), MTPDConfig.as_published()
    main, for_ce, for_kd = split(case, case.hidden)
    rest = case[2:]
    for hidden, weight in (((main[:-1], for_ce, for_kd), case.weight), ((main, for_ce, for_kd), case.weight[:, 1:])):
        with pytest.raises(ValueError, match="do not fit"):
            fused_mtpd_loss(*hidden, weight, *rest, config)
    with pytest.raises(ValueError, match="one of each a head"):
        fused_mtpd_loss(main, for_ce[:-1], for_kd[:-1], case.weight, *rest, config)


# Lower precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_is_within_that_of_the_naive_loss(objective, dtype):
    """The eager loss in the same dtype shows what the dtype costs: the error of its logits and of its gradients'
    products.

    The bound is 1.5 times that error, in the norm of each result, and never less than a few roundings of its size
    (4 eps): both errors are random draws of one size, and where the naive one is small by chance, more cannot be asked.
    """
    exact = make_case(heads=2, s=24, h=32, vocab=128)
    scaled = exact._replace(weight=exact.weight * 0.3)
    low = scaled._replace(hidden=[x.to(dtype) for x in scaled.hidden], weight=scaled.weight.to(dtype))
    exact = low._replace(hidden=[x.double() for x in low.hidden], weight=low.weight.double())
    config = MTPDConfig.as_published(objective=objective, top_n=20)
    reference, naive, actual = eager(exact, config), eager(low, config), fused(low, config, chunk_rows=30)

    def error(x: Tensor, y: Tensor) -> float:
        return (x.double() - y).norm().item()

    pairs = zip(
        (actual.main_loss, *actual.gradients),
        (naive.main_loss, *naive.gradients),
        (reference.main_loss, *reference.gradients),
        strict=True,
    )
    for x, y, z in pairs:
        assert error(x, z) <= max(1.5 * error(y, z), 4 * torch.finfo(dtype).eps * z.norm().item())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    draw = data.draw
    case = make_case(
        heads=draw(st.integers(1, 4)),
        s=draw(st.integers(1, 9)),
        b=draw(st.integers(1, 3)),
        h=draw(st.integers(1, 5)),
        vocab=draw(st.integers(2, 40)),
        masked=draw(st.sampled_from([0.0, 0.3, 0.9])),
        two_lists=draw(st.booleans()),
        per_head_mean=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )
    share = st.sampled_from([0.0, 0.3, 1.0])
    config = MTPDConfig.as_published(
        objective=draw(st.sampled_from(OBJECTIVES)),
        top_n=draw(st.integers(1, 45)),
        temperature=draw(st.sampled_from([1.0, 0.6, 2.0])),
        ce_output_share=draw(share),
        kd_output_share=draw(share),
    )
    assert_same(fused(case, config, chunk_rows=draw(st.integers(1, 70))), eager(case, config))
