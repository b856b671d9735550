"""From a command line of training to the numbers of a plan, with Megatron's own parser and its defaults.

Nothing is built, no process group and no tokenizer; the machine that plans needs none of what the flags ask for. A
pattern without stages on several pipeline ranks gets the balanced ones. Raises ValueError, with the option and its
value, for what does not divide and for layers that the arithmetic does not know.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron.training.arguments import add_megatron_arguments
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.layer_pattern import expand_layer_flags
from megatron_mtpd.planning.gpus import GPU
from megatron_mtpd.planning.plan import balanced_stages, with_stages
from megatron_mtpd.planning.shape import LatentAttention, Model, Parallel, Run, Stack, Step
from megatron_mtpd.training.arguments import add_mtpd_arguments

KNOWN = "*+-E"
_ONE_STAGE = ("--pipeline-model-parallel-size", "1")
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def run_from_flags(argv: Sequence[str], ranks: int, on_cpu: bool = False, gpu: GPU | None = None) -> Run:
    """The run that the flags of tools/pretrain_mtpd.py describe on so many ranks.

    `gpu` matters where stages are to be balanced for FP8 alone: it has the rates. None: by operations.
    """
    parser = argparse.ArgumentParser(prog="plan_run.py", allow_abbrev=False)
    add_mtpd_arguments(add_megatron_arguments(parser))
    # What the platform takes for defaults on a machine without a GPU is not what the planned one has.
    parser.set_defaults(transformer_impl="transformer_engine")
    args = parser.parse_args(_with_pattern(argv))
    for flag in ("hidden_size", "num_attention_heads", "seq_length", "micro_batch_size", "hybrid_layer_pattern"):
        if getattr(args, flag) is None:
            name = "num-layers" if flag == "hybrid_layer_pattern" else flag.replace("_", "-")
            raise ValueError(f"--{name} is not given: a plan needs it.")
    if args.engine != "megatron":
        raise ValueError(
            f"--engine {args.engine}: a plan does not know what ZeRO keeps. Plan with --engine megatron and "
            "--use-distributed-optimizer, which divides as much as ZeRO stage 1."
        )
    parallel = _parallel(args, ranks)
    run = Run(_model(args, parallel), parallel, _step(args, parallel, on_cpu))
    return run if len(run.model.stages) > 1 or parallel.pp == 1 else with_stages(run, balanced_stages(run, gpu))


def _with_pattern(argv: Sequence[str]) -> list[str]:
    """With --hybrid-layer-pattern; without stages, for the plan to lay out, where the blocks cannot be dealt evenly."""
    try:
        return expand_layer_flags(argv)
    except ValueError:
        if any("pipeline-num-layers" in word for word in argv):
            raise
        return [*argv, "--hybrid-layer-pattern", expand_layer_flags([*argv, *_ONE_STAGE])[-1]]


def _divides(flag: str, value: int, whole: int, of: str) -> int:
    if value < 1 or whole % value:
        raise ValueError(f"{flag} {value} does not divide {of} {whole}.")
    return whole // value


def _parallel(args: argparse.Namespace, ranks: int) -> Parallel:
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    dp = _divides("tensor x pipeline x context parallel size", tp * pp * cp, ranks, "the number of GPUs,")
    ep = args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    _divides("expert x expert-tensor x pipeline parallel size", ep * etp * pp, ranks, "the number of GPUs,")
    segments = args.hybrid_layer_pattern.split("/")[0].count("|") + 1
    virtual = segments // pp if segments > 1 else 1
    if segments > 1 and segments % pp:
        raise ValueError(
            f"--hybrid-layer-pattern has {segments} stages, and --pipeline-model-parallel-size is {pp}: it must divide "
            "their number."
        )
    return Parallel(tp, pp, cp, dp, ep, etp, virtual, args.sequence_parallel and tp > 1)


def _model(args: argparse.Namespace, parallel: Parallel) -> Model:
    main, *heads = args.hybrid_layer_pattern.split("/")
    unknown = set("".join([main, *heads])) - set(KNOWN) - {"|"}
    if unknown:
        raise ValueError(
            f"--hybrid-layer-pattern holds {' '.join(sorted(unknown))}: a plan knows the layers {' '.join(KNOWN)}."
        )
    if len(set(heads)) > 1:
        raise ValueError(f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: all heads must be alike.")
    hidden = args.hidden_size
    vocabulary = args.padded_vocab_size
    if vocabulary is None:
        if not args.vocab_size:
            raise ValueError("--vocab-size is not given: a plan cannot ask the tokenizer.")
        vocabulary = calculate_padded_vocab_size(
            args.vocab_size, args.make_vocab_size_divisible_by, parallel.tp, logging_enabled=False
        )
    ffn = args.ffn_hidden_size
    if ffn is None:
        ffn = int((4 * hidden * 2 / 3) / 64) * 64 if args.swiglu else 4 * hidden
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    _divides("--tensor-model-parallel-size", parallel.tp, args.num_attention_heads, "--num-attention-heads")
    _divides("--tensor-model-parallel-size", parallel.tp, groups, "the number of query groups,")
    if args.num_experts:
        _divides("--expert-model-parallel-size", parallel.ep, args.num_experts, "--num-experts")
    latent = None
    if "+" in main:
        ranks_and_widths = (args.kv_lora_rank, args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim)
        latent = LatentAttention(args.q_lora_rank, *ranks_and_widths)
    return Model(
        hidden=hidden,
        ffn=ffn,
        attention_heads=args.num_attention_heads,
        query_groups=groups,
        kv_channels=args.kv_channels or hidden // args.num_attention_heads,
        vocabulary=vocabulary,
        stages=tuple(main.split("|")),
        head=heads[0] if heads else "",
        heads=len(heads),
        one_head_repeated=args.mtp_use_repeated_layer,
        gated=args.swiglu or args.quick_geglu,
        bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        norm=args.normalization,
        tied=not args.untie_embeddings_and_output_weights,
        experts=args.num_experts or 0,
        router_topk=args.moe_router_topk if args.num_experts else 0,
        expert_ffn=args.moe_ffn_hidden_size or ffn,
        shared_ffn=args.moe_shared_expert_intermediate_size or 0,
        shared_gate=args.moe_shared_expert_gate,
        latent=latent,
    )


def _step(args: argparse.Namespace, parallel: Parallel, on_cpu: bool) -> Step:
    batch = args.global_batch_size or args.micro_batch_size * parallel.dp
    micro_batches = _divides(
        "--micro-batch-size times the data-parallel size", args.micro_batch_size * parallel.dp, batch,
        "--global-batch-size",
    )  # fmt: skip
    low = args.bf16 or args.fp16
    weight = 2 if low else 4
    moments = _BYTES[args.exp_avg_dtype] + _BYTES[args.exp_avg_sq_dtype] if args.use_precision_aware_optimizer else 8
    master = _BYTES[args.main_params_dtype] if args.use_precision_aware_optimizer else 4
    keep_fp32 = not args.grad_reduce_in_bf16
    mtpd = MTPDConfig(**{name: getattr(args, f"mtpd_{name}") for name in MTPDConfig.__dataclass_fields__})
    stack: Stack = "cpu" if on_cpu else "local" if args.transformer_impl == "local" else "te"
    return Step(
        sequence=args.seq_length,
        micro_batch=args.micro_batch_size,
        micro_batches=micro_batches,
        bytes_weight=weight,
        bytes_gradient=4 if keep_fp32 or not low else 2,
        bytes_optimizer=moments + (master if low else 0),
        shards_optimizer=args.use_distributed_optimizer,
        fp8=args.fp8 is not None,
        fp8_weights=args.fp8_param_gather,
        first_layers_in_bf16=args.num_layers_at_start_in_bf16 if args.first_last_layers_bf16 else 0,
        last_layers_in_bf16=args.num_layers_at_end_in_bf16 if args.first_last_layers_bf16 else 0,
        recompute="selective" if args.recompute_activations else args.recompute_granularity,
        recompute_layers=args.recompute_num_layers or 1,
        recompute_modules=tuple(args.recompute_modules or ("core_attn",)),
        loss=args.mtpd_loss,
        passes_of_heads=2 if mtpd.heads_pass_twice else 1,
        losses_apart=mtpd.heads_pass_twice or (mtpd.train == "all" and mtpd.ce_output_share != mtpd.kd_output_share),
        trained=args.mtpd_train,
        old_heads=args.mtpd_old_heads,
        stack=stack,
    )
