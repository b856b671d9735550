"""Triton's loss kernels on a GPU: the cases of `triton_cases.py` compiled, the mixed product, and time beside torch's.

A dry run skips them: the interpreter runs the same cases in `tests/unit/losses/test_triton.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.alignment import head_masks
from megatron_mtpd.losses.eager import HeadWeights, attach_heads_loss
from megatron_mtpd.losses.fused import fused_mtpd_loss
from megatron_mtpd.losses.kernels import choose
from tests.gpu.machine import ON_GPU, ROOT, environment, tool
from tests.unit.losses.triton_cases import *  # noqa: F403  # the tests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU that torch can use"),
    pytest.mark.usefixtures("runs"),  # the jobs of other tests go on beside those that measure no time
]
TOKENS, HIDDEN, VOCAB, HEADS, TOP_N = 8_192, 4_096, 131_072, 4, 10_000


def loss_step(kernels: str, dtype: torch.dtype, tokens: int, hidden: int, vocab: int, top_n: int) -> Callable:
    """Forward and backward of the whole fused loss; returns losses and gradients."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    main = normal(tokens, 1, hidden)
    states = [main, *(0.8 * main + 0.6 * normal(tokens, 1, hidden) for _ in range(HEADS))]
    states = [(3.0 * x).to(dtype).requires_grad_() for x in states]
    weight = (normal(vocab, hidden) * hidden**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens, 1), generator=generator, device="cuda")
    mask = torch.ones(tokens, 1, device="cuda")
    masks = head_masks(mask, HEADS)
    config = MTPDConfig.as_published(top_n=top_n)
    head_weights = HeadWeights(config.alphas(HEADS, 0.3), config.betas(HEADS))

    def step() -> list[torch.Tensor]:
        for x in (weight, *states):
            x.grad = None
        main_loss, heads_loss, _ = fused_mtpd_loss(
            states[0], states[1:], states[1:], weight, labels, mask, masks, head_weights, config, kernels=kernels
        )
        attached = attach_heads_loss(main_loss, mask, heads_loss)
        ((attached * mask).sum() / tokens).backward()
        return [main_loss.detach(), heads_loss.detach(), *(x.grad for x in (weight, *states))]

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_loss_is_that_of_torch_kernels(dtype):
    """Both round the logits' gradient to the model's dtype before the products. In bf16 what Triton's also differ by is
    the weight's gradient, summed over chunks in fp32 without a rounding a chunk: some eps of its size."""
    sizes = (dtype, 600, 256, 5_003, 400)
    for x, y in zip(loss_step("triton", *sizes)(), loss_step("torch", *sizes)(), strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm()
        assert error <= 8 * torch.finfo(dtype).eps + 1e-5  # fp32 products differ by their order, TF32 is off


def test_a_gpu_gets_triton_unless_another_is_named(monkeypatch):
    monkeypatch.delenv("MTPD_LOSS_KERNELS", raising=False)
    assert choose(torch.device("cuda")).name == "triton"
    monkeypatch.setenv("MTPD_LOSS_KERNELS", "torch")
    assert choose(torch.device("cuda")).name == "torch"


def test_a_wrong_reduction_of_the_losses_ends_the_step():
    """On a GPU the check is a device assertion, which ends the process that makes it: here one of its own."""
    code = """
import torch
from megatron_mtpd.losses.eager import attach_heads_loss
losses, mask = torch.ones(4, 1, device="cuda", requires_grad=True), torch.ones(4, 1, device="cuda")
attached = attach_heads_loss(losses, mask, torch.ones((), device="cuda", requires_grad=True))
(attached * REDUCTION).sum().backward()
torch.cuda.synchronize()
"""
    for reduction, is_fine in (("mask / 4", True), ("torch.arange(4., device='cuda').view(4, 1)", False)):
        script = code.replace("REDUCTION", reduction)
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) is is_fine, done.stderr[-2000:]
        assert is_fine or "assert" in done.stderr.lower()


def seconds(function: Callable, repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def test_faster_than_torch_kernels_and_smaller(quiet, report):
    """8,192 tokens, hidden 4,096, a vocabulary of 131,072, bf16."""
    measured = {}
    for kernels in ("torch", "triton"):
        step = loss_step(kernels, torch.bfloat16, TOKENS, HIDDEN, VOCAB, TOP_N)
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        measured[kernels] = (seconds(step, 5), peak)
        report(f"loss section, {kernels}", f"{1e3 * measured[kernels][0]:.1f} ms, {peak / 2**30:.2f} GiB")
        del step
        torch.cuda.empty_cache()
    assert measured["triton"][0] < measured["torch"][0]
    assert measured["triton"][1] < measured["torch"][1]


def test_beside_megatrons_plain_loss(quiet, tmp_path, report):
    """The loss section with distillation takes no more time than Megatron's cross-entropy alone, and at most 0.15 of
    its memory: the same sizes, by the command that users measure with."""
    file = tmp_path / "rows.json"
    sizes = f"--heads {HEADS} --vocab {VOCAB} --topn {TOP_N} --tokens {TOKENS} --hidden {HIDDEN} --dtype bf16"
    variants = ["--repeats", "7", "--variants", "megatron_mtp", "mtpd_fused"]  # eager does not fit beside them
    torch.cuda.empty_cache()
    tool("benchmark_loss.py", *sizes.split(), *variants, "--json", file)
    rows = {row["variant"]: row for row in json.loads(file.read_text())["rows"]}
    for variant, row in rows.items():
        report(
            f"loss section, {variant}",
            f"{1e3 * row['seconds_median']:.1f} ms, {row['peak_extra_bytes'] / 2**30:.2f} GiB",
        )
    time, memory = (rows["mtpd_fused"][f"ratio_{what}_vs_megatron"] for what in ("time", "memory"))
    report("loss section, MTP-D / plain MTP", f"time {time:.3f} (bar 1.00), memory {memory:.3f} (bar 0.15)")
    assert time <= 1.0
    assert memory <= 0.15


def test_the_cut_is_found_faster_than_by_torch(quiet, report):
    logits = 3.0 * torch.randn(800, VOCAB, device="cuda", dtype=torch.bfloat16)
    ours, probes = choose(logits.device, "triton").topn_cut, choose(logits.device, "torch").topn_cut
    times = {
        "triton": seconds(lambda: ours(logits, TOP_N)),
        "probes": seconds(lambda: probes(logits, TOP_N)),
        "kthvalue": seconds(lambda: logits.kthvalue(VOCAB - TOP_N + 1)),
        "topk": seconds(lambda: logits.topk(TOP_N)),
    }
    for name, time in times.items():
        report(f"top-N cut of 800 rows, {name}", f"{1e3 * time:.2f} ms")
    assert times["triton"] < min(times["probes"], times["topk"])
