"""The arguments of a checkpoint of ours, and the shape of the model that they describe.

`shape_of` reads them, and refuses a model that no architecture here can express; `arguments` and `flags` are the way
back: what to store in a checkpoint so that Megatron can build the model, and the flags that train it. Megatron's
`--use-checkpoint-args` takes most of the stored arguments, but neither `--qk-layernorm` nor `--norm-epsilon`, so the
flags are the safe way.
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from megatron_mtpd.checkpoint.hf.deepseek_arguments import experts_of, latent_of, parts_of
from megatron_mtpd.checkpoint.hf.shape import Shape
from megatron_mtpd.checkpoint.metadata import CheckpointError

_CONSTANT: dict[str, Any] = {
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_scaling_factor": 1.0,
    "rope_type": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "make_vocab_size_divisible_by": 128,
    "mtp_use_repeated_layer": False,
    "mtp_hybrid_override_pattern": None,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": None,
    "multi_latent_attention": False,
    "heterogeneous_layers_config_path": None,
    "num_experts": None,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
    "moe_grouped_gemm": False,
    "spec": None,
    "transformer_impl": "transformer_engine",
    "no_persist_layer_norm": False,
    "init_method_xavier_uniform": False,
    "init_method_std": 0.02,
    "bias_swiglu_fusion": True,
    "bias_gelu_fusion": False,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "fp16_lm_cross_entropy": False,
    "overlap_p2p_comm": False,
    "cp_comm_type": ["p2p"],
    "te_precision_config_file": None,
    "config_logger_dir": "",
    "seed": 1234,
    "ckpt_format": "torch_dist",
    **dict.fromkeys(("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")),
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "world_size"), 1),
    **dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0),
}
"""What Megatron asks for beside the shape, at the values that mean nothing special."""


def shape_of(args: dict[str, Any], num_heads: int, dtype: str, where: str) -> Shape:
    """Of the arguments in a checkpoint that holds `num_heads` heads.

    Raises CheckpointError, naming `where` and the flag, for a model that is no transformer with RMSNorm, gated SiLU and
    rotary positions, or whose mixture of experts is not DeepSeek-V3's.
    """
    main, *heads = (args.get("hybrid_layer_pattern") or "").replace("|", "").split("/")
    found = re.fullmatch(r"(?:(\*-)+|(?P<dense>(?:\+-)*)(?P<experts>(?:\+E)+))", main)
    block = "" if not found else "+E" if found["experts"] else "*-"
    if not found or any(head != block for head in heads[:num_heads]):
        raise CheckpointError(
            f"{where} holds a model of --hybrid-layer-pattern {args.get('hybrid_layer_pattern')!r}: only dense "
            "transformers can be converted, whose layers and heads all are '*-', and those of DeepSeek-V3, '+-' before "
            "'+E' with heads '+E'. A checkpoint of Megatron's GPTModel has no pattern: load it into training, and what "
            "is saved then has one."
        )
    needed = {
        "normalization": ("RMSNorm", "--normalization"),
        "swiglu": (True, "--swiglu"),
        "add_bias_linear": (False, "--disable-bias-linear"),
        "position_embedding_type": ("rope", "--position-embedding-type"),
    }
    unusual = {
        "rotary_interleaved": "--rotary-interleaved",
        "apply_residual_connection_post_layernorm": "--apply-residual-connection-post-layernorm",
        "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
        "attention_output_gate": "--attention-output-gate",
        "no_rope_freq": "--no-rope-freq",
        "window_size": "--window-size",
        "use_mup": "--use-mup",
        "qk_l2_norm": "--qk-l2-norm",
        "mtp_use_repeated_layer": "--mtp-use-repeated-layer",
        "activation_func_clamp_value": "--activation-func-clamp-value",
        "softmax_scale": "--softmax-scale",
    }
    for name, (value, flag) in needed.items():
        if args.get(name) != value:
            raise CheckpointError(f"{where}: trained with {flag} {args.get(name)}, and {value} is needed here.")
    if not found["experts"]:
        unusual["multi_latent_attention"] = "--multi-latent-attention"
    for name, flag in unusual.items():
        if args.get(name):
            raise CheckpointError(f"{where}: trained with {flag}, which no architecture here can express.")
    if args.get("softmax_type", "vanilla") != "vanilla" or args.get("rotary_percent", 1.0) != 1.0:
        raise CheckpointError(
            f"{where}: trained with --softmax-type {args.get('softmax_type')} and --rotary-percent "
            f"{args.get('rotary_percent')}: only vanilla and 1.0 can be converted."
        )
    heads_of_attention = args["num_attention_heads"]
    latent = latent_of(args, where) if found["experts"] else None
    experts = experts_of(args, len(found["dense"]) // 2, where) if found["experts"] else None
    return Shape(
        num_layers=len(main) // 2,
        num_heads=num_heads,
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads_of_attention,
        num_query_groups=args["num_query_groups"] if args.get("group_query_attention") else heads_of_attention,
        head_dim=latent.value_dim if latent else args.get("kv_channels") or args["hidden_size"] // heads_of_attention,
        vocab_size=args.get("vocab_size") or args["padded_vocab_size"],
        padded_vocab_size=args["padded_vocab_size"],
        norm_eps=args["layernorm_epsilon"],
        rope_base=args["rotary_base"],
        rope_factor=args.get("rotary_seq_len_interpolation_factor"),
        rope_scaling_factor=args["rope_scaling_factor"] if args.get("use_rope_scaling") else None,
        max_positions=args["max_position_embeddings"],
        tied=not args["untie_embeddings_and_output_weights"],
        qkv_bias=bool(args.get("add_qkv_bias")),
        qk_norm=bool(args.get("qk_layernorm")),
        dtype=dtype,
        latent=latent,
        experts=experts,
    )


def arguments(shape: Shape, dtype: Any, tokenizer: str | None) -> Namespace:
    """What a checkpoint has to say for Megatron to build this model. `dtype`: torch's; `tokenizer`: a folder."""
    return Namespace(
        **{
            "hybrid_layer_pattern": shape.pattern,
            "num_layers": 2 * shape.num_layers,  # of the pattern
            "mtp_num_layers": shape.num_heads or None,
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "vocab_size": shape.vocab_size,
            "padded_vocab_size": shape.padded_vocab_size,
            "layernorm_epsilon": shape.norm_eps,
            "rotary_base": shape.rope_base,
            "rotary_seq_len_interpolation_factor": shape.rope_factor,
            "use_rope_scaling": shape.rope_scaling_factor is not None,
            "rope_scaling_factor": shape.rope_scaling_factor or 8.0,
            "seq_length": shape.max_positions,
            "max_position_embeddings": shape.max_positions,
            "untie_embeddings_and_output_weights": not shape.tied,
            "add_qkv_bias": shape.qkv_bias,
            "qk_layernorm": shape.qk_norm,
            "params_dtype": dtype,
            "bf16": shape.dtype == "bfloat16",
            "fp16": shape.dtype == "float16",
            "tokenizer_type": "HuggingFaceTokenizer" if tokenizer else "NullTokenizer",
            "tokenizer_model": tokenizer,
        }
        | _CONSTANT
        | parts_of(shape)
    )


