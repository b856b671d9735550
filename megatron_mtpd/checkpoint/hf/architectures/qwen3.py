"""Qwen3 (dense): Llama with a norm of each head's queries and keys."""

from megatron_mtpd.checkpoint.hf.architectures import llama
from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.layouts import Same, Table

ATTENTION: Table = llama.ATTENTION | {
    "self_attention.q_layernorm.weight": Same("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": Same("self_attn.k_norm.weight"),
}
ARCHITECTURE = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    model=llama.MODEL,
    attention=ATTENTION,
    mlp=llama.MLP,
    qk_norm=True,
    layer_types=True,
    extra_config=lambda shape: {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
)
