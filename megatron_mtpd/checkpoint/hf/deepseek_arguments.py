"""The arguments of attention and of experts, where they are DeepSeek-V3's, and what they mean.

`latent_of` and `experts_of` read those of a checkpoint, and refuse by the flag what DeepSeek-V3's configuration has no
word for; `parts_of` is the way back.
"""

from __future__ import annotations

from typing import Any

from megatron_mtpd.checkpoint.hf.shape import Experts, Latent, Shape, Yarn
from megatron_mtpd.checkpoint.metadata import CheckpointError

Flags = tuple[tuple[str, Any, bool], ...]
"""A flag, its value, and whether DeepSeek-V3 has no such thing."""


def latent_of(args: dict[str, Any], where: str) -> Latent:
    """Attention of a checkpoint's arguments. Raises CheckpointError naming `where` and the flag."""
    factor, scales = args.get("rotary_scaling_factor", 1.0), (args.get("mscale", 1.0), args.get("mscale_all_dim", 0.0))
    is_yarn = (args.get("rope_type") or "yarn") == "yarn" and factor != 1.0
    _refuse(
        (
            ("--qk-layernorm", False, not args.get("qk_layernorm")),
            ("--q-lora-rank", None, not args.get("q_lora_rank")),
            ("--norm-epsilon", args["layernorm_epsilon"], args["layernorm_epsilon"] != 1e-6),
            ("--mscale", scales[0], is_yarn and not all(scales) and scales != (1.0, 0.0)),
        ),
        where,
    )
    return Latent(
        query_rank=args["q_lora_rank"],
        key_value_rank=args["kv_lora_rank"],
        head_dim=args["qk_head_dim"],
        rotary_dim=args["qk_pos_emb_head_dim"],
        value_dim=args["v_head_dim"],
        yarn=Yarn(factor, *scales) if is_yarn else None,
    )


def experts_of(args: dict[str, Any], dense_layers: int, where: str) -> Experts:
    """Experts of a checkpoint's arguments, behind `dense_layers`. Raises CheckpointError, as above."""
    size, shared = args.get("moe_ffn_hidden_size"), args.get("moe_shared_expert_intermediate_size")
    top_k, chosen = args["moe_router_topk"], args.get("moe_router_group_topk")
    groups, scores = args.get("moe_router_num_groups"), args["moe_router_score_function"]
    capacity = args.get("moe_expert_capacity_factor")
    _refuse(
        (
            ("--moe-router-score-function", scores, scores != "sigmoid"),
            ("--moe-router-enable-expert-bias", False, not args.get("moe_router_enable_expert_bias")),
            ("--moe-shared-expert-intermediate-size", shared, not size or not shared or shared % size != 0),
            ("--moe-shared-expert-gate", True, bool(args.get("moe_shared_expert_gate"))),
            ("--moe-latent-size", args.get("moe_latent_size"), bool(args.get("moe_latent_size"))),
            ("--moe-expert-capacity-factor", capacity, bool(capacity)),
            ("--moe-router-group-topk", chosen, bool(chosen) and top_k // chosen != 2),
        ),
        where,
    )
    return Experts(
        dense_layers=dense_layers,
        count=args["num_experts"],
        top_k=top_k,
        ffn_hidden_size=int(size or 0),
        shared=int(shared or 0) // int(size or 1),
        groups=(int(groups or 1), int(chosen)) if chosen and chosen != groups else None,
        scale=args.get("moe_router_topk_scaling_factor") or 1.0,
    )


def _refuse(flags: Flags, where: str) -> None:
    for flag, value, wrong in flags:
        if wrong:
            raise CheckpointError(f"{where}: trained with {flag} {value}, which DeepSeek-V3 has not.")


def parts_of(shape: Shape) -> dict[str, Any]:
    """The arguments of attention and experts, of a dense model with plain attention too."""
    latent, experts = shape.latent, shape.experts
    if not latent or not experts:
        return {
            "kv_channels": shape.head_dim,
            "group_query_attention": True,
            "num_query_groups": shape.num_query_groups,
        }
    yarn, groups = latent.yarn, experts.groups
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.head_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "mscale": yarn.mscale if yarn else 1.0,
        "mscale_all_dim": yarn.mscale_all_dim if yarn else 0.0,
        "num_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared * experts.ffn_hidden_size,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": groups[0] if groups else None,
        "moe_router_group_topk": groups[1] if groups else None,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }
