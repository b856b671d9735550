"""Training by the command that users run: layers of Transformer Engine and local ones, losses, FP8, context
parallelism.

Curves of the same seed are compared, on data that can be learned (Megatron's mock data). In a dry run both curves come
from local layers in bf16 on a CPU, so that the tests themselves are tested.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from tests.gpu.commands import SMALL, losses, shape, train
from tests.gpu.conftest import DRY_RUN, HAS_GPU, HAS_TE

pytestmark = pytest.mark.gpu

ON_GPU = HAS_GPU and not DRY_RUN
ITERATIONS = 300 if ON_GPU else 6
# bf16 rounds at other places in other kernels; the first iterations see the same weights.
FIRST = 0.02
# Mean of the last tenth. Other seeds differ by more in runs of this length.
BAND_BF16, BAND_FP8 = 0.02, 0.05


def tail(curve: list[float]) -> float:
    return statistics.mean(curve[-max(1, len(curve) // 10) :])


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> list[float]:
    """The reference: bf16, the best layers that this machine has, the fused loss."""
    return losses(train(tmp_path_factory.mktemp("bf16"), shape(SMALL), ITERATIONS))


def check(name: str, curve: list[float], reference: list[float], band: float, report) -> None:
    assert len(curve) == len(reference) == ITERATIONS
    difference = tail(curve) / tail(reference) - 1
    report(f"{name}: loss of the last tenth, against bf16", f"{tail(curve):.4f}, {difference:+.2%} (band {band:.0%})")
    assert curve[0] == pytest.approx(reference[0], rel=FIRST)
    assert abs(difference) < band
    if ON_GPU:
        assert tail(curve) < reference[0] - 0.5, "something was learned"


def test_local_layers(bf16, tmp_path, report):
    """Without Transformer Engine's layers: local modules and torch's attention."""
    flags = [*shape(SMALL), "--transformer-impl", "local", "--no-persist-layer-norm"]
    check("local layers", losses(train(tmp_path, flags, ITERATIONS)), bf16, BAND_BF16, report)


def test_eager_loss(bf16, tmp_path, report):
    flags = [*shape(SMALL), "--mtpd-loss", "eager"]
    check("eager loss", losses(train(tmp_path, flags, ITERATIONS)), bf16, BAND_BF16, report)


RECIPES = {
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
    "current": "--fp8-format hybrid --fp8-recipe tensorwise",
    "current, first and last layers in bf16": "--fp8-format hybrid --fp8-recipe tensorwise --first-last-layers-bf16",
    "current, FP8 parameters": "--fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather "
    "--use-distributed-optimizer",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8(bf16, tmp_path, report, recipe):
    """Trunk and heads in FP8; output layer and losses in high precision."""
    if ON_GPU and not HAS_TE:
        pytest.skip("needs Transformer Engine (extra megatron-mtpd[te])")
    if ON_GPU and recipe == "mxfp8" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("MXFP8 needs a Blackwell GPU")
    flags = shape(SMALL) + (RECIPES[recipe].split() if ON_GPU else [])
    check(f"FP8 {recipe}", losses(train(tmp_path, flags, ITERATIONS)), bf16, BAND_FP8, report)


def test_fp8_checkpoint_goes_on(tmp_path, report):
    """A run that stops and resumes, amax histories included, follows the one that did not."""
    if ON_GPU and not HAS_TE:
        pytest.skip("needs Transformer Engine (extra megatron-mtpd[te])")
    fp8 = RECIPES["delayed"].split() if ON_GPU else []
    half = ITERATIONS // 2 if ITERATIONS < 20 else 10
    flags = [*shape(SMALL), *fp8]
    whole = losses(train(tmp_path / "whole", flags, 2 * half))
    kept = [*flags, "--save", str(tmp_path / "checkpoints"), "--load", str(tmp_path / "checkpoints")]
    train(tmp_path / "first", [*kept, "--save-interval", str(half), "--exit-interval", str(half)], 2 * half)
    second = losses(train(tmp_path / "second", [*kept, "--save-interval", "100000"], 2 * half))
    report("resumed FP8 run, loss of its last iteration against the whole run", f"{second[-1]:.4f}, {whole[-1]:.4f}")
    assert second == pytest.approx(whole[half:], rel=FIRST)


@pytest.mark.parametrize("loss", ["fused", "eager"])
def test_context_parallelism(tmp_path, report, loss):
    """Two ranks with half of every sequence each; attention is Transformer Engine's where it is there."""
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    iterations = 20 if ON_GPU else 3
    flags = [*shape(SMALL), "--mtpd-loss", loss, "--global-batch-size", "8" if ON_GPU else "2"]
    alone = losses(train(tmp_path / "alone", flags, iterations))
    flags = [*flags, "--context-parallel-size", "2"]
    halves = losses(train(tmp_path / "halves", flags, iterations, ranks=2))
    report(f"context parallelism, {loss} loss, last iteration against one rank", f"{halves[-1]:.4f}, {alone[-1]:.4f}")
    assert halves == pytest.approx(alone, rel=FIRST)
