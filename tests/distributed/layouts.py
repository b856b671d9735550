"""One training step of the toy in any parallel layout: what the equivalence tests compare.

    result = train(Layout(tp=2, sequence_parallel=True), Toy(tied=True))
    result.metrics, result.gradients, result.weights, result.norms

`step` runs on every rank of `gloo.run`: it builds the model by its builder, under Megatron's DDP, and takes one global
batch through Megatron's schedule with our forward step and loss function. Gradients and weights are known by the names
and places that they have in a *checkpoint*, which mean the same in every layout: `train` puts the slices of all ranks
together, and checks that the copies of a slice agree.

Deliberately absent: `megatron.training.pretrain`, which tests/e2e runs.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training import global_vars  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.data.datasets import get_batch  # noqa: E402
from megatron_mtpd.training.forward_step import forward_step  # noqa: E402
from megatron_mtpd.training.trainable import freeze  # noqa: E402
from tests.distributed import gloo  # noqa: E402
from tests.distributed.toy import HEADS, SAMPLES, Layout, Toy, initial_weight, model_config, samples  # noqa: E402

LEARNING_RATE = 1.0
ADAM_EPS = 1.0  # as large as the gradients: Adam's own would turn the sign of a rounding error into a whole step


class Slice(NamedTuple):
    """A rank's part of a tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]  # of the whole
    place: tuple[slice, ...]
    value: Tensor


class Rank(NamedTuple):
    """What one rank knows of a step."""

    metrics: dict[str, Tensor]  # pairs (sum, count); empty but on the last stage's first tensor-parallel ranks
    gradients: list[Slice]
    weights: list[Slice]
    norms: dict[str, float]


class Step(NamedTuple):
    """What a step did, the same in every layout."""

    metrics: dict[str, Tensor]  # pairs (sum, count) over the global batch
    gradients: dict[str, Tensor]  # before clipping, of the last step
    weights: dict[str, Tensor]  # after the optimizer's steps, empty without
    norms: dict[str, float]  # of the gradients, by the group that is clipped together, empty without


_done: dict[str, Step] = {}


def train(layout: Layout, toy: Toy) -> Step:
    """Train on as many ranks as the layout has, and put together what they know. Done once: leave the result as it
    is."""
    key = repr((layout, toy))
    if key not in _done:
        _done[key] = _train(layout, toy)
    return _done[key]


def _train(layout: Layout, toy: Toy) -> Step:
    ranks: list[Rank] = gloo.run(step, layout.ranks, layout, toy)
    metrics: dict[str, Tensor] = {}
    for rank in ranks:
        for name, pair in rank.metrics.items():
            metrics[name] = metrics.get(name, 0) + pair
    assert all(rank.norms == ranks[0].norms for rank in ranks), [rank.norms for rank in ranks]
    return Step(
        metrics,
        _whole([part for rank in ranks for part in rank.gradients]),
        _whole([part for rank in ranks for part in rank.weights]),
        ranks[0].norms,
    )


def _whole(parts: list[Slice]) -> dict[str, Tensor]:
    """Tensors from the slices of all ranks. Raises AssertionError where copies differ or something is missing."""
    result: dict[str, Tensor] = {}
    for part in parts:
        whole = result.setdefault(part.name, torch.full(part.shape, float("nan")))[part.place]
        known = ~whole.isnan()
        # Copies are reduced to the same number, in an order of their own: the two embeddings of a pipeline for example.
        error = (whole - part.value)[known].abs().sum() / part.value.abs().sum().clamp(min=1e-30)
        assert error < 1e-6, f"{part.name}: the copies on two ranks differ by {error:.1e}, relative"
        whole.copy_(part.value)
    holes = [name for name, whole in result.items() if whole.isnan().any()]
    assert not holes, f"no rank holds all of {holes}"
    return result


# On a rank -----------------------------------------------------------------------------------------------------------


def step(layout: Layout, toy: Toy) -> Rank:
    """One step, or `toy.optimizer_steps` of them, on this rank."""
    logging.getLogger("megatron").setLevel(logging.WARNING)
    model, optimizer = build(layout, toy)
    core = unwrap_model(model[0])
    metrics, gradients, norms = {}, [], {}
    for _ in range(max(1, toy.optimizer_steps)):
        for chunk in model:
            chunk.zero_grad_buffer()
        if optimizer is not None:
            optimizer.zero_grad()
        metrics = _forward_backward(model, layout, toy)
        if layout.distributed_optimizer:
            _gather_reduced(model[0])
        gradients = _slices(core, lambda parameter: parameter.main_grad.clone(), trained=True)
        if optimizer is not None:
            _, norm, _ = optimizer.step()
            norms = {"trunk": norm} | optimizer.grad_norms_by_group
    if layout.overlap and layout.distributed_optimizer:
        model[0].disable_forward_pre_hook(param_sync=True)  # the last step's weights are still on their way
    weights = _slices(core, lambda parameter: parameter.data) if optimizer is not None else []
    return Rank(metrics, gradients, weights, norms)


