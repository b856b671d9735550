"""The layers of the model: Megatron's own spec on Transformer Engine, or the same model of local modules.

Contract: `hybrid_stack_spec(config)` gives the `ModuleSpec` that `HybridModel` is built from. Both specs write the
same checkpoint keys, so that what was trained with one loads with the other. The local spec has attention (`*`),
dense MLP (`-`), mixture of experts (`E`) and multi-token prediction.

Deliberately absent from the local spec: the other layer types, context parallelism, packed sequences, sliding
windows and learned softmax offsets. Each is refused by name, with Transformer Engine as the remedy.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
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
            ("--context-parallel-size", config.context_parallel_size, 1),
            ("--window-size", config.window_size, None),
            ("--softmax-type", config.softmax_type, "vanilla"),
        ):
            if value != supported:
                raise ValueError(f"{flag} {value} needs Transformer Engine's attention: {REMEDY}, or leave it out.")
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
            attn_mask_type: in the place of the one of the layer; `no_mask` lets every query see every key.

        Returns: [sq, b, heads * d].
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError(f"Packed sequences and attention bias need Transformer Engine: {REMEDY}.")
        sq, sk = query.size(0), key.size(0)
        sees_all = (attn_mask_type or self.attn_mask_type) == AttnMaskType.no_mask or sq == 1
        visible, causal = None, False
        if attention_mask is not None:
            visible = ~attention_mask
        elif not sees_all and sq != sk:
            visible = torch.ones(sq, sk, dtype=torch.bool, device=query.device).tril(sk - sq)
        else:
            causal = not sees_all
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


class _Refused:
    """In the place of a layer type that there is no local module for."""

    def __init__(self, *args: Any, layer: str, **kwargs: Any) -> None:
        raise ValueError(
            f"--hybrid-layer-pattern holds {layer}, which needs Transformer Engine: {REMEDY}, or use '*' (attention), "
            "'-' (MLP) and 'E' (mixture of experts) alone."
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
            mla_layer=refused("'+' (multi-latent attention)"),
        ),
    )
