"""The layers of the model: Megatron's own spec on Transformer Engine, or the same model of local modules.

Contract: `hybrid_stack_spec(config)` gives the `ModuleSpec` that `HybridModel` is built from. Both specs write the
same checkpoint keys, so that what was trained with one loads with the other. The local spec has attention (`*`),
multi-latent attention (`+`), dense MLP (`-`), mixture of experts (`E`) and multi-token prediction.

Deliberately absent from the local spec: the other layer types, packed sequences, sliding windows and learned softmax
offsets. Each is refused by name, with Transformer Engine as the remedy. Context parallelism is exact and not fast:
every rank gathers the keys and values of the others.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_mtpd import platform

REMEDY = "install Transformer Engine on a GPU machine (extra megatron-mtpd[te])"
NORMS = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


def local_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """torch's RMSNorm or LayerNorm over the last dimension, which may run under sequence parallelism.

    Raises ValueError for --normalization and --apply-layernorm-1p that torch does not have.
    """
    if config.normalization not in NORMS:
        raise ValueError(f"--normalization is {config.normalization}: choose one of {', '.join(NORMS)}.")
    if config.layernorm_zero_centered_gamma:
        raise ValueError(f"--apply-layernorm-1p needs Transformer Engine: {REMEDY}, or leave the flag out.")
    norm = NORMS[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        # Each rank sees a part of the sequence; Megatron sums the gradients of what carries this mark.
        parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
    return norm


class SDPAttention(MegatronModule):
    """Core attention by `torch.nn.functional.scaled_dot_product_attention`: memory linear in the sequence length.

    The same function as Megatron's DotProductAttention, whose scores [b, heads, s, s] it never stores. The flags
    --apply-query-key-layer-scaling and --attention-softmax-in-fp32 change nothing here: the first scales down and
    up again what overflows in half precision, and the softmax inside is always fp32.

    Raises ValueError for what it cannot do, naming the flag.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        for flag, value, supported in (
            ("--window-size", config.window_size, None),
            ("--softmax-type", config.softmax_type, "vanilla"),
        ):
            if value != supported:
                raise ValueError(f"{flag} {value} needs Transformer Engine's attention: {REMEDY}, or leave it out.")
        self.cp_group = getattr(pg_collection, "cp", None) if config.context_parallel_size > 1 else None
        if config.context_parallel_size > 1 and self.cp_group is None:
            self.cp_group = parallel_state.get_context_parallel_group()
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of the heads of this tensor-parallel rank.

        Args:
            query: [sq, b, heads, d].
            key, value: [sk, b, groups, d]; every group serves heads / groups heads.
            attention_mask: bool, broadcastable to [b, heads, sq, sk], True where a position must *not* be seen. It
                stands alone: it has to hold the causal part too. None: causal, the last query at the last key.
                Under context parallelism sq is this rank's part of the sequence, sk all of it.
            attn_mask_type: in the place of the one of the layer; `no_mask` lets every query see every key.

        Returns: [sq, b, heads * d].
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(f"Packed sequences and attention bias need Transformer Engine: {REMEDY}.")
        positions = None
        if self.cp_group is not None:
            positions = _positions(query.size(0), self.cp_group).to(query.device)
            key, value = _Gathered.apply(torch.stack([key, value]), self.cp_group)
        sq, sk = query.size(0), key.size(0)
        sees_all = (attn_mask_type or self.attn_mask_type) == AttnMaskType.no_mask or sq == 1
        visible, causal = None, False
        if attention_mask is not None:
            visible = ~attention_mask
        elif not sees_all and positions is not None:
            visible = torch.arange(sk, device=query.device) <= positions.unsqueeze(1)
        elif not sees_all and sq != sk:
            visible = torch.ones(sq, sk, dtype=torch.bool, device=query.device).tril(sk - sq)
        else:
            causal = not sees_all
        if visible is not None and query.size(2) != key.size(2):
            # On a GPU the kernels whose memory is linear take a mask, or groups, but not both.
            key, value = (x.repeat_interleave(query.size(2) // x.size(2), dim=2) for x in (key, value))
        dropout = self.dropout if self.training else 0.0
        # Under sequence parallelism the ranks already draw differently, as in Megatron's own module.
        forked = dropout > 0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if forked else nullcontext():
            out = scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return out.permute(2, 0, 1, 3).flatten(2)


class LatentAttention(SDPAttention):
    """Core attention of multi-latent attention, whose values are of another width than its queries and keys.

    The widths that Megatron passes are those of the tensors, which show them. Raises ValueError under context
    parallelism.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any
    ) -> None:
        if config.context_parallel_size > 1:
            raise ValueError(
                f"--context-parallel-size {config.context_parallel_size} with --multi-latent-attention needs "
                f"Transformer Engine's attention: {REMEDY}, or leave it out."
            )
        super().__init__(config, *args, **kwargs)


def _positions(length: int, cp_group: Any) -> Tensor:
    """Places in the sequence of this rank's two pieces, of 2 C, which Megatron deals as r and 2C - 1 - r. [length]."""
    ranks, rank, piece = cp_group.size(), cp_group.rank(), length // 2
    first = torch.arange(piece)
    return torch.cat([first + rank * piece, first + (2 * ranks - 1 - rank) * piece])


class _Gathered(torch.autograd.Function):
    """[2, s / C, ...] of every context-parallel rank -> [2, s, ...] in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cp_group: Any) -> Tensor:
        ctx.cp_group = cp_group
        everyone = x.new_empty(cp_group.size() * len(x), *x.shape[1:])
        torch.distributed.all_gather_into_tensor(everyone, x.contiguous(), group=cp_group)
        pieces = everyone.unflatten(0, (-1, len(x))).unflatten(2, (2, -1))  # [C, 2, piece, s / 2C, ...]
        early, late = pieces[:, :, 0], pieces[:, :, 1].flip(0)
        return torch.cat([early, late]).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ranks = ctx.cp_group.size()
        pieces = grad.unflatten(1, (2 * ranks, -1)).transpose(0, 1)  # [2C, 2, s / 2C, ...]
        of_ranks = torch.stack([pieces[:ranks], pieces[ranks:].flip(0)], 2).flatten(2, 3)
        mine = of_ranks.new_empty(of_ranks.shape[1:])
        torch.distributed.reduce_scatter_tensor(mine, of_ranks.flatten(0, 1).contiguous(), group=ctx.cp_group)
        return mine, None


class _Refused:
    """In the place of a layer type that there is no local module for."""

    def __init__(self, *args: Any, layer: str, **kwargs: Any) -> None:
        raise ValueError(
            f"--hybrid-layer-pattern holds {layer}, which needs Transformer Engine: {REMEDY}, or use '*' (attention), "
            "'+' (multi-latent attention), '-' (MLP) and 'E' (mixture of experts) alone."
        )


def hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of the layers of a `HybridModel`, after `config.transformer_impl` and what this machine has.

    With --transformer-impl transformer_engine (Megatron's default) where Transformer Engine and a GPU are there:
    Megatron's own. Otherwise the local one; its last norm is then put into Megatron's stack, for the whole process.
    """
    if config.transformer_impl != "local" and platform.uses_transformer_engine():
        return transformer_engine_spec
    platform.replace_norm(local_norm)
    return local_spec(config)


def local_spec(config: TransformerConfig) -> ModuleSpec:
    """The layers as local modules, their norms apart; the maps of keys name those as Transformer Engine fuses them."""

    def refused(layer: str) -> ModuleSpec:
        return ModuleSpec(module=_Refused, params={"layer": layer})

    qk_norm = local_norm if config.qk_layernorm else None
    attention = TransformerLayerSubmodules(
        input_layernorm=local_norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=SDPAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    inner = ("q", "q_down", "q_up", "kv_down", "kv_up")
    latent = TransformerLayerSubmodules(
        input_layernorm=local_norm,
        self_attention=ModuleSpec(
            module=MLASelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                **dict.fromkeys((f"linear_{name}_proj" for name in inner), ColumnParallelLinear),
                core_attention=LatentAttention,
                linear_proj=RowParallelLinear,
                q_layernorm=qk_norm or IdentityOp,
                kv_layernorm=qk_norm or IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")
        },
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=local_norm,
        mlp=partial(MLP.as_mlp_submodule, submodules=linears),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=local_norm,
        # Only whether there are experts matters here; how many is in the config.
        mlp=get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts or 1, moe_grouped_gemm=False),
        mlp_bda=get_bias_dropout_add,
    )
    head = MultiTokenPredictionLayerSubmodules(
        enorm=local_norm, hnorm=local_norm, eh_proj=ColumnParallelLinear, layer_norm=local_norm
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(
                    layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=head)]
                ),
            ),
            mamba_layer=refused("'M' (Mamba)"),
            gdn_layer=refused("'G' (gated delta net)"),
            dsa_layer=refused("'D' (sparse attention)"),
            mla_layer=ModuleSpec(module=TransformerLayer, submodules=latent),
        ),
    )
