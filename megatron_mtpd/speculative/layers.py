"""A Megatron model's layers as decoding runs them: its parameters, and as little as can be around the kernels.

A decoding step computes a few positions, and what Megatron's modules do around their kernels for training (autograd
functions, offloading, fusion and recompute switches, hooks) then costs as much as the kernels. `Stack` and `Head` read
the modules once, hold on to their parameters, and do the same mathematics; tests compare them with the model's own
forward pass.

Deliberately absent: dropout, gradients, and the options that `refuse` names. Experts run in Megatron's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mtpd.speculative.attention import KVCache, Window, attend
from megatron_mtpd.speculative.packed import shared_packed


def refuse(config: TransformerConfig) -> None:
    """Raises ValueError for options of a model that decoding would get wrong."""
    is_half = config.params_dtype != torch.float32
    for flag, value in (
        ("--attention-output-gate", config.attention_output_gate),
        ("--no-rope-freq", config.no_rope_freq),
        ("--multi-latent-attention", config.multi_latent_attention),
        ("--apply-residual-connection-post-layernorm", config.apply_residual_connection_post_layernorm),
        ("--fp32-residual-connection in half precision", config.fp32_residual_connection and is_half),
    ):
        if value:
            raise ValueError(f"The checkpoint's model was trained with {flag}, which decoding does not support.")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the positions of a pass: `x * cos + x[..., swapped] * sin`, over the first d_rot channels.

    cos, sin: [s, b, 1, 1, d_rot] in the model's dtype, the sign of the rotation and yarn's scale in them.
    swapped: int64 [d_rot], the other channel of each pair.
    """

    cos: Tensor
    sin: Tensor
    swapped: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """[s, b, groups, heads, d] -> the same, rotated."""
        size = self.swapped.numel()
        turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
        out = torch.addcmul(turned * self.cos, turned.index_select(-1, self.swapped), self.sin)
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
        self.cos = (angles.cos() * scale).to(dtype)
        self.sin = (angles.sin() * scale * torch.where(first, -1.0, 1.0)).to(dtype)

    def at(self, positions: Tensor) -> Rotary:
        """Of a window's positions, int64 [b, s]."""
        index = positions.t()
        return Rotary(self.cos[index], self.sin[index], self.swapped)


class Part:
    """A module's parameters as a function. `watch`, where it is set, is shown each input."""

    watch: Callable[[Tensor], object] | None = None

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


class Norm(Part):
    """[..., h] -> [..., h]."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._forward = module.forward
        if isinstance(module, torch.nn.RMSNorm) and module.weight.dtype == torch.float32 and module.weight.is_cpu:
            self._forward = partial(_rms_norm, module.weight, torch.tensor(module.eps))

    def __call__(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        return self._forward(x)  # without what Module.__call__ does around it


def _rms_norm(weight: Tensor, eps: Tensor, x: Tensor) -> Tensor:
    """torch's `rms_norm` in fp32, which on a CPU is twice as many kernels: of a few rows, a twentieth of a step."""
    length = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
    return (x * torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(weight)


class Linear(Part):
    """[..., in] -> [..., out] by a ColumnParallelLinear, whose output stays sharded, or a RowParallelLinear, whose
    outputs are summed. A bias is added."""

    def __init__(self, module: Any) -> None:
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            raise ValueError(
                f"The model has a {type(module).__name__}: decoding needs one built by speculative.loading."
            )
        super().__init__(module)
        self._weight, self._bias, self._packed = module.weight, module.bias, shared_packed(module.weight)
        group = module.tp_group if isinstance(module, RowParallelLinear) else None
        self._sum_group = group if group is not None and group.size() > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x)
        if self._sum_group is None:
            return self._packed.linear(x, self._weight, self._bias)
        output = self._packed.linear(x, self._weight)
        dist.all_reduce(output, group=self._sum_group)
        return output if self._bias is None else output + self._bias


