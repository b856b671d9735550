"""Triton's kernels against torch's, the reference: one set of cases for the interpreter and for a GPU.

Not collected by itself: `test_triton.py` runs it in a process where TRITON_INTERPRET=1 was set before Triton was
imported, and `tests/gpu/test_triton_loss.py` imports it where there is a GPU.

In fp64 both do the same sums in another order: 1e-9 leaves room for differences of large logarithms, as in
`test_fused.py`. Elsewhere the tolerance is a few roundings of the dtype.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import chunk, kernels
from megatron_mtpd.losses.rows import RowWeights
from megatron_mtpd.losses.topn import topn_cut
from tests.distributed.gloo import run
from tests.unit.losses.test_fused import OBJECTIVES, assert_same, eager, fused, make_case
from tests.unit.losses.test_topn import DTYPES, distributions, expected_set

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")


def triton() -> kernels.Kernels:
    return kernels.choose(DEVICE, "triton")


def small_tiles(kernel: Callable, *arguments: Any) -> Any:
    """Calls one of Triton's, with tiles so small that rows are of several, the last with little in it."""
    with patch.object(sys.modules[kernel.__module__], "TILE", 128):
        return kernel(*arguments)


def block(size: int, heads: int = 2, num_rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, RowWeights]:
    """Logits of all heads, labels and weights, fp64."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn(1 + heads, num_rows, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(size, (num_rows,), generator=generator)
    weights = torch.rand(1 + 2 * heads, num_rows, generator=generator, dtype=torch.float64)
    return logits, labels, RowWeights(weights[: 1 + heads], weights[1 + heads :])


def check(
    logits: Tensor,
    labels: Tensor,
    weights: RowWeights,
    config: MTPDConfig,
    is_apart: bool = False,
    rtol: float = 1e-9,
    atol: float = 1e-9,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Losses, gradient and the distillation's own gradient are those of `chunk.block_losses` in fp64."""
    cut = topn_cut(logits[0].contiguous(), config.top_n, group) if config.objective == "topn_kl" else None
    reference = logits.double().clone()
    kd = torch.empty_like(reference[1:]) if is_apart else None
    expected = chunk.block_losses(reference, labels, config, None if cut is None else cut.double(), weights, kd, group)
    z, device_weights = logits.to(DEVICE).clone(), weights.map(lambda w: w.to(DEVICE))
    device_kd = torch.full_like(z[1:], torch.nan) if is_apart else None
    device_cut = None if cut is None else cut.to(DEVICE)
    actual = small_tiles(
        triton().block_losses, z, labels.to(DEVICE), config, device_cut, device_weights, device_kd, group
    )
    pairs = [*zip(actual._fields, actual, expected, strict=True), ("gradient", z, reference)]
    if kd is not None:
        pairs.append(("gradient of the distillation", device_kd, kd))
    for what, x, y in pairs:
        x, y = (t.double() for t in (x.cpu(), y))
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(objective, temperature):
    config = MTPDConfig.as_published(objective=objective, top_n=20, temperature=temperature)
    for is_apart in (False, True):
        check(*block(151), config, is_apart)


