"""The toy that the distributed tests train: its configuration, its weights and its data.

All are functions of `Toy` alone, so that every layout computes slices of the same thing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.training.models.hybrid import HybridModelConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.model import MTPDModelConfig  # noqa: E402
from megatron_mtpd.specs import hybrid_stack_spec  # noqa: E402

VOCABULARY, SEQUENCE, SAMPLES, BLOCKS, HEADS, EOD = 96, 16, 4, 4, 2, 7


@dataclass(frozen=True)
class Layout:
    """How the model and the batch are spread; `stages`: blocks of each pipeline stage, one number without pipeline."""

    tp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    stages: tuple[int, ...] = (BLOCKS,)
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False  # reductions and gathers of the data-parallel ranks with computation

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp * len(self.stages)


@dataclass(frozen=True)
class Toy:
    """What is trained on what. Nothing in here may depend on the layout."""

    mtpd: MTPDConfig = field(default_factory=lambda: MTPDConfig.as_published(top_n=10))
    micro_batch_size: int = 2
    experts: int = 0
    tied: bool = False
    documents: bool = False  # end-of-document tokens inside, with masks reset there and their loss masked
    first_document: int = 0  # not 0: no loss on the first document of each sample, whose text depends on the number
    masked: bool = False  # random loss masks, none in one sample and everything in another
    per_token: bool = False
    recompute: str | None = None
    bf16: bool = False
    optimizer_steps: int = 0  # 0: stop at the gradients
    clip: float = 0.0
    megatron: bool = False  # Megatron's own model and MTP loss, forward step of its own
    options: dict[str, Any] = field(default_factory=dict)  # other fields of TransformerConfig
    heads: int | None = None  # None: HEADS
    sequence: int = SEQUENCE
    nudge: float = 0.0  # move the heads' weights so far along a fixed direction


_RECOMPUTE: dict[str | None, dict[str, Any]] = {
    None: {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}
_EXPERTS = {
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}


def model_config(layout: Layout, toy: Toy) -> HybridModelConfig:
    """The configuration of the toy in the layout."""
    block = "*E" if toy.experts else "*-"
    heads = toy.heads or HEADS
    pattern = "|".join(block * n for n in layout.stages) + ("/" + block) * heads
    dtype = torch.bfloat16 if toy.bf16 else torch.float32
    options: dict[str, Any] = {
        "num_layers": len(block) * sum(layout.stages),
        "mtp_num_layers": heads,
        "mtp_loss_scaling_factor": 0.3,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "bf16": toy.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": len(layout.stages),
        "expert_model_parallel_size": layout.ep,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sequence_parallel,
        "calculate_per_token_loss": toy.per_token,
    }
    if toy.experts:
        options |= _EXPERTS | {"num_moe_experts": toy.experts}
    transformer = TransformerConfig(**options | _RECOMPUTE[toy.recompute] | toy.options)
    shared: dict[str, Any] = {
        "transformer": transformer,
        "hybrid_layer_pattern": pattern,
        "vocab_size": VOCABULARY,
        "seq_length": toy.sequence,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": toy.tied,
    }
    if toy.megatron:
        return HybridModelConfig(hybrid_stack_spec=hybrid_stack_spec(transformer), **shared)
    return MTPDModelConfig(mtpd=toy.mtpd, eod_token_id=EOD if toy.documents else None, **shared)


def noise(name: str, shape: Sequence[int]) -> Tensor:
    """Normal numbers that follow from a name alone, so that every layout has slices of the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def initial_weight(toy: Toy, name: str, shape: Sequence[int]) -> Tensor:
    """The whole weight of that name, before the first step."""
    weight = noise(name, shape) * 0.15
    if "norm" in name:
        weight += 1.0
    elif "embedding" in name or "output_layer" in name:
        weight[::24] *= 8.0  # a few frequent tokens, so that main head and heads often agree
    if toy.nudge and name.startswith("mtp."):
        weight += toy.nudge * noise(f"direction of {name}", shape)
    return weight


def samples(toy: Toy) -> list[dict[str, Tensor]]:
    """The global batch, as Megatron's dataset would give it."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for index in range(SAMPLES):
        text = torch.randint(EOD + 1, VOCABULARY, (toy.sequence + 1,), generator=generator)
        if toy.documents:
            # two documents next to each other, one of a single token, one that ends with the sequence
            text[[3 + index, 4 + index, 9 + index % 3]] = EOD
        if toy.first_document:
            text[: 3 + index] = (text[: 3 + index] * toy.first_document) % (VOCABULARY - EOD - 1) + EOD + 1
        flag = toy.documents
        mask, loss_mask, position_ids = _get_ltor_masks_and_position_ids(text[:-1], EOD, flag, flag, flag, flag)
        if toy.masked:
            loss_mask *= (torch.rand(toy.sequence, generator=generator) >= [0.0, 0.2, 1.0, 0.4][index]).float()
        if toy.first_document:
            loss_mask[: 4 + index] = 0.0
        sample = {"tokens": text[:-1], "labels": text[1:], "loss_mask": loss_mask, "position_ids": position_ids}
        result.append(sample | ({} if mask is None else {"attention_mask": mask}))
    return result
