"""One training step of a toy model in any parallel layout: what the equivalence tests compare.

`step(layout, toy)` runs on every rank of `gloo.run`: it builds the model by its builder, under Megatron's DDP, gives it
weights that depend on nothing but their names, and takes one global batch through Megatron's schedule with our forward
step and loss function. Everything is keyed by the names of the *checkpoint*, which mean the same in every layout:
`gather` puts the slices of all ranks together and checks that copies agree.

Deliberately absent: `megatron.training.pretrain`, which tests/e2e runs.
"""

from __future__ import annotations

import logging
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training import global_vars  # noqa: E402
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.data.datasets import get_batch  # noqa: E402
from megatron_mtpd.model import MTPDModelConfig  # noqa: E402
from megatron_mtpd.specs import hybrid_stack_spec  # noqa: E402
from megatron_mtpd.training.forward_step import forward_step  # noqa: E402

VOCABULARY, SEQUENCE, SAMPLES, HEADS, EOD = 96, 16, 4, 2, 7
ADAM_EPS = 1.0


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are spread; `stages`: blocks of each pipeline stage, one number without pipeline."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    stages: tuple[int, ...] = (3,)
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.dp * len(self.stages)


@dataclass(frozen=True)
class Toy:
    """What is trained on what. Nothing in here may depend on the layout."""

    mtpd: MTPDConfig = field(default_factory=lambda: MTPDConfig(top_n=10))
    micro_batch_size: int = 2
    experts: int = 0
    tied: bool = False
    documents: bool = False  # end-of-document tokens inside, with masks reset there and their loss masked
    masked: bool = False  # random loss masks, each sample its own
    per_token: bool = False
    recompute: str | None = None
    bf16: bool = False
    optimizer_steps: int = 0  # 0: stop at the gradients
    clip: float = 0.0
    megatron: bool = False  # Megatron's own model and MTP loss, forward step of its own
    detach_heads: bool = False  # Megatron's flag


class Rank(NamedTuple):
    """What one rank knows of the step."""

    metrics: dict[str, Tensor]  # pairs (sum, count) of this rank's micro-batches; only on the last stage, first tp rank
    gradients: list[tuple]  # (name, whole shape, offset, slice)
    weights: list[tuple]  # the same, after the optimizer's steps
    norms: dict[str, float]


class Step(NamedTuple):
    """What the step did, independent of the layout."""

    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    norms: dict[str, float]


# Model ---------------------------------------------------------------------------------------------------------------


def model_config(layout: Layout, toy: Toy) -> HybridModelConfig:
    """The configuration of the toy in the layout."""
    block = "*E" if toy.experts else "*-"
    pattern = "|".join(block * n for n in layout.stages) + ("/" + block) * HEADS
    dtype = torch.bfloat16 if toy.bf16 else torch.float32
    transformer = TransformerConfig(
        num_layers=len(block) * sum(layout.stages),
        mtp_num_layers=HEADS,
        mtp_loss_scaling_factor=0.3,
        mtp_detach_heads=toy.detach_heads,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        bf16=toy.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=len(layout.stages),
        expert_model_parallel_size=layout.ep,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=toy.per_token,
        recompute_granularity=toy.recompute,
        **({"recompute_method": "uniform", "recompute_num_layers": 1} if toy.recompute == "full" else {}),
        **({"recompute_modules": ["core_attn"]} if toy.recompute == "selective" else {}),
        **(
            {
                "num_moe_experts": toy.experts,
                "moe_router_topk": 2,
                "moe_ffn_hidden_size": 48,
                "moe_router_load_balancing_type": "aux_loss",
                "moe_aux_loss_coeff": 0.01,
                "moe_token_dispatcher_type": "alltoall",
            }
            if toy.experts
            else {}
        ),
    )
    shared: dict[str, Any] = {
        "transformer": transformer,
        "hybrid_layer_pattern": pattern,
        "vocab_size": VOCABULARY,
        "seq_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": toy.tied,
    }
    if toy.megatron:
        return HybridModelConfig(hybrid_stack_spec=hybrid_stack_spec(transformer), **shared)
    return MTPDModelConfig(mtpd=toy.mtpd, eod_token_id=EOD if toy.documents else None, **shared)


