"""Attention with a cache of keys and values, and the spec of the layers that decode.

Contract: `cached_spec(config)` is the local spec with `CachedAttention` as its core attention, and with the modules of
`layers`; parameters and checkpoint keys stay the same. While a `KVCache` is attached to the attention, the keys and
values of a pass are stored at their positions, and its queries see what the mask leaves visible of everything stored.
Without one it is causal attention, as in training.

Deliberately absent: paging, and quantised or sliding-window caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_mtpd import platform
from megatron_mtpd.specs import SDPAttention, local_norm, local_spec
from megatron_mtpd.speculative import layers


@dataclass(frozen=True)
class Window:
    """The positions that one pass computes.

    Attributes:
        slots: the rows of the caches, one for each row of the batch.
        rows: int64 [b, 1], 0 .. b - 1.
        positions: int64 [b, s]. Each row increases; what is beyond its end repeats the cache's last position, which is
            never visible.
        visible: number of positions, from the first, that any query of the pass may see; None: every row starts at
            position 0, so that the pass's own keys are all that there is.
        mask: bool [b, 1, s, visible], True where a key is not to be seen; None with `visible` None, and where
            one position alone sees all of it.
    """

    slots: slice
    rows: Tensor
    positions: Tensor
    visible: int | None
    mask: Tensor | None
    _biases: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, repeats: int, dtype: torch.dtype) -> Tensor:
        """The mask as what is added to scores, [b, 1, repeats * s, visible]. Made once for all layers of a pass."""
        assert self.mask is not None, "where everything is seen there is nothing to add"
        if (repeats, dtype) not in self._biases:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._biases[repeats, dtype] = bias.masked_fill_(self.mask, float("-inf")).repeat(1, 1, repeats, 1)
        return self._biases[repeats, dtype]


class KVCache:
    """Keys and values of one attention layer, [slots, capacity, groups, d] each, made at the first pass.

    What has to be forgotten needs no erasing: a later pass writes over it, and until then no mask shows it.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self._shape = (slots, capacity)
        self.window: Window | None = None
        self.keys = self.values = torch.empty(0)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [s, b, groups, d] of the current window, and return what its queries may see: [t, b, groups, d]."""
        if not self.keys.numel():  # zeros, not empty: a masked NaN times a weight of 0 would still be NaN
            self.keys = key.new_zeros(*self._shape, *key.shape[2:])
            self.values = torch.zeros_like(self.keys)
        window = self.window
        assert window is not None, "a pass sets its window first"
        for stored, new in ((self.keys, key), (self.values, value)):
            stored[window.slots].index_put_((window.rows, window.positions), new.transpose(0, 1))
        if window.visible is None:
            return key, value
        seen = (window.slots, slice(window.visible))
        return self.keys[seen].transpose(0, 1), self.values[seen].transpose(0, 1)

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        if self.keys.numel():
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]


class CachedAttention(SDPAttention):
    """SDPAttention whose keys and values may come from a `KVCache`."""

    cache: KVCache | None = None

    def attach(self, cache: KVCache | None) -> None:
        """Use a cache from now on, or none."""
        self.__dict__["cache"] = cache  # a plain attribute; Module's own way costs as much as a small kernel

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As SDPAttention; with a cache, what its window leaves visible counts, and `attention_mask` does not."""
        if self.cache is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        key, value = self.cache.extend(key, value)
        window, shared = self.cache.window, query.size(2) // key.size(2)
        if window is None or window.mask is None:
            return super().forward(query, key, value, None)
        # A group's heads as more positions of one head: a copy of the few queries, not of the cache for each head.
        s, b, groups, d = query.size(0), *key.shape[1:]
        query = query.unflatten(2, (groups, shared)).permute(1, 2, 3, 0, 4).flatten(2, 3)
        keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        bias = window.bias(shared, query.dtype)
        out = scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=self.softmax_scale)
        return out.view(b, groups, shared, s, d).permute(3, 0, 1, 2, 4).flatten(2)


def cached_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of the layers of a `HybridModel` that can decode; its last norm is put in place, as in training.

    Raises ValueError for a model that decoding does not support.
    """
    layers.refuse(config)
    platform.replace_norm(local_norm)
    spec = local_spec(config)
    stack: Any = spec.submodules
    attention = stack.attention_layer.submodules.self_attention
    stack.attention_layer.module = layers.AttentionLayer
    attention.module = layers.DecodingAttention
    attention.submodules.linear_qkv = layers.ColumnLinear
    attention.submodules.linear_proj = layers.RowLinear
    attention.submodules.core_attention = CachedAttention
    stack.mlp_layer.module = layers.DenseLayer
    linears = MLPSubmodules(linear_fc1=layers.ColumnLinear, linear_fc2=layers.RowLinear)
    stack.mlp_layer.submodules.mlp = partial(MLP.as_mlp_submodule, submodules=linears)
    for head in stack.mtp_block_spec.submodules.layer_specs:
        head.submodules.eh_proj = layers.ColumnLinear
    return spec
