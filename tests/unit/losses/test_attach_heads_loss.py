"""The heads' loss that rides on the gradient of the main head's: scaled alike, whatever the caller multiplies by."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss, mtpd_loss
from tests.unit.losses.cases import make_case, run_eager


def attached_gradients(c: float, mask: Tensor, reduce, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x and y where main_loss = x^2 and heads_loss = sum(y^3), and what they would be by the formula."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(6, 2, generator=generator, dtype=dtype) + 0.5 for _ in range(2))
    x.requires_grad_()
    y.requires_grad_()
    main_loss, heads_loss = x**2, (y**3).sum()
    attached = attach_heads_loss(main_loss, mask, heads_loss)
    assert torch.equal(attached, main_loss)
    reduce(attached, mask, c).backward()
    assert x.grad is not None and y.grad is not None
    return x.grad, y.grad, c * 2 * x.detach() * mask, c * 3 * y.detach() ** 2


def masked_sum(losses: Tensor, mask: Tensor, c: float) -> Tensor:
    return c * (losses * mask).sum()


MASK = torch.tensor([[1.0, 0], [1, 1], [0, 0], [1, 1], [1, 0], [0, 1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [1.0, 1 / 7, 3.0, 1e-8, 65536.0, -2.0, 0.0])
def test_the_heads_are_scaled_like_the_main_loss(c, dtype):
    x, y, x_expected, y_expected = attached_gradients(c, MASK, masked_sum, dtype)
    # One product and a mean of seven equal numbers: a few roundings.
    tolerance: dict[str, Any] = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0.0}
    torch.testing.assert_close(x, x_expected.to(dtype), **tolerance)
    torch.testing.assert_close(y, y_expected.to(dtype), **tolerance)


def test_reductions_of_the_allowed_form():
    # Megatron's: the sum over the mask, divided by the number of tokens, by the micro-batches, times the loss scale.
    by_tokens = lambda losses, mask, c: c * (losses.view(-1) * mask.view(-1)).sum() / mask.sum()  # noqa: E731
    _, y, _, y_expected = attached_gradients(5.0, MASK, by_tokens)
    torch.testing.assert_close(y, y_expected / MASK.sum().item(), rtol=1e-14, atol=0.0)
    # A mean without a mask is of that form where nothing is masked.
    mean = lambda losses, _mask, c: c * losses.mean()  # noqa: E731
    _, y, _, y_expected = attached_gradients(5.0, torch.ones(6, 2), mean)
    torch.testing.assert_close(y, y_expected / 12, rtol=1e-14, atol=0.0)


def test_with_nothing_to_learn_the_heads_get_nothing():
    x, y, *_ = attached_gradients(3.0, torch.zeros(6, 2), masked_sum)
    assert not x.any() and not y.any()


@pytest.mark.parametrize(
    "reduce",
    [
        lambda losses, mask, c: c * losses.mean(),  # the mask forgotten
        lambda losses, mask, c: c * (losses * mask * torch.linspace(1, 2, 12).view(6, 2)).sum(),  # weighted tokens
        lambda losses, mask, c: c * ((losses * mask) ** 2).sum(),
        lambda losses, mask, c: (losses * mask * float("nan")).sum(),
    ],
    ids=["unmasked", "weighted", "squared", "nan"],
)
def test_any_other_upstream_gradient_is_refused(reduce):
    with pytest.raises(RuntimeError, match="one number times the loss mask"):
        attached_gradients(1.0, MASK, reduce)


def test_attached_to_the_real_loss():
    """From logits to gradients, in the form that Megatron's loop uses."""
    case, config, weights = make_case(), MTPDConfig.as_published(top_n=4), HeadWeights((0.1,) * 3, (0.5,) * 3)
    expected = run_eager(case, config, weights)
    leaves = [z.clone().requires_grad_() for z in case.logits]
    main_loss, heads_loss, _ = mtpd_loss(
        leaves[0], leaves[1:], leaves[1:], case.labels, case.loss_mask, case.masks(), weights, config
    )
    (0.125 * (attach_heads_loss(main_loss, case.loss_mask, heads_loss) * case.loss_mask).sum()).backward()
    for leaf, gradient in zip(leaves, expected.gradients, strict=True):
        assert leaf.grad is not None
        # The same float64 terms, scaled: a few roundings apart.
        torch.testing.assert_close(leaf.grad, 0.125 * gradient, rtol=1e-12, atol=1e-12)