def shards(model: torch.nn.Module, value_of: Callable[[Tensor], Tensor | None]) -> list[tuple]:
    """(name, whole shape, offset, this rank's slice) of a value of every parameter, after the checkpoint's own map."""
    found = []

    def visit(entry: Any) -> None:
        if isinstance(entry, dict):
            for item in entry.values():
                visit(item)
        elif isinstance(entry, list | tuple):
            for item in entry:
                visit(item)
        elif isinstance(entry, ShardedTensor):
            axes = entry.prepend_axis_num
            data = entry.data[(None,) * axes]
            found.append((entry.key, entry.global_shape, entry.global_offset, data))

    parameters = {p.data_ptr(): p for p in model.parameters()}
    for entry in model.sharded_state_dict().values():
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.data.data_ptr() not in parameters:
            continue
        value = value_of(parameters[entry.data.data_ptr()])
        if value is None:
            continue
        if isinstance(entry, ShardedTensor):
            entry.data = value
            visit(entry)
        else:
            entry.data = value
            visit(entry.build())
    return found


def initial_weight(name: str, shape: Sequence[int]) -> Tensor:
    """A weight that follows from its name alone, so that every layout has slices of the same model."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    weight = torch.randn(shape, generator=generator) * 0.15
    if "norm" in name:
        weight += 1.0
    elif "embedding" in name or "output_layer" in name:
        weight[::24] *= 8.0  # a few frequent tokens, so that main head and heads often agree
    return weight


@torch.no_grad()
def set_weights(model: torch.nn.Module) -> None:
    """Give the model its initial weights."""
    for name, shape, offset, piece in shards(model, lambda p: p.data):
        place = tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))
        piece.copy_(initial_weight(name, shape)[place])


# Data ----------------------------------------------------------------------------------------------------------------


def samples(toy: Toy) -> list[dict[str, Tensor]]:
    """The global batch, as Megatron's dataset would give it."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for index in range(SAMPLES):
        text = torch.randint(EOD + 1, VOCABULARY, (SEQUENCE + 1,), generator=generator)
        if toy.documents:
            # two documents next to each other, one of a single token, one that ends with the sequence
            text[[3 + index, 4 + index, 9 + index % 3]] = EOD
        flag = toy.documents
        mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(text[:-1], EOD, flag, flag, flag, flag)
        if toy.masked:
            loss_mask *= (torch.rand(SEQUENCE, generator=generator) > 0.15 * index).float()
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": position_ids}
        result.append(sample | ({} if mask is None else {"attention_mask": mask}))
    return result


def micro_batches(toy: Toy, layout: Layout) -> list[dict[str, Tensor]]:
    """This rank's micro-batches: every dp-th of the global batch."""
    parts = [samples(toy)[i : i + toy.micro_batch_size] for i in range(0, SAMPLES, toy.micro_batch_size)]
    parts = parts[parallel_state.get_data_parallel_rank() :: layout.dp]
    return [{key: torch.stack([s[key] for s in part]) for key in part[0]} for part in parts]


# Step ----------------------------------------------------------------------------------------------------------------


def step(layout: Layout, toy: Toy) -> Rank:
    """One step on this rank. See the module."""
    logging.getLogger("megatron").setLevel(logging.WARNING)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp, len(layout.stages), expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=1 if layout.ep > 1 else None
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    _set_globals(layout, toy)
    config = model_config(layout, toy)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        grad_reduce_in_fp32=True,
        bucket_size=5000 if layout.overlap else None,
    )
    model = config.get_builder_cls()(config).build_distributed_models(groups, ddp)
    set_weights(unwrap_model(model[0]))
    config.transformer.finalize_model_grads_func = partial(finalize_model_grads)
    if layout.overlap:
        config.transformer.no_sync_func = model[0].no_sync
    optimizer = None
    if toy.optimizer_steps:
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1.0,
                # As large as the gradients: Adam's own would turn the sign of a rounding error into a whole step.
                adam_eps=ADAM_EPS,
                weight_decay=0.0,
                clip_grad=toy.clip,
                bf16=toy.bf16,
                params_dtype=config.transformer.params_dtype,
                use_distributed_optimizer=layout.distributed_optimizer,
            ),
            model,
        )
        optimizer.reload_model_params()
        config.transformer.grad_scale_func = optimizer.scale_loss
    metrics, gradients, norms = {}, [], {}
    for _ in range(max(1, toy.optimizer_steps)):
        for chunk in model:
            chunk.zero_grad_buffer()
        if optimizer is not None:
            optimizer.zero_grad()
        metrics = _forward_backward(model, layout, toy)
        if layout.distributed_optimizer:
            _gather_reduced(model[0])
        gradients = shards(unwrap_model(model[0]), lambda p: p.main_grad.clone())
        if optimizer is not None:
            _, norm, _ = optimizer.step()
            norms = {"trunk": norm} | dict(optimizer.grad_norms_by_group)
    weights = shards(unwrap_model(model[0]), lambda p: p.data) if optimizer is not None else []
    return Rank(metrics, gradients, weights, norms)


