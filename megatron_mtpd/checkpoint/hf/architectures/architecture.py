"""What a file about one architecture says: its names, its tables, and what it can express.

The tables map our names of a module's tensors to layouts of theirs: `model` for what there is once, `attention` and
`mlp` (or `experts`) for the two halves of a block, which on their side are one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_mtpd.checkpoint.hf import fp8
from megatron_mtpd.checkpoint.hf.layouts import Layout, Table, prefixed
from megatron_mtpd.checkpoint.hf.shape import Shape

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3's scaled rotary positions: what Megatron takes for granted, as all published models have it."""


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers."""

    model_type: str
    class_name: str
    """Of the model for causal language modelling."""
    model: Table
    attention: Table
    mlp: Table
    experts_of: Callable[[Shape], Table] | None = None
    """The table of a mixture of experts, of as many as a model has; None where all blocks are dense."""
    latent: bool = False
    """Whether attention is multi-latent."""
    copied: Table = field(default_factory=dict)
    """What each of its own heads has a copy of, in the main model's names, where its folders have heads of their own.
    Then the format of transformers is theirs, and engines know it."""
    layer_prefix: str = "model.layers.{}."
    qkv_bias: bool = False
    qk_norm: bool = False
    free_head_dim: bool = True
    """Whether a head may have another width than hidden size / heads."""
    layer_types: bool = False
    """Whether the configuration names the kind of attention of each layer."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    extra_config: Callable[[Shape], dict[str, Any]] = lambda shape: {}
    """Entries of config.json beside those that all have, or in their place."""
    extra_shape: Callable[[Any, str], dict[str, Any]] = lambda config, where: {}
    """Entries of Shape that others do not have, from the configuration. Raises ValueError naming `where`."""
    experts: Table = field(default_factory=dict)
    """Made by `sized`."""

    def sized(self, shape: Shape) -> Architecture:
        """This architecture with tables of the size of a model."""
        return replace(self, experts=self.experts_of(shape) if self.experts_of and shape.experts else {})

    def lacks(self, shape: Shape) -> list[str]:
        """The flags of a model that this architecture cannot express."""
        wrong = {
            "--add-qkv-bias": shape.qkv_bias != self.qkv_bias,
            "--qk-layernorm": shape.qk_norm != self.qk_norm,
            "--multi-latent-attention": (shape.latent is not None) != self.latent,
            "--num-experts": (shape.experts is not None) != (self.experts_of is not None),
            "--kv-channels": not self.latent
            and not self.free_head_dim
            and shape.head_dim * shape.num_attention_heads != shape.hidden_size,
        }
        return [flag for flag, is_wrong in wrong.items() if is_wrong]

    def trunk(self, shape: Shape) -> Iterator[tuple[str, Layout]]:
        """Our key and the layout of theirs, of every tensor of the main model, in the order of the layers."""
        for key, layout in self.model.items():
            if key.startswith("embedding."):
                yield key, layout
        for layer in range(shape.num_layers):
            yield from self.block(
                "decoder.layers.{}.", 2 * layer, self.layer_prefix.format(layer), shape.is_dense(layer)
            )
        for key, layout in self.model.items():
            if not key.startswith("embedding.") and not (shape.tied and key.startswith("output_layer.")):
                yield key, layout

    def block(self, ours: str, index: int, theirs: str, dense: bool = False) -> Iterator[tuple[str, Layout]]:
        """One transformer block: our two layers from `index` on, whose prefix is `ours`, and their one. With experts
        where the architecture has some, unless it is a `dense` one."""
        for number, table in enumerate((self.attention, self.mlp if dense or not self.experts else self.experts)):
            for name, layout in table.items():
                yield ours.format(index + number) + name, prefixed(layout, theirs)

    def config(self, shape: Shape) -> dict[str, Any]:
        """config.json of the main model."""
        rope: dict[str, Any] = {"rope_theta": float(shape.rope_base), "rope_type": "default"}
        if shape.rope_factor is not None:
            rope |= {"rope_type": "linear", "factor": float(shape.rope_factor)}
        if shape.rope_scaling_factor is not None:
            rope |= {"rope_type": "llama3", "factor": float(shape.rope_scaling_factor), **LLAMA3}
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "num_hidden_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.ffn_hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_query_groups,
            **({"head_dim": shape.head_dim} if self.free_head_dim else {}),
            "vocab_size": shape.vocab_size,
            "hidden_act": "silu",
            "rms_norm_eps": shape.norm_eps,
            "rope_parameters": rope,
            "max_position_embeddings": shape.max_positions,
            "tie_word_embeddings": shape.tied,
            "dtype": shape.dtype,
            # Without these entries, transformers takes ids of its own and stops at one of them.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **({"layer_types": ["full_attention"] * shape.num_layers} if self.layer_types else {}),
            **self.extra_config(shape),
        }

    def shape(self, config: Any, padded_vocab_size: int, dtype: str, max_positions: int | None, where: str) -> Shape:
        """What transformers' configuration describes, without heads.

        Raises ValueError, naming the entry of config.json, for what Megatron's layers cannot compute.
        """
        rope = dict(config.rope_parameters or {})
        positions = max_positions or config.max_position_embeddings
        window = getattr(config, "sliding_window", None)
        refused = {
            "hidden_act": (config.hidden_act, config.hidden_act not in ("silu", "swish")),
            "attention_bias": (True, getattr(config, "attention_bias", False)),
            "mlp_bias": (True, getattr(config, "mlp_bias", False)),
            "rope_type": (rope.get("rope_type"), rope.get("rope_type", "default") not in self.rope_types),
            "partial_rotary_factor": (rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1.0) != 1.0),
            "rope_theta": (rope.get("rope_theta"), rope.get("rope_theta", 0.5) % 1 != 0),
            "factor": (rope.get("factor"), rope.get("rope_type") == "linear" and rope["factor"] % 1 != 0),
            "rope_parameters": (
                rope,
                rope.get("rope_type") == "llama3" and any(rope.get(name) != value for name, value in LLAMA3.items()),
            ),
            "layer_types": (
                getattr(config, "layer_types", None),
                set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"},
            ),
        }
        for name, (value, wrong) in refused.items():
            if wrong:
                raise ValueError(f"{where}: config.json has {name} {value!r}, which Megatron's layers cannot express.")
        fp8.block_size(getattr(config, "quantization_config", None), where)
        if window is not None and window < positions:
            raise ValueError(
                f"{where}: config.json has sliding_window {window}, shorter than its {positions} positions. Up to that "
                f"length it is full attention: give --max-position-embeddings {window}."
            )
        entries: dict[str, Any] = {
            "num_layers": config.num_hidden_layers,
            "num_heads": 0,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": padded_vocab_size,
            "norm_eps": config.rms_norm_eps,
            "rope_base": int(rope["rope_theta"]),
            "rope_factor": int(rope["factor"]) if rope.get("rope_type") == "linear" else None,
            "rope_scaling_factor": float(rope["factor"]) if rope.get("rope_type") == "llama3" else None,
            "max_positions": positions,
            "tied": config.tie_word_embeddings,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "dtype": dtype,
        }
        return Shape(**entries | self.extra_shape(config, where))
