"""The planned loss section of a GPU against what the fused loss allocates there, at real sizes, without one.

torch's fake tensors run the very code of the loss on a "cuda" device that allocates nothing, and its memory tracker
counts what would be; only the kernels, which allocate next to nothing, are stand-ins.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.losses import fused, kernels  # noqa: E402
from megatron_mtpd.losses.alignment import head_masks  # noqa: E402
from megatron_mtpd.losses.eager import HeadWeights  # noqa: E402
from megatron_mtpd.losses.rows import RowLosses  # noqa: E402
from megatron_mtpd.planning import memory  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402

POSITIONS, BATCH, HIDDEN, VOCABULARY, HEADS = 4096, 2, 2048, 122_880, 4
FLAGS = (
    f"--num-layers 28 --mtp-num-layers {HEADS} --hidden-size {HIDDEN} --ffn-hidden-size 6144 --num-attention-heads 16 "
    f"--seq-length {POSITIONS} --micro-batch-size {BATCH} --vocab-size {VOCABULARY} --swiglu --disable-bias-linear "
    "--normalization RMSNorm --untie-embeddings-and-output-weights"
)


def block_losses(logits, *args, **kwargs) -> RowLosses:
    heads, rows, _ = logits.shape
    numbers = [heads, *[heads - 1] * (len(RowLosses._fields) - 1)]
    return RowLosses(*(logits.new_empty(number, rows, dtype=torch.float32) for number in numbers))


TRITON = kernels.Kernels("triton", block_losses, lambda logits, *args: logits.new_empty(len(logits)), in_registers=True)


def allocated(config: MTPDConfig, dtype: torch.dtype, trains_weight: bool) -> int:
    """Bytes at the peak of the forward pass, which takes the gradients, beyond weight and hidden states."""

    def states(number: int) -> list[torch.Tensor]:
        shape = (POSITIONS, BATCH, HIDDEN)
        return [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(number)]

    with FakeTensorMode():
        weight = torch.empty(VOCABULARY, HIDDEN, dtype=dtype, device="cuda", requires_grad=trains_weight)
        main, *for_ce = states(1 + HEADS)
        for_kd = states(HEADS) if config.heads_pass_twice else for_ce
        mask = torch.ones(POSITIONS, BATCH, device="cuda")
        labels, masks = mask.long(), head_masks(mask, HEADS)
        head_weights = HeadWeights(config.alphas(HEADS, 0.3), config.betas(HEADS))
        with MemTracker() as tracker:
            fused.fused_mtpd_loss(main, for_ce, for_kd, weight, labels, mask, masks, head_weights, config)
        inputs = sum(x.nbytes for x in {id(x): x for x in (weight, main, *for_ce, *for_kd)}.values())
        return tracker.get_tracker_snapshot("peak")[torch.device("cuda:0")]["Total"] - inputs


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--bf16", {}),
        ("", {}),
        ("--bf16 --mtpd-kd-output-share 1", {"kd_output_share": 1.0}),
        ("--bf16 --mtpd-kd-trunk-share 0.5", {"kd_trunk_share": 0.5}),
        ("--bf16 --mtpd-train heads", {"train": "heads"}),
    ],
    ids=["bf16", "fp32", "output shares differ", "two passes", "frozen trunk"],
)
def test_what_the_fused_loss_takes_on_a_gpu(monkeypatch, flags, options):
    monkeypatch.setattr(fused, "choose", lambda *args: TRITON)
    for factory in ("tensor", "zeros", "empty", "empty_like"):  # as they are where there is a GPU
        monkeypatch.setattr(torch, factory, inspect.unwrap(getattr(torch, factory)))
    addmm = torch.addmm  # fake tensors do not know its mixed product, which writes in place
    monkeypatch.setattr(torch, "addmm", lambda *args, **o: o["out"] if "out_dtype" in o else addmm(*args, **o))
    run = run_from_flags([*FLAGS.split(), *flags.split()], 1)
    config = MTPDConfig(**options)
    found = allocated(config, torch.bfloat16 if "--bf16" in flags else torch.float32, config.train == "all")
    # Beside the loss the plan counts two copies of the hidden states, which model and autograd keep at that moment.
    kept = 2 * (1 + HEADS) * POSITIONS * BATCH * HIDDEN * run.step.bytes_weight
    assert memory.loss_section(run, "fused") - kept == pytest.approx(found, rel=0.05)
