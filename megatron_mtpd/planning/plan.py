"""A plan: every figure of a run, put together; as a table for people and as JSON for programs.

Time. A stage's work is divided by the peak rate of its GPUs times `mfu`, the share of it that a *busy* GPU reaches; the
step takes the slowest stage's time for every micro-batch, and once more for filling and draining the pipeline. So the
layout and the number of micro-batches count, and the share over the whole step comes out lower (`mfu_of_step`). Exposed
communication is no part of it: choose `mfu` after a measured step.

In an FP8 run the peak is that of the mix: every operation takes its time at the peak of the precision it is made in, so
the rate is the harmonic mean. Stages are balanced by that time, and `loads` are shares of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_mtpd.planning import balance, flops, memory, parameters
from megatron_mtpd.planning.flops import Work
from megatron_mtpd.planning.gpus import GPU
from megatron_mtpd.planning.memory import Memory
from megatron_mtpd.planning.shape import Run


@dataclass(frozen=True)
class Layout:
    """Stages of a pipeline, and how they fit to each other."""

    pattern: str
    flags: str | None
    """The same in short, where it can be said so."""
    loads: tuple[float, ...]
    """Time of each rank of the pipeline at its peak, relative to the mean."""

    @property
    def worst(self) -> float:
        return max(self.loads)


@dataclass(frozen=True)
class Plan:
    """All figures. Bytes, tokens, seconds; memory by rank of the pipeline."""

    run: Run
    gpu: GPU | None
    parameters: int
    parameters_of_heads: int
    active: int
    active_of_heads: int
    memory: tuple[Memory, ...]
    loss_fused: float
    loss_eager: float
    flops_token: float
    flops_token_fp8: float
    """Of them in FP8."""
    flops_step: float
    layout: Layout
    proposal: Layout
    mfu: float
    """Share of the peak that a busy GPU reaches; the peak of a mix of precisions is their harmonic mean."""
    seconds: float | None
    seconds_at_peak: float | None
    """What `flops_step` take on all GPUs, evenly, each operation at the peak of the precision it is made in: without
    waiting stages and without what is recomputed; a frozen part counts as a trained one, as in Megatron's own figure.
    Over a measured step's seconds it is the MFU of that step."""
    mfu_of_step: float | None
    """`seconds_at_peak` over `seconds`."""

    @property
    def fits(self) -> bool | None:
        """Whether every rank has room, with memory.RESERVE to spare."""
        return self.gpu and max(m.peak for m in self.memory) + memory.RESERVE <= self.gpu.gib * 2**30

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, with the peaks."""
        document = asdict(self)
        document["memory"] = [{**asdict(m), "peak": m.peak} for m in self.memory]
        return {**document, "tokens_step": self.run.tokens, "fits": self.fits}


def plan(run: Run, gpu: GPU | None, mfu: float = 0.4) -> Plan:
    """All figures of a run. `gpu` None: a CPU, of which no time is expected."""
    model, parallel = run.model, run.parallel
    whole = parameters.whole(model)
    of_heads = sum(count.total for count in whole.heads)
    active, active_of_heads = parameters.active(model)
    work = flops.of_token(run)
    seconds = at_peak = mfu_of_step = None
    if gpu is not None:
        seconds = _seconds(run, gpu) / mfu
        at_peak = _in_ordinary(work, run, gpu) * run.tokens / (_rate(run, gpu) * parallel.ranks)
        mfu_of_step = at_peak / seconds
    return Plan(
        run,
        gpu,
        whole.total.total,
        of_heads,
        active,
        active_of_heads,
        tuple(memory.of_rank(run, rank) for rank in range(parallel.pp)),
        memory.loss_section(run, "fused"),
        memory.loss_section(run, "eager"),
        work.total,
        work.fp8,
        work.total * run.tokens,
        _layout(run, gpu),
        _layout(with_stages(run, balanced_stages(run, gpu)), gpu),
        mfu,
        seconds,
        at_peak,
        mfu_of_step,
    )


def with_stages(run: Run, stages: Sequence[str]) -> Run:
    """The same run, laid out otherwise."""
    return replace(run, model=replace(run.model, stages=tuple(stages)))


def balanced_stages(run: Run, gpu: GPU | None) -> tuple[str, ...]:
    """The layers of each stage such that the slowest is as fast as can be."""
    layers = [_in_ordinary(work, run, gpu) for work in flops.work_of_layers(run)]
    end = _in_ordinary(flops.work_of_the_end(run), run, gpu)
    return balance.balanced(run.model.layers, layers, end, run.parallel.pp * run.parallel.virtual)


def _work_of_ranks(run: Run, gpu: GPU | None) -> list[float]:
    stages = [_in_ordinary(work, run, gpu) for work in flops.of_stages(run)]
    return [sum(stages[rank :: run.parallel.pp]) for rank in range(run.parallel.pp)]


def _layout(run: Run, gpu: GPU | None) -> Layout:
    work = _work_of_ranks(run, gpu)
    mean = sum(work) / len(work)
    model = run.model
    flags = balance.short_flags(model.stages) if run.parallel.virtual == 1 else None
    return Layout(balance.pattern(model.stages, model.head, model.heads), flags, tuple(w / mean for w in work))


def _rate(run: Run, gpu: GPU) -> float:
    """Operations a second that a GPU has at its best, in the run's ordinary precision."""
    return (gpu.tflops if run.step.bytes_weight == 2 else gpu.tflops_fp32) * 1e12


