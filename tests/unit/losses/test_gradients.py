"""scale_gradient: the value stays, the gradient is scaled."""

import pytest
import torch

from megatron_mtpd.losses.gradients import scale_gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.125])  # powers of two: exact in every dtype
def test_the_gradient_is_scaled_and_nothing_else(share, dtype):
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    y = scale_gradient(x, share)
    assert torch.equal(y, x) and y.dtype == dtype
    upstream = torch.randn(3, 4).to(dtype)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    assert gradient.dtype == dtype and torch.equal(gradient, upstream * share)


def test_the_ends_cost_nothing():
    x = torch.randn(3, requires_grad=True)
    assert scale_gradient(x, 1.0) is x
    cut = scale_gradient(x, 0.0)
    assert not cut.requires_grad and cut.data_ptr() == x.data_ptr()


def test_another_path_of_the_same_tensor_keeps_its_gradient():
    x = torch.ones(2, requires_grad=True)
    (scale_gradient(x, 0.25) * 4.0 + x * 10.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [11.0, 11.0]


def test_shares_multiply():
    x = torch.ones(1, requires_grad=True)
    scale_gradient(scale_gradient(x, 0.5), 0.5).sum().backward()
    assert x.grad is not None and x.grad.item() == 0.25
