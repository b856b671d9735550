"""`--engine deepspeed`: the user's ds_config.json checked against the flags, and completed from them.

The flags stay the one description of a run: what ds_config.json leaves out or calls "auto" is filled in from them, what
it says otherwise is refused. So is what DeepSpeed would compute wrongly, or leave out without a word, under Megatron's
layers and loop. All of it happens before anything is built, and without importing DeepSpeed.

Deliberately absent: DeepSpeed's own schedulers, data loading, checkpoints, tensor, pipeline, sequence and expert
parallelism: Megatron's loop has one of each.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mtpd.config import MTPDConfig

AUTO = "auto"

_KNOWN_SECTIONS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "zero_optimization", "optimizer", "data_types", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
    *("log_level", "comms_logger", "flops_profiler", "tensorboard", "csv_monitor", "wandb", "disable_python_gc"),
}
"""What ds_config.json may have; anything else changes what is computed in a way that nobody has tested here."""

_ADAM_AS_FLAGS = {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam"}
_ADAM_AS_ALWAYS = {"bias_correction": True, "amsgrad": False}
"""Of optimizer.params: what has a flag or a meaning here, and what may stand there if it changes nothing."""

_UNTESTED_ZERO = (
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    *("zenflow", "round_robin_gradients", "elastic_checkpoint", "leaf_module"),
)

_OF_DDP_AND_OPTIMIZER = {
    "--ddp-bucket-size": "ddp_bucket_size",
    "--ddp-num-buckets": "ddp_num_buckets",
    "--ddp-pad-buckets-for-high-nccl-busbw": "ddp_pad_buckets_for_high_nccl_busbw",
    "--ddp-average-in-collective": "ddp_average_in_collective",
    "--ddp-reduce-scatter-with-fp32-accumulation": "ddp_reduce_scatter_with_fp32_accumulation",
    "--ddp-param-name-patterns-for-fp32-local-accumulation": "ddp_param_name_patterns_for_fp32_local_accumulation",
    "--use-nccl-ub": "nccl_ub",
    "--create-all-gather-group": "create_all_gather_group",
    "--check-for-large-grads": "check_for_large_grads",
    "--optimizer-cuda-graph": "optimizer_cuda_graph",
    "--dump-param-to-param-group-map": "dump_param_to_param_group_map",
}
"""Flags, and where their values are, that only Megatron's DDP and optimizers look at: they would do nothing."""
_MEGATRONS_OWN = "only Megatron's DDP and optimizers look at it, and zero_optimization has its own settings; remove it"


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--engine` and `--deepspeed-config`."""
    group = parser.add_argument_group(title="MTP-D: engine")
    group.add_argument(
        "--engine",
        choices=["megatron", "deepspeed"],
        default="megatron",
        help="what shards and updates the parameters: Megatron's DDP and optimizers, or DeepSpeed's ZeRO; model, loss, "
        "data, schedule, metrics and checkpoints are the same [megatron]",
    )
    group.add_argument(
        "--deepspeed-config",
        metavar="FILE",
        help="ds_config.json of --engine deepspeed; what it leaves out or calls auto is taken from the flags",
    )


def deepspeed_config_from_args(args: Namespace, mtpd: MTPDConfig) -> dict[str, Any]:
    """The dictionary that DeepSpeed is given, of `args.deepspeed_config` (path or None) and all other flags.

    Raises ValueError, naming flag or key, its value and the remedy: for a file that cannot be read, for what
    contradicts the flags and for what does not work.
    """
    _refuse_flags(args, mtpd)
    config = _read(args.deepspeed_config)
    _refuse_sections(config)
    _zero(config, args)
    _settle(config, _batch(args), args.deepspeed_config)
    _settle(config, {"gradient_clipping": args.clip_grad, "bf16.enabled": bool(args.bf16)}, args.deepspeed_config)
    accumulate = "fp32" if args.accumulate_allreduce_grads_in_fp32 or not args.bf16 else "bf16"
    _fill(config, {"data_types.grad_accum_dtype": accumulate, "communication_data_type": accumulate})
    _optimizer(config, args)
    _fill(config, {"steps_per_print": 10**9, "log_level": "warning"})
    _refuse_auto(config)
    # Megatron's loop accumulates: it divides the loss, calls backward for every micro-batch, and step once.
    return config | {
        "train_batch_size": args.micro_batch_size * args.data_parallel_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
    }


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        raise ValueError("--engine deepspeed needs --deepspeed-config FILE: see examples/deepspeed for some.")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed-config {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--deepspeed-config {path} must hold a JSON object, and holds a {type(config).__name__}.")
    return config


def _batch(args: Namespace) -> dict[str, Any]:
    return {
        "train_batch_size": args.global_batch_size,
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": args.global_batch_size // (args.micro_batch_size * args.data_parallel_size),
    }


def _zero(config: dict[str, Any], args: Namespace) -> None:
    zero, _ = _locate(config, "zero_optimization.stage")
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"zero_optimization.stage is {stage!r} in {args.deepspeed_config}: give 1, 2 or 3. Stage 0 shards nothing, "
            "which --engine megatron does faster (and DeepSpeed's gradient norm is wrong there in bf16 with tensor "
            "parallelism)."
        )
    for key in _UNTESTED_ZERO:
        if zero.get(key):
            raise ValueError(f"zero_optimization.{key} is not supported with --engine deepspeed: remove it.")
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            f"zero_optimization.compute_grad_norm is false in {args.deepspeed_config}: the norm is reported, and says "
            "whether the gradients are finite. Remove it."
        )
    if zero.get("zero_hpz_partition_size", 1) not in (0, 1) or zero.get("mics_shard_size", -1) != -1:
        raise ValueError(
            "zero_optimization.zero_hpz_partition_size and mics_shard_size are not supported with --engine deepspeed: "
            "remove them."
        )
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        if not isinstance(offload, Mapping):
            raise ValueError(f"{part} in --deepspeed-config must be an object, and is {offload!r}.")
        elsewhere = offload.get("device", "none") not in ("none", "cpu")
        if elsewhere or offload.get("ratio", 1.0) != 1.0 or offload.get("super_offload"):
            raise ValueError(
                f"zero_optimization.{part} is {offload} in {args.deepspeed_config}: only device cpu, with ratio 1 and "
                "without super_offload, is supported."
            )
    if (zero.get("offload_param") or {}).get("device", "none") != "none" and stage != 3:
        raise ValueError(f"zero_optimization.offload_param needs zero_optimization.stage 3, and the stage is {stage}.")
    hidden = args.hidden_size
    for key, value in {  # what the Hugging Face trainer puts there, so that its users' files work
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }.items():
        if zero.get(key) == AUTO:
            zero[key] = value


def _optimizer(config: dict[str, Any], args: Namespace) -> None:
    _fill(config, {"optimizer.type": "AdamW" if _decoupled(args) else "Adam", "optimizer.params": {}})
    kind, params = config["optimizer"]["type"], _locate(config, "optimizer.params.lr")[0]
    for name in params.keys() - _ADAM_AS_FLAGS:
        if name not in _ADAM_AS_ALWAYS or params[name] != _ADAM_AS_ALWAYS[name]:
            raise ValueError(f"optimizer.params.{name} in {args.deepspeed_config} is not supported: remove it.")
    decoupled = kind == "AdamW" or (kind == "Adam" and params.get("adam_w_mode", True))
    if kind not in ("Adam", "AdamW") or decoupled != _decoupled(args):
        raise ValueError(
            f"optimizer {kind} with {params} in {args.deepspeed_config} is not what the flags ask for, Adam with "
            f"{'decoupled' if _decoupled(args) else 'L2'} weight decay: leave the optimizer section out, or "
            "give AdamW (or Adam with adam_w_mode false, and --no-decoupled-weight-decay)."
        )
    wanted = {
        "lr": args.lr,
        "betas": [args.adam_beta1, args.adam_beta2],
        "eps": args.adam_eps,
        "weight_decay": args.weight_decay,
    }
    _settle(config, {f"optimizer.params.{name}": value for name, value in wanted.items()}, args.deepspeed_config)
    if kind == "Adam":
        params["adam_w_mode"] = decoupled
    if not torch.cuda.is_available():
        params.setdefault("torch_adam", True)  # DeepSpeed's own for CPUs is compiled first, for a minute
    if params.get("torch_adam"):
        config["zero_allow_untested_optimizer"] = True


def _decoupled(args: Namespace) -> bool:
    return bool(getattr(args, "decoupled_weight_decay", True))


def _settle(config: dict[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    """Set the keys (dots lead into sections) to what the flags say. Raises ValueError where they say otherwise."""
    for key, value in wanted.items():
        section, name = _locate(config, key)
        given = section.get(name, AUTO)
        if given != AUTO and given != value:
            raise ValueError(
                f"{key} is {given!r} in {path} and {value!r} by the flags: change one of them, or put "
                f'"{AUTO}" into the file.'
            )
        section[name] = value


def _fill(config: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Set the keys that are absent or "auto"."""
    for key, value in defaults.items():
        section, name = _locate(config, key)
        if section.get(name, AUTO) == AUTO:
            section[name] = value


def _locate(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    *path, name = key.split(".")
    for part in path:
        if config.get(part) is None:  # also null
            config[part] = {}
        config = config[part]
        if not isinstance(config, dict):
            raise ValueError(f"{part} in --deepspeed-config must be an object, and is {config!r}.")
    return config, name


def _refuse_sections(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        off = not value or (isinstance(value, Mapping) and value.get("enabled") is False)
        if key == "scheduler" and not off:
            raise ValueError(
                "scheduler in --deepspeed-config: Megatron's loop sets the learning rate. Remove the section, and give "
                "--lr, --lr-decay-style and --lr-warmup-iters."
            )
        if key not in _KNOWN_SECTIONS and not off:
            raise ValueError(f"{key} in --deepspeed-config is not supported with --engine deepspeed: remove it.")
    bf16 = config.get("bf16") or {}
    if unknown := set(bf16 if isinstance(bf16, Mapping) else ()) - {"enabled"}:
        raise ValueError(f"bf16.{min(unknown)} in --deepspeed-config is not supported: remove it.")


def _refuse_auto(value: Any, path: str = "") -> None:
    if value == AUTO:
        raise ValueError(f'{path} is "{AUTO}" in --deepspeed-config, and no flag says what it should be: give a value.')
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_auto(inner, f"{path}.{key}" if path else key)


def _refuse_flags(args: Namespace, mtpd: MTPDConfig) -> None:
    never_reduced = "DeepSpeed reduces gradients by itself and skips what Megatron does then"
    unsupported = {
        "--pipeline-model-parallel-size": (args.pipeline_model_parallel_size > 1, "use tensor parallelism and ZeRO"),
        "--sequence-parallel": (args.sequence_parallel, f"{never_reduced}; remove it"),
        "--expert-model-parallel-size": (args.expert_model_parallel_size > 1, f"{never_reduced}; use 1"),
        "--num-experts": (args.num_experts, "ZeRO gathers a module when it runs, and not every rank runs every expert"),
        "--context-parallel-size": (args.context_parallel_size > 1, "nobody has tested it; use 1"),
        "--gradient-accumulation-fusion": (
            args.gradient_accumulation_fusion,
            "it writes into gradient buffers of Megatron's; add --no-gradient-accumulation-fusion",
        ),
        "--use-distributed-optimizer": (args.use_distributed_optimizer, "ZeRO stands in its place; remove it"),
        "--num-distributed-optimizer-instances": (
            args.num_distributed_optimizer_instances > 1,
            "ZeRO shards over all data-parallel ranks; remove it",
        ),
        "--overlap-grad-reduce": (args.overlap_grad_reduce, "set zero_optimization.overlap_comm instead"),
        "--overlap-param-gather": (args.overlap_param_gather, "ZeRO stage 3 prefetches by itself; remove it"),
        "--calculate-per-token-loss": (args.calculate_per_token_loss, f"{never_reduced}; remove it"),
        "--fp16": (args.fp16, "use --bf16"),
        "--fp8-format": (args.fp8, "nobody has tested it; use --bf16"),
        "--fp4-format": (args.fp4, "nobody has tested it; use --bf16"),
        "--loss-scale": (args.loss_scale, "in bf16 and fp32 DeepSpeed scales no loss; remove it"),
        "--optimizer": (args.optimizer != "adam", "only adam is supported"),
        "--use-precision-aware-optimizer": (args.use_precision_aware_optimizer, "remove it"),
        "--optimizer-cpu-offload": (args.optimizer_cpu_offload, "set zero_optimization.offload_optimizer instead"),
        "--tensor-parallel-num-weight-shards": (
            args.gtp_weight_remat_size > 1,
            "set zero_optimization.stage 3 instead",
        ),
        "--qk-clip": (args.qk_clip, "it changes the model's weights, and ZeRO has others in fp32; remove it"),
        "--load-main-params-from-ckpt": (
            args.load_main_params_from_ckpt,
            "ZeRO takes its fp32 weights from the model's; remove it",
        ),
        "--skip-train": (args.skip_train, "validate with --engine megatron, which reads the same checkpoints"),
        "--log-params-norm": (args.log_params_norm, "the parameters are in pieces; remove it"),
        "--log-num-zeros-in-grad": (args.log_num_zeros_in_grad, "the gradients are in pieces; remove it"),
        "--init-model-with-meta-device": (args.init_model_with_meta_device, "ZeRO stage 3 builds in pieces; remove it"),
        "--ckpt-format": (args.ckpt_format != "torch_dist", "use torch_dist"),
        "--async-save": (args.async_save, "nobody has tested it; remove it"),
        "--save-params-interval": (args.save_params_interval, "the parameters are in pieces; use --save-interval"),
        "--save-wgrads-interval": (args.save_wgrads_interval, "the gradients are in pieces; remove it"),
        "--check-weight-hash-across-dp-replicas-interval": (
            args.check_weight_hash_across_dp_replicas_interval,
            "no two ranks have the same pieces; remove it",
        ),
        "--cuda-graph-impl": (args.cuda_graph_impl not in (None, "none"), "ZeRO moves the parameters; remove it"),
        "--mtpd-clip-apart": (
            mtpd.clip_apart and mtpd.train == "all" and args.clip_grad > 0,
            "DeepSpeed clips all gradients by one norm; add --no-mtpd-clip-apart (or train heads alone)",
        ),
    }
    unsupported |= {flag: (getattr(args, name), _MEGATRONS_OWN) for flag, name in _OF_DDP_AND_OPTIMIZER.items()}
    for flag, (is_set, remedy) in unsupported.items():
        if is_set:
            raise ValueError(f"{flag} does not work with --engine deepspeed: {remedy}.")
