"""Command-line flags: Megatron's own, and `--mtpd-*` generated from `MTPDConfig`; and the checks of the combination.

Every check runs before any process group, model or dataset is built.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_mtpd import platform
from megatron_mtpd.config import SHARES, MTPDConfig, PerHead, flag
from megatron_mtpd.training.deepspeed_config import add_deepspeed_arguments


class _MTPDFlags(ArgumentGroupFactory):
    """A flag `--mtpd-x` and a destination `mtpd_x` for every field `x` of MTPDConfig."""

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        name = flag(config_attr_name)
        return f"--{prefix}-{name.removeprefix('--')}" if prefix else name

    def _extract_type(self, config_type: Any) -> dict[str, Any]:
        return {"type": float, "nargs": "+"} if config_type == PerHead | None else super()._extract_type(config_type)

    def _build_argparse_kwargs_from_field(self, attribute: dataclasses.Field) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        help_text = kwargs["help"].replace("%", "%%")
        return {**kwargs, "dest": f"mtpd_{attribute.name}", "help": f"{help_text} [{kwargs['default']}]"}


def add_mtpd_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of the method, and the defaults that our training has and Megatron's has not."""
    _MTPDFlags(MTPDConfig).build_group(parser, title="MTP-D: heads that learn from the main head")
    group = parser.add_argument_group(title="MTP-D: reports and checkpoints")
    group.add_argument(
        "--metrics-jsonl",
        metavar="FILE",
        help="one JSON record an iteration, of everything that TensorBoard shows [metrics.jsonl in --tensorboard-dir]",
    )
    group.add_argument(
        "--no-verify-checkpoint",
        dest="verify_checkpoint",
        action="store_false",
        help="do not compare the checksums of the checkpoint's files before it is loaded",
    )
    group.add_argument(
        "--resume-from-last-good",
        action="store_true",
        help="where the last checkpoint of --save is damaged, resume from the last good one before it, with a warning, "
        "instead of ending with an error that names it",
    )
    add_deepspeed_arguments(parser)
    parser.set_defaults(
        position_embedding_type="rope",  # Megatron's heads work with no other
        eval_interval=1000,
        exit_signal_handler=True,  # SIGTERM saves and exits
        dist_ckpt_optim_fully_reshardable=True,  # optimizer states load at any tensor and pipeline size too
        log_throughput=True,
        log_timers_to_tensorboard=True,
    )
    _make_help_printable(parser)
    return platform.set_default_flags(parser)


def _make_help_printable(parser: argparse.ArgumentParser) -> None:
    """Escape what argparse cannot format: megatron-core 0.19.2 has a bare % in the help of a flag, and --help fails."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = str(action.help).replace("%", "%%")


def mtpd_config_from_args(args: argparse.Namespace) -> MTPDConfig:
    """The `MTPDConfig` that the flags describe. Raises ValueError for a value or a combination that cannot work."""
    values = {f.name: getattr(args, f"mtpd_{f.name}") for f in dataclasses.fields(MTPDConfig)}
    if args.mtp_detach_heads:  # Megatron's flag for heads that leave the main model alone
        if any(values[name] != getattr(MTPDConfig, name) for name in SHARES):
            raise ValueError(
                "--mtp-detach-heads cuts every gradient of the heads, and a --mtpd-*-share is set as well. "
                "Use the shares alone."
            )
        values |= dict.fromkeys(SHARES, 0.0)
    if values["distill_start"] is None:
        iterations = args.train_iters or (args.train_samples or 0) // args.global_batch_size
        values["distill_start"] = 2 * iterations // 3 if values["train"] == "all" else 0
    config = MTPDConfig(**values)
    _refuse_combinations(args, config)
    return config


def _refuse_combinations(args: argparse.Namespace, config: MTPDConfig) -> None:
    if not args.mtp_num_layers:
        raise ValueError(
            f"The model has no MTP heads (--hybrid-layer-pattern {args.hybrid_layer_pattern!r}): add "
            "--mtp-num-layers K to --num-layers, or a '/*-' for each head to the pattern."
        )
    config.alphas(args.mtp_num_layers, args.mtp_loss_scaling_factor)
    config.betas(args.mtp_num_layers)
    if config.on_policy_fraction and args.mtp_num_layers < 2:
        raise ValueError(
            f"--mtpd-on-policy-fraction {config.on_policy_fraction} is for heads 2 and up, and the model has one: "
            "remove it."
        )
    unsupported = {
        "--sft": args.sft,
        "--dataloader-inter-document-masking": args.dataloader_inter_document_masking,
        "--hybrid-context-parallel": args.hybrid_context_parallel,
        "--fp16-lm-cross-entropy": args.fp16_lm_cross_entropy,
        "--fp8-output-proj": args.fp8_output_proj,
        "--defer-embedding-wgrad-compute": args.defer_embedding_wgrad_compute,
        "--use-megatron-fsdp": args.use_megatron_fsdp,
        "--use-torch-fsdp2": args.use_torch_fsdp2,
        # The graph of the first iteration would be replayed: the distillation could neither begin nor change.
        "--cuda-graph-impl full_iteration": args.cuda_graph_impl == "full_iteration",
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"{name} is not supported with MTP-D heads: remove it.")
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise ValueError(
            "--reset-attention-mask does nothing with --no-create-attention-mask-in-dataloader: remove one of them."
        )
    if args.reset_attention_mask and args.transformer_impl != "local" and platform.uses_transformer_engine():
        raise ValueError(
            "--reset-attention-mask does nothing with Transformer Engine, whose attention is causal and takes no mask: "
            "documents would see those before them. Remove it, or use --transformer-impl local. The heads keep to "
            "their documents either way."
        )
    if config.heads_pass_twice and (args.hidden_dropout or args.attention_dropout):
        raise ValueError(
            f"--hidden-dropout {args.hidden_dropout} and --attention-dropout {args.attention_dropout}: trunk and "
            "embedding shares that differ between cross-entropy and distillation take two passes of the heads, which "
            "would drop different units. Set both to 0, or the shares alike."
        )
    if args.eval_micro_batch_size not in (None, args.micro_batch_size):
        raise ValueError(
            f"--eval-micro-batch-size {args.eval_micro_batch_size} must be --micro-batch-size {args.micro_batch_size}."
        )
    cp, heads = args.context_parallel_size, args.mtp_num_layers
    if cp > 1 and args.seq_length // (2 * cp) < heads:
        raise ValueError(
            f"--context-parallel-size {cp} cuts --seq-length {args.seq_length} into pieces of "
            f"{args.seq_length // (2 * cp)} positions, fewer than the {heads} heads look ahead: lower it."
        )
    if args.recompute_granularity == "full" and args.recompute_method == "block":
        raise ValueError(
            "--recompute-method block would leave the MTP heads without recomputation (megatron-core 0.19 skips them): "
            "use --recompute-method uniform --recompute-num-layers 1."
        )
