"""Build the model of a checkpoint for decoding, at the tensor-parallel size asked for, from what the checkpoint says.

The checkpoint holds the arguments of its training run: no flag of that run is needed again. Whatever its layout was,
the model is built whole, on the local modules, and its weights are loaded resharded. The ranks of the job form as many
data-parallel replicas as fit: world size / tensor-parallel size.

Deliberately absent: pipeline, expert and context parallelism, and checkpoints in other formats than `torch_dist`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch.nn.functional import gelu  # noqa: E402

from megatron_mtpd.checkpoint.gpt import retarget  # noqa: E402
from megatron_mtpd.checkpoint.iterations import Iteration, resolve  # noqa: E402
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata  # noqa: E402
from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.layer_pattern import layer_pattern  # noqa: E402
from megatron_mtpd.model import MTPDModel, MTPDModelBuilder, MTPDModelConfig  # noqa: E402
from megatron_mtpd.speculative.layers import refuse  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, on this rank's device, and where it comes from."""

    model: MTPDModel
    args: Namespace
    directory: Path
    iteration: Iteration | None

    @property
    def num_heads(self) -> int:
        return self.model.config.mtp_num_layers or 0


def start_distributed(tensor_parallel: int = 1) -> None:
    """Join the job of torchrun or srun, or be alone, and make the process groups. Once a process.

    Raises ValueError when the tensor-parallel size does not divide the number of ranks, and for what `ranks_of_slurm`
    refuses.
    """
    if not dist.is_initialized():
        os.environ.update(ranks_of_slurm(os.environ))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor_parallel} does not divide the {ranks} ranks of the job."
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        model_parallel_cuda_manual_seed(1234)


def ranks_of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun that are missing, from those of srun.

    Raises ValueError for several tasks without an address: each would take itself for the only one.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ValueError(
            f"srun has started {tasks} tasks, and they do not know where to meet: export MASTER_ADDR (the first node) "
            "and MASTER_PORT (a free port there) before it, or use slurm/benchmark_acceptance.sh."
        )
    if "MASTER_ADDR" not in environment:
        return {}
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    return {name: environment[s] for name, s in names.items() if s in environment and name not in environment}


def load(path: Path, ckpt_step: int | None = None, dtype: str | None = None) -> Loaded:
    """Load a checkpoint (of a run: its last one, or `ckpt_step`) into a model for decoding.

    Every rank calls it, after `start_distributed`. `dtype`: of the weights, fp32, bf16 or fp16; default: as trained.
    Raises CheckpointError, naming the file, where there is no loadable checkpoint, ValueError for a model that cannot
    be decoded.
    """
    iteration, directory = resolve(Path(path), ckpt_step)
    num_heads = read_metadata(directory).num_heads
    state = dist_checkpointing.load_common_state_dict(str(directory))
    if "args" not in state:
        raise CheckpointError(f"{directory} holds no arguments: it was not saved by Megatron's training loop.")
    args = decoding_args(state["args"], num_heads, parallel_state.get_tensor_model_parallel_world_size(), dtype)
    model = build(args)
    sharded = model.sharded_state_dict(prefix="", metadata=state.get("content_metadata"))
    if not getattr(state["args"], "hybrid_layer_pattern", None):
        retarget(sharded, args.hybrid_layer_pattern, Namespace(mtp_num_layers=num_heads))
    with _one_thread():
        loaded = dist_checkpointing.load({"model": sharded}, str(directory), strict=StrictHandling.LOG_UNEXPECTED)
    model.load_state_dict(loaded["model"], strict=False)  # extra states of other modules are nobody's
    return Loaded(model, args, directory, iteration if iteration is not None else state.get("iteration"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block torch computes on one thread, and so do from then on the threads that gloo begins in it.

    gloo copies in threads of its own. Where one of them has OpenMP threads beside those of the main thread, there are
    more than cores, and libgomp then lets none of them wait actively: a third of the speed of decoding on a CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decoding_args(saved: Namespace, num_heads: int, tensor_parallel: int, dtype: str | None = None) -> Namespace:
    """A training run's arguments, as the same model has to be built here.

    `num_heads` is what the checkpoint holds, which looped extension may have changed since. Raises ValueError.
    """
    args = copy(saved)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not pattern:  # of a GPTModel
        pattern = layer_pattern(args.num_layers, num_heads, bool(args.num_experts))
        args.hybrid_layer_pattern, args.mtp_num_layers = pattern, num_heads or None
    main, *heads = pattern.replace("|", "").split("/")
    if num_heads and heads:
        args.hybrid_layer_pattern = "/".join([main, *[heads[0]] * num_heads])
        args.mtp_num_layers = num_heads
    params_dtype = DTYPES[dtype] if dtype else args.params_dtype
    changed = {
        **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallel_num_weight_shards"), tensor_parallel),
        # Its vocabulary may be padded less than this size needs: the new rows stay as they are, and are never chosen.
        "padded_vocab_size": -(-args.padded_vocab_size // tensor_parallel) * tensor_parallel,
        "world_size": dist.get_world_size(),
        "rank": dist.get_rank(),
        "params_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "transformer_impl": "local",
        "fused_gelu": getattr(saved, "bias_gelu_fusion", False),
        **dict.fromkeys(_ONE, 1),
        **dict.fromkeys(_NONE),
        **dict.fromkeys(_OFF, False),
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
    }
    for name, value in changed.items():
        setattr(args, name, value)
    return args


_ONE = (
    *("pipeline_model_parallel_size", "transformer_pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    "expert_tensor_parallel_num_weight_shards",
)
_NONE = (
    *("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "recompute_granularity"),
    *("recompute_method", "recompute_num_layers", "recompute_modules", "fp8", "fp4", "spec"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
)
_OFF = (
    *("sequence_parallel", "gradient_accumulation_fusion", "apply_rope_fusion", "masked_softmax_fusion"),
    *("bias_swiglu_fusion", "bias_gelu_fusion", "tp_comm_overlap", "moe_permute_fusion", "moe_router_fusion"),
    *("moe_grouped_gemm", "fine_grained_activation_offloading", "deterministic_mode"),
)


def build(args: Namespace) -> MTPDModel:
    """The model that the arguments describe, in evaluation mode, with weights still to be loaded."""
    config = MTPDModelConfig.from_args(args)
    if args.fused_gelu and config.transformer.activation_func is gelu:
        config.transformer.activation_func = partial(gelu, approximate="tanh")  # as Megatron's fused kernel computes it
    return build_from_config(config)


def build_from_config(config: MTPDModelConfig) -> MTPDModel:
    """The whole model on this tensor-parallel group, in evaluation mode; decoding reads one of local modules."""
    refuse(config.transformer)
    config.mtpd = MTPDConfig(objective="kl")  # nothing is trained: of its report, the distillation is not read
    model = MTPDModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    if torch.cuda.is_available():
        model.cuda()
    return model.to(config.transformer.params_dtype).eval()
