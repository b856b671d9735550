"""Small checkpoints with the keys of real ones, saved by Megatron's own `dist_checkpointing.save` in one process.

A tensor that tensor parallelism would shard over `tp` ranks is saved as `tp` shards, so its bytes lie in the file as
those of a real run would. A few milliseconds each, once Megatron is imported.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_mtpd.checkpoint.iterations import write_tracker
from megatron_mtpd.checkpoint.metadata import head_of

TRUNK = {
    "embedding.word_embeddings.weight": (64, 16),
    "decoder.layers.0.self_attention.linear_qkv.weight": (32, 16),
    "decoder.layers.1.mlp.linear_fc1.weight": (64, 16),
    "decoder.final_norm.weight": (16,),
    "output_layer.weight": (64, 16),
}
HEAD = {
    "hybrid": {
        "enorm.weight": (16,),
        "eh_proj.weight": (16, 32),
        "mtp_model_layer.layers.0.self_attention.linear_qkv.weight": (32, 16),
        "final_layernorm.weight": (16,),
    },
    "gpt": {
        "enorm.weight": (16,),
        "eh_proj.weight": (16, 32),
        "transformer_layer.self_attention.linear_qkv.weight": (32, 16),
        "final_layernorm.weight": (16,),
    },
}
SLOTS = ("fp32_param", "exp_avg", "exp_avg_sq")


@dataclass
class Model:
    """Weights by key; those of a head start with `mtp.layers.K.`."""

    heads: int = 2
    kind: str = "hybrid"
    dtype: torch.dtype = torch.bfloat16
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            shapes = TRUNK | {
                f"mtp.layers.{head}.{name}": shape
                for head in range(self.heads)
                for name, shape in HEAD[self.kind].items()
            }
            self.tensors = {key: torch.randn(shape, dtype=self.dtype) for key, shape in shapes.items()}

    def head(self, number: int) -> dict[str, torch.Tensor]:
        prefix = f"mtp.layers.{number}."
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}


def sharded(key: str, tensor: torch.Tensor, tp: int) -> dict[str, Any]:
    """The shards of `tp` ranks, all of them held by this one."""
    from megatron.core.dist_checkpointing import ShardedTensor

    if tensor.dim() == 1:
        return {key: ShardedTensor.from_rank_offsets(key, tensor)}
    shards = tensor.chunk(tp, 0)
    return {
        f"{key}#{rank}": ShardedTensor.from_rank_offsets(key, shard.contiguous(), (0, rank, tp))
        for rank, shard in enumerate(shards)
    }


def run_arguments(model: Model, **changes: Any) -> argparse.Namespace:
    from megatron.core.transformer.enums import AttnBackend

    values: dict[str, Any] = {
        "mtp_num_layers": model.heads,
        "mtp_use_repeated_layer": False,
        "hybrid_layer_pattern": "*-*-" + "/*-" * model.heads if model.kind == "hybrid" else None,
        "tensor_model_parallel_size": 1,
        "consumed_train_samples": 4000,
        "attention_backend": AttnBackend.unfused,  # a class of Megatron's own among the arguments
        "save": Path("somewhere"),
    }
    return argparse.Namespace(**(values | changes))


def megatrons_save() -> Callable[..., Any]:
    """Megatron's own, without what our platform wraps around it."""
    from megatron.core import dist_checkpointing

    return inspect.unwrap(dist_checkpointing.save)


def save_checkpoint(
    root: Path,
    model: Model,
    iteration: int = 100,
    tp: int = 2,
    optimizer: str | None = "by parameter",
    frozen_heads: int = 0,
    saver: Callable[..., Any] | None = None,
    **arguments: Any,
) -> Path:
    """Write one iteration and the tracker, as Megatron's `save_checkpoint` does."""
    from megatron.core.dist_checkpointing import ShardedObject

    state: dict[str, Any] = {
        "args": run_arguments(model, **arguments),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "opt_param_scheduler": {"num_steps": 4000},
        "num_floating_point_operations_so_far": 1.0,
    }
    for key, tensor in model.tensors.items():
        state |= sharded(key, tensor, tp)
    for head in range(model.heads):
        key = f"mtp.layers.{head}.eh_proj._extra_state"
        state[key] = ShardedObject(key, {"amax": float(head)}, (1,), (0,))
    state["rng"] = ShardedObject("rng_state", [{"seed": 1}], (1, 1), (0, 0))
    if optimizer == "by parameter":
        state["optimizer"] = {"param_groups": [{"lr": 0.1}], "state": {"common_step": torch.tensor(7.0)}}
        for slot in SLOTS:
            for key, tensor in model.tensors.items():
                if (head := head_of(key)) is not None and head < frozen_heads:
                    continue
                value = tensor.float() if slot == "fp32_param" else torch.rand(tensor.shape)
                state |= sharded(f"optimizer.state.{slot}.{key}", value, tp)
    elif optimizer == "buckets":
        group = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
        state |= sharded(f"{group}.bucket_idx_0.param", torch.rand(128), 1)
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    (saver or megatrons_save())(state, str(directory))
    write_tracker(root, iteration)
    return directory


def load_weights(directory: Path, model: Model, tp: int) -> dict[str, torch.Tensor]:
    """Load, through Megatron, tensors shaped as the model's, at another tensor-parallel size."""
    from megatron.core import dist_checkpointing

    templates = {key: torch.empty_like(tensor) for key, tensor in model.tensors.items()}
    request: dict[str, Any] = {}
    for key, template in templates.items():
        request |= sharded(key, template, tp)
    loaded = dist_checkpointing.load(request, str(directory))
    return {
        key: torch.cat([loaded[f"{key}#{rank}"] for rank in range(tp)]) if template.dim() > 1 else loaded[key]
        for key, template in templates.items()
    }