@pytest.mark.parametrize(("size", "heads"), [(2, 1), (127, 4), (128, 2), (129, 1)])
def test_sizes_that_do_not_divide(size, heads):
    for objective in ("topn_kl", "lk"):
        check(*block(size, heads, num_rows=3), MTPDConfig.as_published(objective=objective, top_n=size // 2))


@pytest.mark.parametrize("top_n", [1, 2, 99, 100, 1000])
def test_top_n_from_one_to_beyond_the_vocabulary(top_n):
    check(*block(100), MTPDConfig.as_published(top_n=top_n))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties(objective):
    """Few values: equals at the top, at the N-th and at the labels; the argmax is the lowest id among them."""
    logits, *rest = block(151)
    logits = logits.round()
    logits[1, 0] = logits[0, 0]
    logits[:, 1] = 0.0
    check(logits, *rest, MTPDConfig.as_published(objective=objective, top_n=20))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_of_minus_infinity(objective):
    """Single tokens, a whole first tile, and all but one."""
    logits, labels, weights = block(151)
    labels[:] = torch.tensor([150, 149, 70, 100, 150])
    logits[..., [3, 70, 148]] = -torch.inf
    logits[:, 2, 70] = 1.0
    logits[:, 1, :128] = -torch.inf
    logits[:, 4, :150] = -torch.inf
    check(logits, labels, weights, MTPDConfig.as_published(objective=objective, top_n=20, temperature=1.5))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_large_logits(objective):
    """Spreads that overflow an exponential of anything but a difference to the maximum."""
    logits, *rest = block(151)
    check(logits * 300.0 + 5000.0, *rest, MTPDConfig.as_published(objective=objective, top_n=20), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lower_precision(objective, dtype):
    """Against fp64 on the same numbers. Losses are made in fp32, and their logarithms of some 10 lose few of its 24
    bits; the gradient is rounded once to the dtype, 4 eps of numbers of up to 1."""
    logits, *rest = block(151)
    eps = torch.finfo(torch.float32).eps
    check(
        logits.to(dtype),
        *rest,
        MTPDConfig.as_published(objective=objective, top_n=20, temperature=0.9),
        rtol=max(64 * eps, 2 * torch.finfo(dtype).eps),
        atol=64 * eps,
    )


def test_without_gradients_the_logits_are_only_read():
    logits, labels, _ = block(151)
    z = logits.to(DEVICE).clone()
    triton().block_losses(z, labels.to(DEVICE), MTPDConfig.as_published(objective="lk"))
    assert torch.equal(z.cpu(), logits)


@pytest.mark.parametrize(("objective", "masked"), [("topn_kl", 0.3), ("e2e_tv", 1.1)])
def test_the_whole_fused_loss(monkeypatch, objective, masked):
    """Masks, shares, two passes and chunks as they come: against the eager loss."""
    if not IS_INTERPRETED:
        pytest.skip("`test_fused.py` keeps its cases on the CPU; blocks are compared on the GPU above")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    for two_lists in (False, True):
        case = make_case(masked=masked, two_lists=two_lists)
        config = MTPDConfig.as_published(objective=objective, top_n=9, ce_output_share=0.5)
        assert_same(fused(case, config, chunk_rows=24), eager(case, config))


# Slices of the vocabulary -------------------------------------------------------------------------------------------


def on_slices() -> None:
    group = dist.group.WORLD
    assert group is not None
    for objective in OBJECTIVES:
        logits, labels, weights = block(90)
        logits[:, 2] = logits[:, 2].round()
        excluded = (logits[0] < 0) & (torch.arange(90) >= 45)  # the same of all heads: else a KL is infinite
        excluded[1, :45] = True  # a slice without any token
        excluded[torch.arange(5), labels] = False
        logits[:, excluded] = -torch.inf
        mine = logits.chunk(group.size(), -1)[group.rank()].contiguous()
        check(
            mine, labels, weights, MTPDConfig.as_published(objective=objective, top_n=20, temperature=0.8), group=group
        )
    for dtype in (torch.float32, torch.bfloat16):
        for name, x in distributions(dtype).items():
            whole = x[:, :1500]
            mine = whole.chunk(group.size(), -1)[group.rank()].contiguous()
            for n in (1, 17, 1499, 1500):
                cut = triton().topn_cut(mine, n, group)
                assert torch.equal(whole >= cut.unsqueeze(-1), expected_set(whole, n)), (name, n)


@pytest.mark.skipif(not IS_INTERPRETED, reason="one GPU holds one rank")
def test_slices_of_the_vocabulary():
    run(on_slices, 2)


# The top-N cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", distributions(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_set_is_that_of_sorting(dtype, name):
    logits = distributions(dtype)[name]
    for n in (1, 17, 500, logits.shape[-1] - 1, logits.shape[-1]):
        cut = small_tiles(triton().topn_cut, logits.to(DEVICE), n).cpu()
        assert cut.dtype == dtype
        assert torch.equal(logits >= cut.unsqueeze(-1), expected_set(logits, n)), n


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="top-n of 0"):
        triton().topn_cut(torch.zeros(1, 3, device=DEVICE), 0)
