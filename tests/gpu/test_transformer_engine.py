"""Transformer Engine's kernels, as far as our layers stand on them: each against the plain torch that it replaces.

Run these first on a new machine: they say in seconds whether the installation works at all.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.needs_te]


def compare(found: torch.Tensor, exact: torch.Tensor, naive: torch.Tensor) -> None:
    """The error against fp32 is at most twice the one that plain bf16 makes."""
    error, bound = ((x.float() - exact).norm() for x in (found, naive))
    assert error <= 2 * bound + 1e-3 * exact.norm()


def test_linear_forward_and_backward():
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16).cuda()
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    out.float().square().sum().backward()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        copy, weight = (t.detach().to(dtype).requires_grad_() for t in (x, layer.weight))
        expected = F.linear(copy, weight)
        expected.float().square().sum().backward()
        results[dtype] = (expected, copy.grad, weight.grad)
    found = (out, x.grad, layer.weight.grad)
    for f, exact, naive in zip(found, results[torch.float32], results[torch.bfloat16], strict=True):
        compare(f, exact, naive)


def test_fused_attention():
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    sequence, batch, heads, groups, width = 256, 2, 8, 4, 64
    attention = te.DotProductAttention(
        heads, width, num_gqa_groups=groups, attention_dropout=0.0, attn_mask_type="causal", qkv_format="sbhd"
    )
    shapes = [(sequence, batch, n, width) for n in (heads, groups, groups)]
    qkv = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    out = attention(*qkv).view(sequence, batch, heads, width)
    out.float().square().sum().backward()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        copies = [x.detach().to(dtype).requires_grad_() for x in qkv]
        q, k, v = (x.permute(1, 2, 0, 3) for x in copies)
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
        expected.float().square().sum().backward()
        results[dtype] = [expected, *(x.grad for x in copies)]
    found = [out, *(x.grad for x in qkv)]
    for f, exact, naive in zip(found, results[torch.float32], results[torch.bfloat16], strict=True):
        compare(f, exact, naive)


def test_fused_adam_step():
    from transformer_engine.pytorch.optimizers import FusedAdam

    torch.manual_seed(0)
    start, gradient = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    results = []
    for optimizer in (FusedAdam, torch.optim.AdamW):
        weight = start.clone().requires_grad_()
        steps = optimizer([weight], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for _ in range(3):
            weight.grad = gradient.clone()
            steps.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # fp32, three steps


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"])
def test_fp8_linear(recipe):
    """e4m3 has three bits of mantissa: 2^-4 an entry, and less after a sum over 256 products."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    torch.manual_seed(0)
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16).cuda()
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # delayed scaling knows no amax the first time, and takes it over at the end of the context
        with te.autocast(enabled=True, recipe=getattr(recipes, recipe)()):
            out = layer(x)
    out.float().sum().backward()
    expected = F.linear(x.detach().float(), layer.weight.detach().float())
    assert (out.float() - expected).norm() < 2**-4 * expected.norm()
    assert x.grad is not None and x.grad.isfinite().all()
