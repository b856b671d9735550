"""Megatron's layers with a forward pass for decoding: the same parameters and keys, less work around the kernels.

A decoding step computes a few positions, and what Megatron does around its kernels for training (autograd functions,
offloading, fusion and recompute switches) then costs more than the kernels. Each class here inherits its parameters,
and replaces only `forward`, by the same mathematics; tests compare it with the training model. Attention keeps
Megatron's forward pass while no cache is attached.

Deliberately absent: dropout, gradients, and the options that `refuse` names. Experts run in Megatron's own modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mtpd.speculative.packed import PackedWeight


def refuse(config: TransformerConfig) -> None:
    """Raises ValueError for options of a model that decoding would get wrong."""
    for flag, value in (
        ("--attention-output-gate", config.attention_output_gate),
        ("--no-rope-freq", config.no_rope_freq),
        ("--multi-latent-attention", config.multi_latent_attention),
        ("--apply-residual-connection-post-layernorm", config.apply_residual_connection_post_layernorm),
    ):
        if value:
            raise ValueError(f"The checkpoint's model was trained with {flag}, which decoding does not support.")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the positions of a pass: `x * cos + x[..., swapped] * sin`, over the first d_rot channels.

    cos, sin: [s, b, d_rot] in the model's dtype, the sign of the rotation and yarn's scale in them.
    swapped: int64 [d_rot], the other channel of each pair.
    """

    cos: Tensor
    sin: Tensor
    swapped: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """[s, b, ..., d] -> the same, rotated."""
        size = self.swapped.numel()
        shape = (*self.cos.shape[:2], *[1] * (x.dim() - 3), size)
        turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
        cos, sin = self.cos.view(shape), self.sin.view(shape)
        out = torch.addcmul(turned * cos, turned.index_select(-1, self.swapped), sin)
        return out if rest is None else torch.cat([out, rest], -1)


class RotaryTable:
    """The rotary embedding of all positions up to a length, from Megatron's angles [length, 1, 1, d_rot].

    scale: yarn's factor of both parts. interleaved: channels 2i and 2i + 1 are a pair, instead of i and i + d_rot / 2.
    """

    def __init__(self, angles: Tensor, scale: float, interleaved: bool, dtype: torch.dtype) -> None:
        size, device = angles.shape[-1], angles.device
        channels = torch.arange(size, device=device)
        first = channels % 2 == 0 if interleaved else channels < size // 2
        step = 1 if interleaved else size // 2
        self.swapped = torch.where(first, channels + step, channels - step)
        self.cos = (angles[:, 0, 0].cos() * scale).to(dtype)
        self.sin = (angles[:, 0, 0].sin() * scale * torch.where(first, -1.0, 1.0)).to(dtype)

    def at(self, positions: Tensor) -> Rotary:
        """Of a window's positions, int64 [b, s]."""
        index = positions.t()
        return Rotary(self.cos[index], self.sin[index], self.swapped)


def stack(layers: Iterable[torch.nn.Module], hidden: Tensor, rotary: Rotary | None) -> Tensor:
    """[s, b, h] through the layers of a HybridStack, without its last norm."""
    for layer in layers:
        hidden = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)  # a cache has its own mask
        if isinstance(hidden, tuple):
            hidden = hidden[0]
    return hidden


def head(layer: Any, hidden: Tensor, embedded: Tensor, rotary: Rotary | None) -> Tensor:
    """A head, a MultiTokenPredictionLayer: hidden states of the depth before and the tokens' embeddings, both
    [s, b, h], to its own hidden states after its final norm."""
    both, _ = layer.eh_proj(torch.cat([layer.enorm(embedded), layer.hnorm(hidden)], -1))
    if layer.tp_group is not None and layer.tp_group.size() > 1:
        both = gather_from_tensor_model_parallel_region(both, group=layer.tp_group)
    return layer.final_layernorm(stack(layer.mtp_model_layer.layers, both, rotary))


class ColumnLinear(ColumnParallelLinear):
    """ColumnParallelLinear without gradients; its output stays sharded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packed = PackedWeight()

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.skip_bias_add:
            return self.packed.linear(input_, self.weight), self.bias
        return self.packed.linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """RowParallelLinear without gradients; its input is sharded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.packed = PackedWeight()

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.packed.linear(input_, self.weight)
        if self.tp_group is not None and self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


class DecodingAttention(SelfAttention):
    """Self-attention whose core attention has a cache; `rotary_pos_emb` is then a `Rotary`."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """[s, b, h] -> [s, b, h] and a bias to be added, or None."""
        if self.core_attention.cache is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        rotary: Rotary | None = kwargs.get("rotary_pos_emb")
        if self._together and rotary is not None:
            query, key, value = self._rotated_together(hidden_states, rotary)
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
            if rotary is not None:
                query, key = rotary.apply(query), rotary.apply(key)
        return self.linear_proj(self.core_attention(query, key, value, attention_mask))

    @property
    def _together(self) -> bool:
        """Whether queries and keys need nothing but rotation, so that one pass over both does."""
        normed = self.q_layernorm is not None or self.k_layernorm is not None
        return not normed and self.num_query_groups_per_partition * self.world_size == self.config.num_query_groups

    def _rotated_together(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> queries [s, b, heads, d], keys and values [s, b, groups, d]. A group lies as q .. q k v."""
        mixed, bias = self.linear_qkv(hidden_states)
        s, b, groups = *mixed.shape[:2], self.num_query_groups_per_partition
        mixed = (mixed if bias is None else mixed + bias).view(s, b, groups, -1, self.hidden_size_per_attention_head)
        rotated = rotary.apply(mixed[..., :-1, :])
        return rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], mixed[..., -1, :]


def _add(residual: Tensor, output_with_bias: tuple[Tensor, Tensor | None]) -> Tensor:
    output, bias = output_with_bias
    return residual + output if bias is None else residual + (output + bias)


class AttentionLayer(TransformerLayer):
    """A layer of attention alone; `mlp` is an identity."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self.self_attention.core_attention.cache is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        assert isinstance(self.mlp, IdentityOp), "the hybrid stack has the MLP in a layer of its own"
        normed = self.input_layernorm(hidden_states)
        rotary = kwargs.get("rotary_pos_emb")
        return _add(hidden_states, self.self_attention(normed, attention_mask, rotary_pos_emb=rotary)), None


class DenseLayer(MLPLayer):
    """A layer of a dense MLP alone; attention is an identity."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return _add(hidden_states, self.mlp(self.pre_mlp_layernorm(hidden_states))), None
