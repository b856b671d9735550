"""Memory of a rank at its peak, part by part.

Weights, gradients and optimizer are there all the time. On top come the activations of the micro-batches in flight
(1F1B: a stage has as many as stages follow it, itself included), the loss section on the last stage, and what a moment
needs. The peak is the largest of three moments: the end of the loss's forward pass, the delivery of its gradients, and
the backward of the widest layer.

Bytes that torch has allocated. A GPU needs some GiB beyond them (`RESERVE`): context, NCCL, fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_mtpd.losses.walk import CPU_BLOCK, CPU_CHUNK, CPU_CHUNK_LEAST, CPU_CHUNK_LOGITS, GPU_CHUNK
from megatron_mtpd.planning import activations, parameters
from megatron_mtpd.planning.parameters import Count
from megatron_mtpd.planning.shape import Run

RESERVE = 4 * 2**30
"""Bytes of a GPU that no plan may fill."""
CPU_PROCESS = 75 * 10**6
"""Resident bytes of a process on a CPU that are no tensors of ours: libraries at their first call, data, process
groups. Measured, with a model of next to nothing."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `loss`: of the loss section at its worst; `moment`: of the widest layer, where that is
    more."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    moment: float
    process: float
    """On a CPU: `CPU_PROCESS`."""

    @property
    def allocated(self) -> float:
        """By torch, for tensors: what torch.cuda.max_memory_allocated says on a GPU."""
        return self.peak - self.process

    @property
    def peak(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def of_rank(run: Run, pp_rank: int) -> Memory:
    """Of a rank of that pipeline stage."""
    parallel, step = run.parallel, run.step
    parts = parameters.of_rank(run.model, parallel, pp_rank)
    everything, trained = parts.total, _trained(run, parts)
    replicas = (parallel.dp * parallel.cp, parallel.expert_dp) if step.shards_optimizer else (1, 1)
    weights = everything.total * step.bytes_weight
    if step.fp8:  # copies of the linear layers for forward and backward, or these alone
        in_fp8 = everything.total - parts.embedding - parts.output
        weights += in_fp8 * (2 - step.bytes_weight if step.fp8_weights else 2)
    optimizer = (trained.dense / replicas[0] + trained.expert / replicas[1]) * step.bytes_optimizer
    kept, widest = _activations(run, pp_rank)
    last = pp_rank == parallel.pp - 1
    loss = loss_section(run) if last else 0.0
    return Memory(
        weights,
        trained.total * step.bytes_gradient,
        optimizer,
        kept,
        loss,
        max(0.0, widest - loss),
        CPU_PROCESS if step.stack == "cpu" else 0.0,
    )


def _trained(run: Run, parts: parameters.Parts) -> Count:
    if run.step.trained == "all":
        return parts.total
    return sum(parts.heads[run.step.old_heads if run.step.trained == "new-heads" else 0 :], Count())


def _activations(run: Run, pp_rank: int) -> tuple[float, float]:
    """Bytes kept, and those of the widest layer while it works."""
    model, parallel, step = run.model, run.parallel, run.step
    later = parallel.pp - 1 - pp_rank
    mine = model.stages[pp_rank :: parallel.pp]
    if parallel.virtual > 1:
        in_flight = 2 * later + (parallel.virtual - 1) * parallel.pp + 1
        times = [min(in_flight / parallel.virtual, step.micro_batches)] * parallel.virtual
    else:
        times = [float(min(later + 1, step.micro_batches))]
    kept, symbols = 0.0, ""
    if step.trained == "all":
        for stage, copies in zip(mine, times, strict=True):
            kept += copies * sum(activations.of_layer(run, symbol) for symbol in stage)
        symbols = "".join(mine)
    if later == 0:
        new = model.heads - (step.old_heads if step.trained == "new-heads" else 0)
        kept += step.passes_of_heads * new * activations.of_head(run) + activations.of_last_norm(run)
        symbols += model.head
    at_work = max((activations.of_layer_at_work(run, symbol) for symbol in symbols), default=0.0)
    return kept, at_work + activations.widest(run, symbols) + _gradients_of_hidden(run) * (later == 0)


def _rows(run: Run) -> int:
    return run.step.micro_batch * run.step.sequence // run.parallel.cp


def _gradients_of_hidden(run: Run) -> float:
    if run.step.loss != "fused" or not run.model.heads:
        return 0.0
    tensors = 1 + run.model.heads * run.step.passes_of_heads
    return tensors * _rows(run) * run.model.hidden * run.step.bytes_weight


def loss_section(run: Run, implementation: str | None = None) -> float:
    """Bytes of output layer and losses at their worst, beyond weights and activations. Default: of the run's own."""
    model, step = run.model, run.step
    vocabulary = model.vocabulary // run.parallel.tp
    if not model.heads:
        # Megatron's own: logits become their softmax and its gradient in place, in fp32, beside them in the model's
        # dtype; or, later, the gradients of logits and weight in that dtype.
        logits, e = _rows(run) * vocabulary, step.bytes_weight
        return max(logits * (4.0 + (e if e < 4 else 0)), (logits + vocabulary * model.hidden) * e)
    if (implementation or step.loss) == "eager":
        return _eager(run, vocabulary)
    return _fused(run, vocabulary)


def _eager(run: Run, vocabulary: int) -> float:
    k, e = run.model.heads, run.step.bytes_weight
    # Kept for backward, counted with saved-tensor hooks: of each head four fp32 tensors and two masks, of the main head
    # two. Alive beside them: logits of all, those of the heads and their teachers with masked rows emptied, and the
    # seven fp32 tensors of acceptance.
    kept = 4 * (2 + 4 * k) + 2 * k
    alive = e * (1 + 3 * k) + 4 * 7
    hidden = (1 + k) * run.model.hidden * e
    return _rows(run) * (vocabulary * (kept + alive) + hidden)


def _fused(run: Run, vocabulary: int) -> float:
    model, step = run.model, run.step
    heads, on_cpu, e = 1 + model.heads, step.stack == "cpu", step.bytes_weight
    # Logits in fp32, as on a CPU, and beside them those of the distillation, where the two gradients go apart.
    of_logit = 4.0 * (1 + model.heads / heads) if step.losses_apart else 4.0 if on_cpu else float(e)
    if on_cpu:
        most = min(CPU_CHUNK, max(CPU_CHUNK_LEAST, CPU_CHUNK_LOGITS // vocabulary))
    else:
        most = GPU_CHUNK * 4 // (4 if step.losses_apart else e)
    tokens = _rows(run)
    rows = math.ceil(tokens / math.ceil(tokens / max(1, most // heads))) * heads
    table = vocabulary * model.hidden
    of_weight = 4.0 * table if step.trained == "all" else 0.0
    states = _gradients_of_hidden(run) + 2 * heads * activations.hidden_states(run)
    chunk = rows * vocabulary * of_logit
    if on_cpu:  # temporaries of a block, in bf16 the products before they are added up
        chunk += 8.0 * min(rows * vocabulary, CPU_BLOCK)
        if e < 4:
            chunk += max(rows * vocabulary * e, (rows * vocabulary + table) * e if of_weight else 0)
    elif step.losses_apart and e < 4:  # otherwise the kernels turn logits into gradients where and as they stand
        chunk += rows * vocabulary * e
    delivered = table * e if of_weight and e < 4 else 0.0
    return of_weight + states + max(chunk, delivered)
