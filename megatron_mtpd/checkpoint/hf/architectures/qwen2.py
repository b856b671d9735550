"""Qwen2 and Qwen2.5: Llama with biases of query, key and value projections."""

from megatron_mtpd.checkpoint.hf.architectures import llama
from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.layouts import GroupedQKV, Table

ATTENTION: Table = llama.ATTENTION | {
    "self_attention.linear_qkv.bias": GroupedQKV(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    ),
}
ARCHITECTURE = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    model=llama.MODEL,
    attention=ATTENTION,
    mlp=llama.MLP,
    qkv_bias=True,
    free_head_dim=False,
    layer_types=True,
    extra_config=lambda shape: {"use_sliding_window": False, "sliding_window": None},
)
