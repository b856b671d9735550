"""Llama and what is built like it (SmolLM2 among them). The tables that the other architectures extend."""

from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.layouts import GroupedQKV, Same, Stacked, Table, Vocabulary

MODEL: Table = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.final_norm.weight": Same("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}
ATTENTION: Table = {
    "self_attention.linear_qkv.layer_norm_weight": Same("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": GroupedQKV(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.linear_proj.weight": Same("self_attn.o_proj.weight"),
}
MLP: Table = {
    "mlp.linear_fc1.layer_norm_weight": Same("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": Stacked(("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Same("mlp.down_proj.weight"),
}
ARCHITECTURE = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    model=MODEL,
    attention=ATTENTION,
    mlp=MLP,
    extra_config=lambda shape: {"attention_bias": False, "mlp_bias": False},
)
