"""Where heads go in an export, and for which engine: a format each.

What a head computes is the same in all of them, `layer(eh_proj [enorm(embedding), hnorm(hidden)])` with its own final
norm behind it; the formats differ in names, in what they can express, and in which engine runs them as trained. An
engine that would run a model in another way, without a word, is no reason to export it for that engine: `refuse` says
so.

- `trunk`: the main model alone.
- `transformers`: the heads as further layers of the main model's own architecture; `generate(use_mtp=True)` of
  transformers >= 5.20. A folder that other programs read as the main model.
- `deepseek-v3`: DeepSeek-V3's format with dense layers and plain attention, the only one of which vLLM runs distinct
  heads.
- `mimo`: MiMo's, of one head, for SGLang. vLLM reads it too, but hands the head a hidden state before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.layouts import (
    ConcatenatedQKV,
    GroupedQKV,
    Layout,
    Same,
    SwappedHalves,
    Table,
    Vocabulary,
    ZeroBias,
    prefixed,
)
from megatron_mtpd.checkpoint.hf.shape import Shape

Pairs = Iterator[tuple[str, Layout]]
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Format:
    """`head_table` maps what a head has beside its layer; `{}` in `prefix` is the head, counted on from the last layer
    or, with `from_zero`, from 0."""

    name: str
    head_table: Table
    prefix: str
    config: Callable[[Architecture, Shape], dict[str, Any]]
    """Entries of config.json, on top of the architecture's own."""
    of_head: Callable[[Architecture, Shape, str, str], Pairs]
    """A head's further tensors, with our prefix and theirs."""
    of_trunk: Callable[[Architecture, Shape], Pairs]
    refuse: Callable[[Shape], str | None]
    """Why this format cannot hold a model; None where it can."""
    from_zero: bool = False

    def head_prefix(self, shape: Shape, head: int) -> str:
        """Their prefix of a head, counted from 0."""
        return self.prefix.format(head if self.from_zero else shape.num_layers + head)

    def head(self, architecture: Architecture, shape: Shape, head: int) -> Pairs:
        """Our key and the layout of theirs, of every tensor of a head."""
        ours, theirs = f"mtp.layers.{head}.", self.head_prefix(shape, head)
        for name, layout in self.head_table.items():
            yield ours + name, prefixed(layout, theirs)
        yield from self.of_head(architecture, shape, ours + "mtp_model_layer.layers.{}.", theirs)


def _block(architecture: Architecture, shape: Shape, ours: str, theirs: str) -> Pairs:
    return architecture.block(ours, 0, theirs)


def _trunk(architecture: Architecture, shape: Shape) -> Pairs:
    return architecture.trunk(shape)


def _nothing(architecture: Architecture, shape: Shape, ours: str, theirs: str) -> Pairs:
    return iter(())


def _needs_heads(shape: Shape) -> str | None:
    return None if shape.num_heads else "the checkpoint has no heads: use --format trunk"


HEAD: Table = {
    "enorm.weight": Same("enorm.weight"),
    "hnorm.weight": Same("hnorm.weight"),
    "eh_proj.weight": Same("eh_proj.weight"),
    "final_layernorm.weight": Same("shared_head.norm.weight"),
}


# transformers ---------------------------------------------------------------------------------------------------------


def _transformers_config(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    number = {"num_mtp_layers": shape.num_heads, "num_nextn_predict_layers": shape.num_heads}
    return number | ({"mtp_layer_types": ["full_attention"] * shape.num_heads} if architecture.layer_types else {})


# DeepSeek-V3 ----------------------------------------------------------------------------------------------------------


def _deepseek_config(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        # Dense layers: experts would start behind the last head.
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": shape.num_layers + shape.num_heads,
        "moe_intermediate_size": shape.ffn_hidden_size,
        # In fp16, vLLM divides what a dense layer adds by it; it is 2.5 where nothing is said.
        "routed_scaling_factor": 1.0,
        # Plain attention: vLLM takes widths of 0 for that.
        "kv_lora_rank": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": shape.head_dim,
        "head_dim": shape.head_dim,
        "num_nextn_predict_layers": shape.num_heads,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def _deepseek_trunk(architecture: Architecture, shape: Shape) -> Pairs:
    yield from architecture.trunk(shape)
    if shape.tied:
        yield EMBEDDING, Vocabulary("lm_head.weight")


def _deepseek_head(architecture: Architecture, shape: Shape, ours: str, theirs: str) -> Pairs:
    """Without the copies of embedding and output layer that DeepSeek's own files have in each: vLLM takes the main
    model's for all heads."""
    for key, layout in architecture.block(ours, 0, theirs):
        if isinstance(layout, GroupedQKV):
            layout = ConcatenatedQKV(theirs + "self_attn.qkv_proj.weight")
        yield key, layout


def _refuse_deepseek(shape: Shape) -> str | None:
    if shape.qkv_bias or shape.qk_norm:
        return "vLLM's DeepSeek-V3 has neither biases of query, key and value nor their norms, and would drop them"
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        return f"its attention heads are hidden size / heads wide, the model's {shape.head_dim}"
    if shape.rope_factor is not None:
        return "linearly scaled rotary positions are not tested in it"
    return _needs_heads(shape)


# MiMo -----------------------------------------------------------------------------------------------------------------


def _mimo_config(architecture: Architecture, shape: Shape) -> dict[str, Any]:
    return {  # Qwen2 in all but the name, and engines go by the name of the class alone
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "use_sliding_window": False,
    }


def _with_biases(architecture: Architecture, pairs: Pairs) -> Pairs:
    for key, layout in pairs:
        yield key, layout
        if isinstance(layout, GroupedQKV) and not architecture.qkv_bias:
            yield key, ZeroBias(tuple(name.replace(".weight", ".bias") for name in layout.names))  # pyright: ignore


def _mimo_trunk(architecture: Architecture, shape: Shape) -> Pairs:
    yield from _with_biases(architecture, architecture.trunk(shape))


def _mimo_head(architecture: Architecture, shape: Shape, ours: str, theirs: str) -> Pairs:
    yield from _with_biases(architecture, architecture.block(ours, 0, theirs))


def _refuse_mimo(shape: Shape) -> str | None:
    if shape.num_heads > 1:
        return f"it has one head, which engines then use for every depth, and the model has {shape.num_heads} heads"
    if shape.qk_norm:
        return "it has no norms of query and key"
    if shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        return f"its attention heads are hidden size / heads wide, the model's {shape.head_dim}"
    return _needs_heads(shape)


TRUNK = Format("trunk", {}, "", lambda a, s: {}, _nothing, _trunk, lambda shape: None)
TRANSFORMERS = Format("transformers", HEAD, "model.layers.{}.", _transformers_config, _block, _trunk, _needs_heads)
DEEPSEEK = Format(
    "deepseek-v3", HEAD, "model.layers.{}.", _deepseek_config, _deepseek_head, _deepseek_trunk, _refuse_deepseek
)
MIMO = Format(
    "mimo",
    {
        "enorm.weight": Same("token_layernorm.weight"),
        "hnorm.weight": Same("hidden_layernorm.weight"),
        "eh_proj.weight": SwappedHalves("input_proj.weight"),
        "final_layernorm.weight": Same("final_layernorm.weight"),
    },
    "model.mtp_layers.{}.",
    _mimo_config,
    _mimo_head,
    _mimo_trunk,
    _refuse_mimo,
    from_zero=True,
)
FORMATS = {form.name: form for form in (TRUNK, TRANSFORMERS, DEEPSEEK, MIMO)}
