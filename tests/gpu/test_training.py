"""Training by the command that users run: layers of Transformer Engine and local ones, losses, FP8, context
parallelism, DeepSpeed.

Curves that start at the same weights are compared, of the main head and of the others, on data that can be learned
(Megatron's mock data). In a dry run all come from local layers in bf16 on a CPU: then the tests are what is tested.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import pytest
from torch.utils.cpp_extension import CUDA_HOME

from tests.gpu.commands import Training
from tests.gpu.machine import ON_GPU
from tests.gpu.runs import FP8, ITERATIONS, shown

pytestmark = pytest.mark.gpu

# bf16 rounds at other places in other kernels; the first iterations see the same weights.
FIRST = 0.02
# Mean of the last tenth. Other seeds differ by more in runs of this length: hence the same weights at the start.
BAND_BF16, BAND_FP8 = 0.02, 0.05
NATS = 0.01  # what a loss near 0 may differ by
METRICS = {"main": "lm loss", "head 1": "cross_entropy/head_1", "head 2": "cross_entropy/head_2"}


def tail(curve: Sequence[float]) -> float:
    return statistics.mean(curve[-max(1, len(curve) // 10) :])


def check(name: str, found: Training, reference: Training, band: float, report: Callable[[str, object], None]) -> None:
    """Every head's loss follows the reference's."""
    curves = {who: (found.curve(metric), reference.curve(metric)) for who, metric in METRICS.items()}
    off = {who: tail(curve) / tail(expected) - 1 for who, (curve, expected) in curves.items()}
    said = ", ".join(f"{who} {tail(curves[who][0]):.4f} ({difference:+.2%})" for who, difference in off.items())
    report(f"{name}: loss of the last tenth, against bf16", f"{said}, band {band:.0%}")
    for who, (curve, expected) in curves.items():
        assert len(curve) == len(expected) == ITERATIONS
        assert curve[0] == pytest.approx(expected[0], rel=FIRST), who
        assert tail(curve) == pytest.approx(tail(expected), rel=band, abs=NATS), who
        if ON_GPU:
            assert tail(curve) < expected[0] - 0.5, f"{who}: something was learned"


@pytest.mark.needs_te  # without it the reference has these layers too
@pytest.mark.runs("bf16", "local layers")
def test_local_layers(runs, report):
    """Without Transformer Engine's layers: local modules and torch's attention."""
    check("local layers", runs["local layers"], runs["bf16"], BAND_BF16, report)


@pytest.mark.runs("bf16", "eager loss")
def test_eager_loss(runs, report):
    check("eager loss", runs["eager loss"], runs["bf16"], BAND_BF16, report)


def recipe(name: str) -> object:
    """In a dry run all would be the same run: one is enough."""
    capability = (10, 0) if name == "MXFP8" else (9, 0) if "blockwise" in name else (8, 9)
    needed = pytest.mark.needs_te(capability=capability, or_dry=name == "FP8 delayed")
    return pytest.param(name, marks=[needed, pytest.mark.runs("bf16", name)])


@pytest.mark.parametrize("name", [recipe(name) for name in FP8])
def test_fp8(runs, report, name):
    """Trunk and heads in FP8; output layer and losses in high precision."""
    check(shown(name), runs[name], runs["bf16"], BAND_FP8, report)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.runs(n, f"{n}, local")) for n in ("experts", "latent attention")]
)
def test_a_checkpoint_goes_on_with_local_layers(runs, report, name):
    """Grouped experts, latent attention and fused norms of Transformer Engine, and the same in local modules: one
    checkpoint, the same losses. In a dry run both are local."""
    whole, local = runs[name], runs[f"{name}, local"]
    compared = [(whole.curve(m)[-len(local.curve(m)) :], local.curve(m)) for m in METRICS.values()]
    worst = max(abs(x / y - 1) for expected, found in compared for x, y in zip(found, expected, strict=True))
    report(f"{name}: largest difference of a loss, gone on with local layers", f"{worst:.2e} (bar {FIRST})")
    assert 0 < len(local.curve()) < len(whole.curve())
    assert worst < FIRST


CAN_COMPILE = CUDA_HOME is not None and find_spec("ninja") is not None


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (extra megatron-mtpd[deepspeed])")
@pytest.mark.skipif(ON_GPU and not CAN_COMPILE, reason="needs nvcc and ninja: DeepSpeed compiles its Adam")
@pytest.mark.runs("one gradient norm", "ZeRO-3 with offload")
def test_zero3_with_offload(runs, report):
    """Parameters and optimizer in the CPU's memory, where DeepSpeed compiles its own Adam."""
    found, expected = (runs[name].curve() for name in ("ZeRO-3 with offload", "one gradient norm"))
    report("ZeRO-3 with offload, last loss against Megatron's optimizer", f"{found[-1]:.4f}, {expected[-1]:.4f}")
    assert found == pytest.approx(expected, rel=FIRST)


@pytest.mark.needs_gpus(2)
@pytest.mark.parametrize(
    "loss", [pytest.param(x, marks=pytest.mark.runs(f"{x} loss on 1", f"{x} loss on 2")) for x in ("fused", "eager")]
)
def test_context_parallelism(runs, report, loss):
    """Two ranks with half of every sequence each; attention is Transformer Engine's where it is there."""
    alone, halves = (runs[f"{loss} loss on {ranks}"].curve() for ranks in (1, 2))
    report(f"context parallelism, {loss} loss, last iteration against one rank", f"{halves[-1]:.4f}, {alone[-1]:.4f}")
    assert halves == pytest.approx(alone, rel=FIRST)