def _in_ordinary(work: Work, run: Run, gpu: GPU | None) -> float:
    """Operations of the run's ordinary precision that take as long. `gpu` None: all take the same time."""
    if gpu is None or not run.step.fp8:
        return work.total
    if gpu.tflops_fp8 is None:
        raise ValueError(f"--fp8-format: {gpu.name} has no FP8.")
    return work.ordinary + work.fp8 * _rate(run, gpu) / (gpu.tflops_fp8 * 1e12)


def _seconds(run: Run, gpu: GPU) -> float:
    """Of a step, of GPUs at their peak while they are busy."""
    parallel, step = run.parallel, run.step
    tokens = step.micro_batch * step.sequence / (parallel.tp * parallel.cp)
    filling = (parallel.pp - 1) / parallel.virtual
    return max(_work_of_ranks(run, gpu)) * tokens / _rate(run, gpu) * (step.micro_batches + filling)


# As a table ----------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan for people."""
    run, parallel = plan.run, plan.run.parallel
    where = f"{parallel.ranks} x {plan.gpu.name}" if plan.gpu else f"{parallel.ranks} CPU processes"
    sizes = [f"{name.upper()} {getattr(parallel, name)}" for name in ("tp", "pp", "cp", "dp", "ep")]
    main, heads = plan.parameters - plan.parameters_of_heads, plan.parameters_of_heads
    in_fp8 = f", {plan.flops_token_fp8 / plan.flops_token:.0%} in FP8" if run.step.fp8 else ""
    lines = [
        f"{where}: {', '.join(sizes)}; {run.step.micro_batches} micro-batches of {run.step.micro_batch} x "
        f"{run.step.sequence} a step",
        "",
        f"parameters          {_big(plan.parameters)}: main model {_big(main)}, {run.model.heads} heads {_big(heads)}",
        f"active for a token  {_big(plan.active + plan.active_of_heads)}: main model {_big(plan.active)}, heads "
        f"{_big(plan.active_of_heads)}",
        f"operations          {plan.flops_token:.3e} a token, {plan.flops_step:.3e} a step of {run.tokens:,} tokens"
        + in_fp8,
        f"loss section        {_gib(plan.loss_fused)} GiB fused, {_gib(plan.loss_eager)} GiB eager (last stage)",
        "",
        "GiB of a rank, by pipeline stage",
        f"{'stage':>5} {'weights':>9} {'grads':>9} {'optimizer':>9} {'activ.':>9} {'loss':>9} {'moment':>9} "
        f"{'process':>9} {'peak':>9} {'load':>6}",
    ]
    for rank, m in enumerate(plan.memory):
        numbers = (m.weights, m.gradients, m.optimizer, m.activations, m.loss, m.moment, m.process, m.peak)
        lines.append(f"{rank:5} " + " ".join(f"{_gib(x):>9}" for x in numbers) + f" {plan.layout.loads[rank]:6.2f}")
    lines.append("")
    if parallel.pp > 1:
        lines.append(f"balanced layout     slowest stage {plan.proposal.worst:.2f} of the mean (as planned "
                     f"{plan.layout.worst:.2f}):")  # fmt: skip
        if plan.proposal.flags is not None:
            lines.append(f"  {plan.proposal.flags or '(the even one)'}")
        lines.append(f"  --hybrid-layer-pattern '{plan.proposal.pattern}'")
    if plan.gpu and plan.seconds and plan.mfu_of_step:
        lines.append(
            f"expected step       {plan.seconds:.2f} s at {plan.mfu:.0%} of the peak while busy: "
            f"{run.tokens / plan.seconds:,.0f} tokens/s, {plan.mfu_of_step:.1%} over the step"
        )
        room = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(
            f"memory              {room}: {plan.gpu.gib:.0f} GiB, of which {_gib(memory.RESERVE)} are kept free"
        )
    return "\n".join(lines)


def _big(number: float) -> str:
    return f"{number / 1e9:.3f}B" if number >= 1e8 else f"{number:,.0f}"


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f}"