def flags(shape: Shape, tokenizer: str | None) -> list[str]:
    """The flags of the model for `tools/pretrain_mtpd.py`, as lines."""
    optional = {
        "--untie-embeddings-and-output-weights": not shape.tied,
        "--add-qkv-bias": shape.qkv_bias,
        "--qk-layernorm": shape.qk_norm,
        # On a GPU Megatron fuses by default, and for this attention it can with YaRN alone.
        "--no-rope-fusion": shape.latent is not None and shape.latent.yarn is None,
        f"--rotary-seq-len-interpolation-factor {shape.rope_factor}": shape.rope_factor is not None,
        f"--use-rope-scaling --rope-scaling-factor {shape.rope_scaling_factor}": shape.rope_scaling_factor is not None,
        "--bf16": shape.dtype == "bfloat16",
        "--fp16": shape.dtype == "float16",
    }
    heads = f" --mtp-num-layers {shape.num_heads}" if shape.num_heads else ""
    layers = f"--hybrid-layer-pattern {shape.pattern}" if shape.latent else f"--num-layers {shape.num_layers}{heads}"
    parts = [f"--{name.replace('_', '-')} {value}" for name, value in parts_of(shape).items() if value is not None]
    return [
        layers,
        f"--hidden-size {shape.hidden_size} --ffn-hidden-size {shape.ffn_hidden_size}",
        f"--num-attention-heads {shape.num_attention_heads}",
        " ".join(parts).replace(" True", ""),
        f"--max-position-embeddings {shape.max_positions} --padded-vocab-size {shape.padded_vocab_size}",
        f"--position-embedding-type rope --rotary-base {shape.rope_base}",
        f"--normalization RMSNorm --norm-epsilon {shape.norm_eps} --swiglu --disable-bias-linear",
        "--attention-dropout 0 --hidden-dropout 0",
        *(flag for flag, given in optional.items() if given),
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer}"
        if tokenizer
        else f"--tokenizer-type NullTokenizer --vocab-size {shape.vocab_size}",
    ]