def build(layout: Layout, toy: Toy) -> tuple[list, Any]:
    """Model under DDP, with the toy's weights, and the optimizer or None."""
    parallel_state.initialize_model_parallel(
        layout.tp,
        len(layout.stages),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1 if layout.ep > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    _set_globals(layout, toy)
    config = model_config(layout, toy)
    config.pre_wrap_hooks.append(partial(freeze, config=toy.mtpd))
    model = config.get_builder_cls()(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
            grad_reduce_in_fp32=True,
            bucket_size=3000 if layout.overlap else None,  # the output layer has one of its own
        ),
    )
    with torch.no_grad():
        for part in _slices(unwrap_model(model[0]), lambda parameter: parameter.data):
            part.value.copy_(initial_weight(toy, part.name, part.shape)[part.place])
    config.transformer.finalize_model_grads_func = finalize_model_grads
    if layout.overlap:
        config.transformer.no_sync_func = model[0].no_sync
    if not toy.optimizer_steps:
        return model, None
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            adam_eps=ADAM_EPS,
            weight_decay=0.0,
            clip_grad=toy.clip,
            bf16=toy.bf16,
            params_dtype=config.transformer.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        ),
        model,
    )
    optimizer.reload_model_params()
    config.transformer.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def _set_globals(layout: Layout, toy: Toy) -> None:
    """What our forward step asks of Megatron's globals."""
    args = Namespace(
        create_attention_mask_in_dataloader=toy.documents,
        reset_attention_mask=toy.documents,
        context_parallel_size=layout.cp,
        micro_batch_size=toy.micro_batch_size,
        seq_length=toy.sequence,
        mtp_num_layers=toy.heads or HEADS,
        pipeline_model_parallel_size=len(layout.stages),
        check_for_nan_in_loss_and_grad=False,
        curr_iteration=0,
        timing_log_level=0,
        timing_log_option="minmax",
    )
    global_vars.set_args(args)
    global_vars._set_timers(args)


def _slices(model: Any, value_of: Callable[[Any], Tensor], trained: bool = False) -> list[Slice]:
    """A value of every parameter, or every trained one, of its shape, after the checkpoint's own map."""
    parameters = {p.data_ptr(): p for p in model.parameters() if p.requires_grad or not trained}
    found: list[Slice] = []

    def add(entry: Any) -> None:
        if isinstance(entry, ShardedTensor):
            value = entry.data[(None,) * entry.prepend_axis_num]
            place = tuple(slice(o, o + n) for o, n in zip(entry.global_offset, value.shape, strict=True))
            found.append(Slice(entry.key, tuple(entry.global_shape), place, value))
        elif isinstance(entry, ShardedTensorFactory):  # a parameter that is several tensors of the checkpoint
            add(entry.build())
        elif isinstance(entry, dict | list | tuple):
            for item in entry.values() if isinstance(entry, dict) else entry:
                add(item)

    for entry in model.sharded_state_dict().values():
        data = getattr(entry, "data", None)
        if torch.is_tensor(data) and data.data_ptr() in parameters:
            entry.data = value_of(parameters[data.data_ptr()])
            add(entry)
    return found


def _forward_backward(model: list, layout: Layout, toy: Toy) -> dict[str, Tensor]:
    """The global batch through Megatron's schedule; data-parallel rank r takes the micro-batches r, r + dp, ..."""
    whole, size = samples(toy), toy.micro_batch_size
    micro_batches = [whole[i : i + size] for i in range(0, SAMPLES, size)]
    mine = micro_batches[parallel_state.get_data_parallel_rank() :: layout.dp]
    reduced = get_forward_backward_func()(
        forward_step_func=_megatron_forward_step if toy.megatron else forward_step,
        data_iterator=iter([{key: torch.stack([s[key] for s in part]) for key in part[0]} for part in mine]),
        model=model,
        num_microbatches=len(mine),
        seq_length=toy.sequence,
        micro_batch_size=size,
        forward_only=False,
    )
    if not reduced or parallel_state.get_tensor_model_parallel_rank() != 0:
        return {}
    metrics = {name: torch.stack([m[name] for m in reduced]).sum(0) for name in reduced[0]}
    if toy.megatron:  # it logs a sum of the means of micro-batches
        means = MTPLossLoggingHelper.tracker["loss_values"]
        metrics |= {f"ce/{k}": torch.stack([mean, mean.new_tensor(len(mine))]) for k, mean in enumerate(means, 1)}
    return metrics


def _megatron_forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """Forward step and loss function as training scripts of Megatron have them."""
    batch = get_batch(data_iterator)
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    output = model(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"])

    def loss_func(output: Tensor) -> tuple:
        loss, tokens = (output.float() * batch["loss_mask"]).sum(), batch["loss_mask"].sum().int()
        return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}

    return output, loss_func


def _gather_reduced(model: Any) -> None:
    """With the distributed optimizer a rank holds reduced gradients of its part of every bucket: fetch the others'."""
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        parallel = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            parts = list(bucket.grad_data.chunk(parallel.size()))
            dist.all_gather(parts, parts[parallel.rank()].clone(), group=parallel)