def _set_globals(layout: Layout, toy: Toy) -> None:
    """What our forward step asks of Megatron's globals."""
    args = Namespace(
        create_attention_mask_in_dataloader=toy.documents,
        context_parallel_size=1,
        micro_batch_size=toy.micro_batch_size,
        seq_length=SEQUENCE,
        mtp_num_layers=HEADS,
        pipeline_model_parallel_size=len(layout.stages),
        check_for_nan_in_loss_and_grad=False,
        curr_iteration=0,
        timing_log_level=0,
        timing_log_option="minmax",
    )
    global_vars.set_args(args)
    if global_vars._GLOBAL_TIMERS is None:
        global_vars._set_timers(args)


def _forward_backward(model: list, layout: Layout, toy: Toy) -> dict[str, Tensor]:
    batches = micro_batches(toy, layout)
    reduced = get_forward_backward_func()(
        forward_step_func=_megatron_forward_step if toy.megatron else forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=SEQUENCE,
        micro_batch_size=toy.micro_batch_size,
        forward_only=False,
    )
    last, first = parallel_state.is_pipeline_last_stage(), parallel_state.get_tensor_model_parallel_rank() == 0
    if not (last and first):
        return {}
    metrics = {name: torch.stack([m[name] for m in reduced]).sum(0) for name in reduced[0]}
    if toy.megatron:  # its means of micro-batches, summed
        tracker = MTPLossLoggingHelper.tracker
        metrics |= {f"ce/{k + 1}": torch.stack([loss, loss.new_tensor(len(batches))]) for k, loss in enumerate(tracker["values"])}
        tracker["values"].zero_()
    return metrics


def _megatron_forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple[Tensor, Callable]:
    """Forward step and loss function as Megatron's own training scripts have them."""
    batch = get_batch(data_iterator)
    mask = batch["loss_mask"]
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], loss_mask=mask)

    def loss_func(output: Tensor) -> tuple:
        loss, tokens = (output.float() * mask).sum(), mask.sum().int()
        return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}

    return output, loss_func


def _gather_reduced(model: Any) -> None:
    """With the distributed optimizer a rank holds the reduced gradients of its part of every bucket: fetch the others'."""
    for group in model.bucket_groups + model.expert_parallel_bucket_groups:
        parallel = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            parts = list(bucket.grad_data.chunk(parallel.size()))
            dist.all_gather(parts, parts[parallel.rank()].clone(), group=parallel)


# Together ------------------------------------------------------------------------------------------------------------


def gather(ranks: list[Rank], tolerance: float = 1e-6) -> Step:
    """What all ranks know, put together. Raises AssertionError where two ranks disagree on what they share."""
    metrics: dict[str, Tensor] = {}
    for rank in ranks:
        for name, pair in rank.metrics.items():
            metrics[name] = metrics.get(name, 0) + pair
    norms = [rank.norms for rank in ranks]
    assert all(n == norms[0] for n in norms), norms
    return Step(
        metrics,
        _whole([rank.gradients for rank in ranks], tolerance),
        _whole([rank.weights for rank in ranks], tolerance),
        norms[0],
    )


def _whole(pieces: list[list[tuple]], tolerance: float) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for rank in pieces:
        for name, shape, offset, piece in rank:
            whole = result.setdefault(name, torch.full(shape, float("nan")))
            place = whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))]
            known = ~place.isnan()
            error = (place - piece)[known].abs().max() if known.any() else 0
            assert error <= tolerance * piece.abs().max(), f"{name}: copies on two ranks differ by {error}"
            place.copy_(piece)
    holes = [name for name, whole in result.items() if whole.isnan().any()]
    assert not holes, f"no rank holds all of {holes}"
    return result
import sys; sys.path.insert(0, "/tmp/work/par"); import shim  # TEMPORARY
