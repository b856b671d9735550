"""A plan: every figure of a run, put together; as a table for people and as JSON for programs.

Time. A stage's work is divided by the peak rate of its GPUs times `mfu`, the share of it that a *busy* GPU reaches; the
step takes the slowest stage's time for every micro-batch, and once more for filling and draining the pipeline. So the
layout and the number of micro-batches count, and the share over the whole step comes out lower (`mfu_of_step`). Exposed
communication is no part of it: choose `mfu` after a measured step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_mtpd.planning import balance, flops, memory, parameters
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
    """Work of each rank of the pipeline, relative to the mean."""

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
    flops_step: float
    layout: Layout
    proposal: Layout
    mfu: float
    seconds: float | None
    mfu_of_step: float | None

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
    layout, proposal = _layouts(run)
    flops_step = flops.of_token(model, run.step.sequence) * run.tokens
    seconds = mfu_of_step = None
    if gpu is not None:
        rate = _rate(run, gpu)
        seconds = _seconds(run, rate * mfu)
        mfu_of_step = flops_step / (seconds * rate * parallel.ranks)
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
        flops.of_token(model, run.step.sequence),
        flops_step,
        layout,
        proposal,
        mfu,
        seconds,
        mfu_of_step,
    )


def with_stages(run: Run, stages: Sequence[str]) -> Run:
    """The same run, laid out otherwise."""
    return replace(run, model=replace(run.model, stages=tuple(stages)))


def balanced_stages(run: Run) -> tuple[str, ...]:
    """The layers of each stage such that the slowest is as fast as can be."""
    stages = run.parallel.pp * run.parallel.virtual
    end = flops.work_of_the_end(run)
    return balance.balanced(run.model.layers, lambda symbol: flops.work_of_layer(run, symbol), end, stages)


def _layouts(run: Run) -> tuple[Layout, Layout]:
    return _layout(run), _layout(with_stages(run, balanced_stages(run)))


def _work_of_ranks(run: Run) -> list[float]:
    stages = flops.of_stages(run)
    return [sum(stages[rank :: run.parallel.pp]) for rank in range(run.parallel.pp)]


def _layout(run: Run) -> Layout:
    work = _work_of_ranks(run)
    mean = sum(work) / len(work)
    model = run.model
    flags = balance.short_flags(model.stages) if run.parallel.virtual == 1 else None
    return Layout(balance.pattern(model.stages, model.head, model.heads), flags, tuple(w / mean for w in work))


def _rate(run: Run, gpu: GPU) -> float:
    """Operations a second that a GPU has at its best, in the run's precision."""
    if run.step.fp8 and gpu.tflops_fp8 is None:
        raise ValueError(f"--fp8-format: {gpu.name} has no FP8.")
    rate = gpu.tflops_fp8 if run.step.fp8 else gpu.tflops if run.step.bytes_weight == 2 else gpu.tflops_fp32
    assert rate is not None
    return rate * 1e12


def _seconds(run: Run, rate: float) -> float:
    """Of a step, at `rate` operations a second of every busy GPU."""
    parallel, step = run.parallel, run.step
    tokens = step.micro_batch * step.sequence / (parallel.tp * parallel.cp)
    filling = (parallel.pp - 1) / parallel.virtual
    return max(_work_of_ranks(run)) * tokens / rate * (step.micro_batches + filling)


# As a table ----------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan for people."""
    run, parallel = plan.run, plan.run.parallel
    where = f"{parallel.ranks} x {plan.gpu.name}" if plan.gpu else f"{parallel.ranks} CPU processes"
    sizes = [f"{name.upper()} {getattr(parallel, name)}" for name in ("tp", "pp", "cp", "dp", "ep")]
    main, heads = plan.parameters - plan.parameters_of_heads, plan.parameters_of_heads
    lines = [
        f"{where}: {', '.join(sizes)}; {run.step.micro_batches} micro-batches of {run.step.micro_batch} x "
        f"{run.step.sequence} a step",
        "",
        f"parameters          {_big(plan.parameters)}: main model {_big(main)}, {run.model.heads} heads {_big(heads)}",
        f"active for a token  {_big(plan.active + plan.active_of_heads)}: main model {_big(plan.active)}, heads "
        f"{_big(plan.active_of_heads)}",
        f"operations          {plan.flops_token:.3e} a token, {plan.flops_step:.3e} a step of {run.tokens:,} tokens",
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
