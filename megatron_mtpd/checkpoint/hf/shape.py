"""What a transformer is like: the numbers that both sides of a conversion need, in words of neither.

From them follow the names and sizes of all tensors of our checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

EXPERT_BIAS = "router.expert_bias"


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched by YaRN, from 4,096 positions, with the published ramp from 32 to 1 rotations."""

    factor: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention: queries, and keys with values, go through a bottleneck with a norm in it."""

    query_rank: int
    key_value_rank: int
    head_dim: int
    """Channels of a query and of a key that carry no position."""
    rotary_dim: int
    """Those that do; of a key, all heads share them."""
    value_dim: int
    yarn: Yarn | None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in all blocks but the first, routed by sigmoids with a bias for the choice alone."""

    dense_layers: int
    """Blocks before the first mixture, whose MLP is dense."""
    count: int
    top_k: int
    ffn_hidden_size: int
    shared: int
    """Experts, of the same size, that every token takes."""
    groups: tuple[int, int] | None
    """Of how many groups of experts a token may take how many; None: any expert."""
    scale: float
    """Of the weights of the chosen experts, which sum to 1 before."""


@dataclass(frozen=True)
class Shape:
    """`num_layers` are transformer blocks, two of Megatron's layers each; `dtype` is named as in torch."""

    num_layers: int
    num_heads: int
    """Multi-token prediction heads."""
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding on the other side."""
    padded_vocab_size: int
    """Rows in the checkpoint."""
    norm_eps: float
    rope_base: int
    rope_factor: int | None
    """Positions are divided by it (linear scaling); None: they are not."""
    rope_scaling_factor: float | None
    """Low frequencies are divided by it (Llama 3's scaling); None: they are not."""
    max_positions: int
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    dtype: str
    latent: Latent | None = None
    """Multi-latent attention; None: plain attention."""
    experts: Experts | None = None
    """None: dense blocks alone."""

    def is_dense(self, layer: int) -> bool:
        """Whether the MLP of a block of the main model is dense; block `num_layers` stands for those of the heads."""
        return self.experts is None or layer < self.experts.dense_layers

    def block(self, layer: int) -> str:
        """A block in Megatron's hybrid pattern: attention, then an MLP or experts."""
        return ("+" if self.latent else "*") + ("-" if self.is_dense(layer) else "E")

    @property
    def pattern(self) -> str:
        main = "".join(map(self.block, range(self.num_layers)))
        return "/".join([main, *[self.block(self.num_layers)] * self.num_heads])

    def dtype_of(self, key: str) -> str:
        """Of a tensor of our checkpoint: the bias of a router is fp32 in any model."""
        return "float32" if key.endswith(EXPERT_BIAS) else self.dtype

    def size_of(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor of our checkpoint."""
        hidden, attention = self.hidden_size, self.num_attention_heads * self.head_dim
        qkv = attention + 2 * self.num_query_groups * self.head_dim
        sizes = {
            "word_embeddings.weight": (self.padded_vocab_size, hidden),
            "output_layer.weight": (self.padded_vocab_size, hidden),
            "linear_qkv.weight": (qkv, hidden),
            "linear_qkv.bias": (qkv,),
            "linear_proj.weight": (hidden, attention),
            "q_layernorm.weight": (self.head_dim,),
            "k_layernorm.weight": (self.head_dim,),
            "mlp.linear_fc1.weight": (2 * self.ffn_hidden_size, hidden),
            "mlp.linear_fc2.weight": (hidden, self.ffn_hidden_size),
            "eh_proj.weight": (hidden, 2 * hidden),
        }
        if latent := self.latent:
            heads, query = self.num_attention_heads, latent.head_dim + latent.rotary_dim
            sizes |= {
                "linear_q_down_proj.weight": (latent.query_rank, hidden),
                "linear_q_up_proj.layer_norm_weight": (latent.query_rank,),
                "linear_q_up_proj.weight": (heads * query, latent.query_rank),
                "linear_kv_down_proj.weight": (latent.key_value_rank + latent.rotary_dim, hidden),
                "linear_kv_up_proj.layer_norm_weight": (latent.key_value_rank,),
                "linear_kv_up_proj.weight": (heads * (latent.head_dim + latent.value_dim), latent.key_value_rank),
                "linear_proj.weight": (hidden, heads * latent.value_dim),
            }
        if experts := self.experts:
            shared = experts.shared * experts.ffn_hidden_size
            sizes |= {
                "router.weight": (experts.count, hidden),
                EXPERT_BIAS: (experts.count,),
                "mlp.experts.experts.linear_fc1.weight": (experts.count, 2 * experts.ffn_hidden_size, hidden),
                "mlp.experts.experts.linear_fc2.weight": (experts.count, hidden, experts.ffn_hidden_size),
                "shared_experts.linear_fc1.weight": (2 * shared, hidden),
                "shared_experts.linear_fc2.weight": (hidden, shared),
            }
        return next((size for end, size in sizes.items() if key.endswith(end)), (hidden,))

    def linear_modules(self) -> Iterator[str]:
        """The linear layers of our checkpoint, beside whose weight Megatron keeps an extra state."""
        blocks = [("decoder.layers.", 2 * layer, layer) for layer in range(self.num_layers)]
        blocks += [(f"mtp.layers.{head}.mtp_model_layer.layers.", 0, self.num_layers) for head in range(self.num_heads)]
        inner = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj") if self.latent else ("qkv",)
        for prefix, index, layer in blocks:
            yield from (f"{prefix}{index}.self_attention.linear_{name}" for name in (*inner, "proj"))
            for mlp in ("mlp",) if self.is_dense(layer) else ("mlp.experts.experts", "mlp.shared_experts"):
                yield from (f"{prefix}{index + 1}.{mlp}.{name}" for name in ("linear_fc1", "linear_fc2"))
        yield from (f"mtp.layers.{head}.eh_proj" for head in range(self.num_heads))
        yield "output_layer"

    def copies_of(self, module: str) -> int:
        """How many extra states a linear layer of our checkpoint has: one for each expert."""
        return self.experts.count if self.experts and ".experts.experts." in module else 1
