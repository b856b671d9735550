"""The Hugging Face architectures that can be converted: a file each, and nothing to add anywhere else but here."""

from __future__ import annotations

from megatron_mtpd.checkpoint.hf.architectures import deepseek_v3, llama, mistral, qwen2, qwen3
from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.shape import Shape

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.model_type: module.ARCHITECTURE for module in (llama, qwen2, qwen3, mistral, deepseek_v3)
}
"""By `model_type`, in the order in which `for_shape` looks."""


def architecture_of(model_type: str | None, where: str) -> Architecture:
    """The architecture that a config.json names. Raises ValueError naming what there is."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{where} is a model of type {model_type!r}, and only {', '.join(ARCHITECTURES)} can be converted."
        )
    return ARCHITECTURES[model_type]


def for_shape(shape: Shape) -> Architecture:
    """The first architecture that can express a model. Raises ValueError where none can."""
    for architecture in ARCHITECTURES.values():
        if not architecture.lacks(shape):
            return architecture
    raise ValueError(
        f"No architecture of {', '.join(ARCHITECTURES)} has the model's combination of options: "
        f"--add-qkv-bias {shape.qkv_bias}, --qk-layernorm {shape.qk_norm}, --kv-channels {shape.head_dim}, "
        f"--multi-latent-attention {shape.latent is not None}, --num-experts {shape.experts and shape.experts.count}."
    )