class Attention:
    """Residual self-attention of a TransformerLayer: [s, b, h] -> [s, b, h]; keys and values go to the cache."""

    def __init__(self, layer: Any) -> None:
        attention: SelfAttention = layer.self_attention
        self._qkv, self._proj = Linear(attention.linear_qkv), Linear(attention.linear_proj)
        self._norm = Norm(layer.input_layernorm)
        self._q_norm = Norm(attention.q_layernorm) if attention.q_layernorm is not None else None
        self._k_norm = Norm(attention.k_layernorm) if attention.k_layernorm is not None else None
        groups: int = attention.num_query_groups_per_partition
        self._shape = (groups, -1, attention.hidden_size_per_attention_head)
        self._whole = attention.core_attention.forward  # of a pass that begins its sequences
        self._scale: float = attention.core_attention.softmax_scale
        # A group over several ranks: Megatron gathers and cuts.
        is_cut = groups * attention.world_size != attention.config.num_query_groups
        self._split_by_megatron = attention.get_query_key_value_tensors if is_cut else None

    def __call__(self, hidden: Tensor, rotary: Rotary | None, cache: KVCache, window: Window) -> Tensor:
        query, key, value = self._query_key_value(self._norm(hidden), rotary)
        cache.store(window, key, value)
        if window.visible is None:
            return hidden + self._proj(self._whole(query.flatten(2, 3), key, value, None))
        return hidden + self._proj(attend(query, cache, window, self._scale))

    def _query_key_value(self, normed: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, h] -> queries [s, b, groups, heads of a group, d], keys and values [s, b, groups, d]."""
        if self._split_by_megatron is not None:
            query, key, value = self._split_by_megatron(normed)
            query, key = query.unflatten(2, (key.shape[2], -1)), key.unsqueeze(3)
            if rotary is not None:
                query, key = rotary.apply(query), rotary.apply(key)
            return query, key.squeeze(3), value
        mixed = self._qkv(normed).view(*normed.shape[:2], *self._shape)  # a group lies as q .. q k v
        both = mixed[..., :-1, :]
        if self._q_norm is not None and self._k_norm is not None:
            both = torch.cat([self._q_norm(both[..., :-1, :]), self._k_norm(both[..., -1:, :])], -2)
        if rotary is not None:
            both = rotary.apply(both)
        return both[..., :-1, :], both[..., -1, :], mixed[..., -1, :]


class Dense:
    """Residual MLP of a layer: [s, b, h] -> [s, b, h]."""

    def __init__(self, layer: Any) -> None:
        self._fc1, self._fc2 = Linear(layer.mlp.linear_fc1), Linear(layer.mlp.linear_fc2)
        self._norm = Norm(layer.pre_mlp_layernorm)
        config: TransformerConfig = layer.config
        self._gated, self._activation = config.gated_linear_unit, config.activation_func
        self._limit, self._offset = config.activation_func_clamp_value, config.glu_linear_offset

    def __call__(self, hidden: Tensor) -> Tensor:
        inner = self._fc1(self._norm(hidden))
        return hidden + self._fc2(self._gate(inner) if self._gated else self._activation(inner))

    def _gate(self, inner: Tensor) -> Tensor:
        gate, value = inner.chunk(2, -1)
        if self._limit is not None:
            gate, value = gate.clamp(max=self._limit), value.clamp(-self._limit, self._limit)
        return self._activation(gate) * (value + self._offset if self._offset else value)


class Stack:
    """Layers of a HybridStack and the norm behind them: with the decoder's, the main model behind its embedding."""

    def __init__(self, layers: Iterable[Any], final_norm: torch.nn.Module) -> None:
        self._layers: list[Any] = []
        for layer in layers:
            if isinstance(getattr(layer, "self_attention", None), SelfAttention):
                self._layers.append(Attention(layer))
            elif isinstance(getattr(layer, "mlp", None), MLP):
                self._layers.append(Dense(layer))
            elif isinstance(getattr(layer, "mlp", None), MoELayer):
                self._layers.append(_Experts(layer))
            else:
                raise ValueError(f"The model has a {type(layer).__name__}, which decoding does not support.")
        self._final_norm = Norm(final_norm)
        self.num_caches = sum(isinstance(layer, Attention) for layer in self._layers)

    @property
    def parts(self) -> dict[torch.nn.Module, Part]:
        """All parts, by their modules."""
        found = [value for owner in (self, *self._layers) for value in vars(owner).values()]
        return {part.module: part for part in found if isinstance(part, Part)}

    def __call__(self, hidden: Tensor, rotary: Rotary | None, caches: Sequence[KVCache], window: Window) -> Tensor:
        """[s, b, h] -> [s, b, h]. `caches`: one for each attention layer."""
        remaining = iter(caches)
        for layer in self._layers:
            if isinstance(layer, Attention):
                hidden = layer(hidden, rotary, next(remaining), window)
            else:
                hidden = layer(hidden)
        return self._final_norm(hidden)


class _Experts:
    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self._layer(hidden, attention_mask=None)
        return output[0] if isinstance(output, tuple) else output


class Head(Stack):
    """A head, from a MultiTokenPredictionLayer: what `combined` gives goes through its layers and norm."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.mtp_model_layer.layers, layer.final_layernorm)
        self._enorm, self._hnorm, self._eh_proj = Norm(layer.enorm), Norm(layer.hnorm), Linear(layer.eh_proj)
        self._tp_group = layer.tp_group if layer.tp_group is not None and layer.tp_group.size() > 1 else None

    def combined(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Hidden states of the depth before and the tokens' embeddings, both [s, b, h] -> what the layers take."""
        projected = self._eh_proj(torch.cat([self._enorm(embedded), self._hnorm(hidden)], -1))
        if self._tp_group is not None:
            projected = gather_from_tensor_model_parallel_region(projected, group=self._tp_group)
        return projected
