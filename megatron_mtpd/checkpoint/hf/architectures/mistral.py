"""Mistral (dense): Llama under other names in the configuration; no sliding window."""

from megatron_mtpd.checkpoint.hf.architectures import llama
from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture

ARCHITECTURE = Architecture(
    model_type="mistral",
    class_name="MistralForCausalLM",
    model=llama.MODEL,
    attention=llama.ATTENTION,
    mlp=llama.MLP,
    extra_config=lambda shape: {"sliding_window": None},
)
