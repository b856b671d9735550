"""What the arithmetic of a plan starts from: sizes of the model, of the machine's division, and of a step.

Plain numbers in frozen dataclasses, in Megatron's own units: positions and tokens, bytes, ranks. `flags.py` fills them
from a command line. A layer is a symbol of Megatron's hybrid patterns: `*` attention, `+` multi-latent attention, `-`
MLP, `E` mixture of experts.

Deliberately absent: anything that needs torch or Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stack = Literal["te", "local", "cpu"]
"""Whose modules run: Transformer Engine's with fused attention, local ones on a GPU, or local ones on a CPU, which keep
more (torch's RMSNorm is not fused there)."""


@dataclass(frozen=True)
class LatentAttention:
    """Ranks and widths of multi-latent attention (DeepSeek-V2), a head's where not said otherwise."""

    q_rank: int | None
    kv_rank: int
    qk: int
    qk_rope: int
    v: int


@dataclass(frozen=True)
class Model:
    """Sizes of the whole model."""

    hidden: int
    ffn: int
    attention_heads: int
    query_groups: int
    kv_channels: int
    vocabulary: int
    """Padded, as the weights are."""
    stages: tuple[str, ...]
    """Layers of the main model, by (virtual) pipeline stage in order."""
    head: str
    """Layers of one MTP head; empty without."""
    heads: int
    """K, the number of MTP heads."""
    one_head_repeated: bool = False
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    norm: str = "LayerNorm"
    tied: bool = True
    experts: int = 0
    router_topk: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    shared_gate: bool = False
    latent: LatentAttention | None = None

    @property
    def layers(self) -> str:
        """All layers of the main model."""
        return "".join(self.stages)


@dataclass(frozen=True)
class Parallel:
    """How many ways each dimension is divided."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1
    """Virtual stages a rank."""
    sequence_parallel: bool = False

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        return self.ranks // (self.pp * self.etp * self.ep)


@dataclass(frozen=True)
class Step:
    """A training step, and the precision it is made in."""

    sequence: int
    micro_batch: int
    micro_batches: int
    """Of one data-parallel rank in a step."""
    bytes_weight: int
    """Of a parameter; also of what layers pass on."""
    bytes_gradient: int
    """Of an element of the gradient buffer."""
    bytes_optimizer: int
    """Of the optimizer's state of a parameter, its fp32 copy included."""
    shards_optimizer: bool
    fp8: bool = False
    fp8_weights: bool = False
    first_layers_in_bf16: int = 0
    """Of the main model, in an FP8 run. Heads have none."""
    last_layers_in_bf16: int = 0
    recompute: str | None = None
    """None, full or selective."""
    recompute_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    loss: str = "fused"
    passes_of_heads: int = 1
    losses_apart: bool = False
    """The fused loss holds the gradients of cross-entropy and distillation apart, because they go different ways."""
    trained: str = "all"
    old_heads: int = 0
    stack: Stack = "te"

    @property
    def sequences(self) -> int:
        """Of one data-parallel rank in a step."""
        return self.micro_batch * self.micro_batches


@dataclass(frozen=True)
class Run:
    """Model, division and step."""

    model: Model
    parallel: Parallel
    step: Step

    @property
    def tokens(self) -> int:
        """Of a global batch."""
        return self.parallel.dp * self.step.sequences * self.step.sequence
