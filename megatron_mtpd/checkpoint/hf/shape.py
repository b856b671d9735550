"""What a dense transformer is like: the numbers that both sides of a conversion need, in words of neither.

From them follow the names and sizes of all tensors of our checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = "*-"
"""A transformer block in Megatron's hybrid pattern: attention, then a dense MLP."""


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
    max_positions: int
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    dtype: str

    @property
    def pattern(self) -> str:
        return "/".join([BLOCK * self.num_layers, *[BLOCK] * self.num_heads])

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
            "linear_fc1.weight": (2 * self.ffn_hidden_size, hidden),
            "linear_fc2.weight": (hidden, self.ffn_hidden_size),
            "eh_proj.weight": (hidden, 2 * hidden),
        }
        return next((size for end, size in sizes.items() if key.endswith(end)), (hidden,))

    def linear_modules(self) -> Iterator[str]:
        """The linear layers of our checkpoint, beside whose weight Megatron keeps an extra state."""
        blocks = [("decoder.layers.", 2 * layer) for layer in range(self.num_layers)]
        blocks += [(f"mtp.layers.{head}.mtp_model_layer.layers.", 0) for head in range(self.num_heads)]
        for prefix, layer in blocks:
            yield from (f"{prefix}{layer}.self_attention.{name}" for name in ("linear_qkv", "linear_proj"))
            yield from (f"{prefix}{layer + 1}.mlp.{name}" for name in ("linear_fc1", "linear_fc2"))
        yield from (f"mtp.layers.{head}.eh_proj" for head in range(self.num_heads))
        yield "output_layer"
