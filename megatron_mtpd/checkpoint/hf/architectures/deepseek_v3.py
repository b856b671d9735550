"""DeepSeek-V3: multi-latent attention, and experts behind the first dense layers; its folders have heads of their own.

A head stands behind the last layer, with copies of the embedding and of the output layer, which all heads share. The
rotary channels are interleaved on both sides, so no row changes its place. What Megatron has no flag for (YaRN from
other than 4,096 positions, groups of experts rated by other than their best two) is refused, by the entry of
config.json.
"""

from __future__ import annotations

from typing import Any

from megatron_mtpd.checkpoint.hf.architectures import llama
from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.layouts import Same, Stacked, Table, Vocabulary
from megatron_mtpd.checkpoint.hf.shape import Experts, Latent, Shape, Yarn

NORM_EPS = 1e-6
"""Of the norms in the bottlenecks of attention, whatever config.json says of the others."""
ORIGINAL_POSITIONS, RAMP = 4096, (32, 1)
"""Of YaRN: all that Megatron's flags leave to its defaults."""

ATTENTION: Table = {
    "input_layernorm.weight": Same("input_layernorm.weight"),
    "self_attention.linear_q_down_proj.weight": Same("self_attn.q_a_proj.weight"),
    "self_attention.linear_q_up_proj.layer_norm_weight": Same("self_attn.q_a_layernorm.weight"),
    "self_attention.linear_q_up_proj.weight": Same("self_attn.q_b_proj.weight"),
    "self_attention.linear_kv_down_proj.weight": Same("self_attn.kv_a_proj_with_mqa.weight"),
    "self_attention.linear_kv_up_proj.layer_norm_weight": Same("self_attn.kv_a_layernorm.weight"),
    "self_attention.linear_kv_up_proj.weight": Same("self_attn.kv_b_proj.weight"),
    "self_attention.linear_proj.weight": Same("self_attn.o_proj.weight"),
}
SHARED: Table = {
    "pre_mlp_layernorm.weight": Same("post_attention_layernorm.weight"),
    "mlp.router.weight": Same("mlp.gate.weight"),
    "mlp.router.expert_bias": Same("mlp.gate.e_score_correction_bias"),
    "mlp.shared_experts.linear_fc1.weight": Stacked(
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight")
    ),
    "mlp.shared_experts.linear_fc2.weight": Same("mlp.shared_experts.down_proj.weight"),
}


def experts(shape: Shape) -> Table:
    """The second half of a block with as many experts as a model has."""
    assert shape.experts
    names = [f"mlp.experts.{number}." for number in range(shape.experts.count)]
    first = tuple(f"{name}{part}_proj.weight" for name in names for part in ("gate", "up"))
    return SHARED | {
        "mlp.experts.experts.linear_fc1.weight": Stacked(first),
        "mlp.experts.experts.linear_fc2.weight": Stacked(tuple(name + "down_proj.weight" for name in names)),
    }


def config(shape: Shape) -> dict[str, Any]:
    """Entries of config.json."""
    latent, moe = shape.latent, shape.experts
    assert latent and moe
    rope: dict[str, Any] = {"rope_theta": float(shape.rope_base), "rope_type": "default"}
    if yarn := latent.yarn:
        rope |= {"rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": ORIGINAL_POSITIONS}
        rope |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
        rope |= dict(zip(("beta_fast", "beta_slow"), RAMP, strict=True))
    groups, chosen = moe.groups or (1, 1)
    return {
        "rope_parameters": rope,
        "rope_interleave": True,
        "attention_bias": False,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_nope_head_dim": latent.head_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "first_k_dense_replace": moe.dense_layers,
        "n_routed_experts": moe.count,
        "n_shared_experts": moe.shared,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "n_group": groups,
        "topk_group": chosen,
        "norm_topk_prob": True,
        "routed_scaling_factor": moe.scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": shape.num_heads,
    }


def shape(config: Any, where: str) -> dict[str, Any]:
    """Entries of Shape. Raises ValueError, naming the entry of config.json, for what Megatron computes differently."""
    rope, top_k = dict(config.rope_parameters), config.num_experts_per_tok
    groups = None if config.n_group == config.topk_group else (config.n_group, config.topk_group)
    yarn = rope.get("rope_type") == "yarn"
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    ramp = rope.get("beta_fast") or RAMP[0], rope.get("beta_slow") or RAMP[1]
    refused = {
        "qk_rope_head_dim": (config.qk_rope_head_dim, not config.qk_rope_head_dim),  # vLLM's way to say plain attention
        "q_lora_rank": (config.q_lora_rank, not config.q_lora_rank),
        "rms_norm_eps": (config.rms_norm_eps, config.rms_norm_eps != NORM_EPS),
        "rope_interleave": (config.rope_interleave, not config.rope_interleave),
        "num_key_value_heads": (config.num_key_value_heads, config.num_key_value_heads != config.num_attention_heads),
        "first_k_dense_replace": (
            config.first_k_dense_replace,
            not 0 <= config.first_k_dense_replace < config.num_hidden_layers,
        ),
        "moe_layer_freq": (getattr(config, "moe_layer_freq", 1), getattr(config, "moe_layer_freq", 1) != 1),
        "scoring_func": (
            getattr(config, "scoring_func", None),
            getattr(config, "scoring_func", "sigmoid") != "sigmoid",
        ),
        "norm_topk_prob": (config.norm_topk_prob, bool(config.norm_topk_prob) != (top_k > 1)),
        "topk_group": (config.topk_group, groups is not None and top_k // groups[1] != 2),
        "n_shared_experts": (config.n_shared_experts, not config.n_shared_experts),
        "rope_parameters": (
            rope,
            yarn
            and (
                rope.get("original_max_position_embeddings") != ORIGINAL_POSITIONS
                or ramp != RAMP
                or not rope.get("factor")
                or rope.get("attention_factor") is not None
                or not rope.get("truncate", True)
                or (not all(scales) and (scales[1] or scales[0] not in (None, 1)))
            ),
        ),
    }
    for name, (value, wrong) in refused.items():
        if wrong:
            raise ValueError(f"{where}: config.json has {name} {value!r}, which Megatron's layers cannot express.")
    return {
        "head_dim": config.v_head_dim,
        "latent": Latent(
            query_rank=config.q_lora_rank,
            key_value_rank=config.kv_lora_rank,
            head_dim=config.qk_nope_head_dim,
            rotary_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            yarn=Yarn(float(rope["factor"]), float(scales[0] or 1), float(scales[1] or 0)) if yarn else None,
        ),
        "experts": Experts(
            dense_layers=config.first_k_dense_replace,
            count=config.n_routed_experts,
            top_k=top_k,
            ffn_hidden_size=config.moe_intermediate_size,
            shared=config.n_shared_experts,
            groups=groups,
            scale=float(config.routed_scaling_factor),
        ),
    }


ARCHITECTURE = Architecture(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    model=llama.MODEL,
    attention=ATTENTION,
    mlp=llama.MLP,
    experts_of=experts,
    latent=True,
    copied={
        "embedding.word_embeddings.weight": Vocabulary("embed_tokens.weight"),
        "output_layer.weight": Vocabulary("shared_head.head.weight"),
    },
    free_head_dim=False,
    qk_norm=True,
    rope_types=("default", "yarn"),
    extra_config=config,
    extra_shape=shape,
)
