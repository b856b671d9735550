"""Bytes that one layer keeps for its backward, on one rank, for one micro-batch.

Counted tensor by tensor from what each module hands to autograd: on a CPU as measured with saved-tensor hooks, on a GPU
after the kernels' signatures (fused norms keep their input, flash attention keeps q, k, v, its output and one number a
row). Dropout is taken to be off, and experts to be loaded evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtpd.planning.shape import Model, Run, Step


@dataclass(frozen=True)
class _Rank:
    """Sizes of this rank's part of a micro-batch."""

    model: Model
    step: Step
    tokens: int
    """After context parallelism."""
    positions: int
    tp: int
    etp: int
    hidden: float
    """Width of what lies between layers: hidden / tp with sequence parallelism."""

    @classmethod
    def of(cls, run: Run) -> _Rank:
        model, parallel, step = run.model, run.parallel, run.step
        positions = step.sequence // parallel.cp
        hidden = model.hidden / (parallel.tp if parallel.sequence_parallel else 1)
        return cls(model, step, step.micro_batch * positions, positions, parallel.tp, parallel.etp, hidden)

    def norm(self, width: float) -> float:
        """Of a norm's own; its output belongs to who reads it."""
        if self.step.stack == "cpu" and self.model.norm == "RMSNorm":
            return 8 * width + 4  # the input and the normed input, both in fp32
        return self.step.bytes_weight * width + 4

    @property
    def input(self) -> int:
        """Of an element of a linear layer's input."""
        return 1 if self.step.fp8 and self.step.stack == "te" else self.step.bytes_weight

    def drops(self, module: str) -> bool:
        return self.step.recompute == "selective" and module in self.step.recompute_modules


def of_layer(run: Run, symbol: str) -> float:
    """One layer's."""
    rank = _Rank.of(run)
    if rank.step.recompute == "full":
        return rank.tokens * rank.hidden * rank.step.bytes_weight / rank.step.recompute_layers
    return rank.tokens * _LAYERS[symbol](rank)


def of_layer_at_work(run: Run, symbol: str) -> float:
    """What it keeps for a moment all the same, while it is recomputed."""
    if run.step.recompute != "full":
        return 0.0
    rank = _Rank.of(run)
    return rank.tokens * _LAYERS[symbol](rank)


def of_head(run: Run) -> float:
    """One MTP head's: norms of its two inputs, their concatenation, its layers, its last norm."""
    rank = _Rank.of(run)
    if rank.step.recompute == "full":
        return rank.tokens * 2 * rank.hidden * rank.step.bytes_weight  # its two inputs
    own = 3 * rank.norm(rank.hidden) + 2 * rank.hidden * rank.input + 8
    return rank.tokens * (own + sum(_LAYERS[symbol](rank) for symbol in rank.model.head))


def of_last_norm(run: Run) -> float:
    """The main model's last norm."""
    rank = _Rank.of(run)
    return rank.tokens * rank.norm(rank.hidden)


def hidden_states(run: Run) -> float:
    """One tensor of hidden states between layers."""
    rank = _Rank.of(run)
    return rank.tokens * rank.hidden * rank.step.bytes_weight


def widest(run: Run, symbols: str) -> float:
    """Gradients that are alive inside the backward of the widest of these layers."""
    rank, model = _Rank.of(run), run.model
    width = 0.0
    for symbol in symbols:
        if symbol == "-":
            width = max(width, model.ffn * (3 if model.gated else 2) / rank.tp)
        elif symbol == "E":
            width = max(width, model.router_topk * (2 * model.expert_ffn / rank.etp + model.hidden))
        else:
            width = max(width, 3 * model.attention_heads * model.kv_channels / rank.tp)
    return rank.tokens * (width + 2 * rank.hidden) * rank.step.bytes_weight


def _attention(rank: _Rank) -> float:
    model, e = rank.model, rank.step.bytes_weight
    queries, keys = (n * model.kv_channels / rank.tp for n in (model.attention_heads, model.query_groups))
    kept = rank.norm(rank.hidden) + rank.hidden * (0 if rank.drops("layernorm") else rank.input)
    # q, k, the output, and the product of the projection, of which v is a view.
    kept += (2 * queries + keys + queries + 2 * keys) * e
    if rank.step.stack == "cpu" or rank.step.stack == "local":
        kept += 4 * model.kv_channels * e / rank.step.micro_batch  # sines and cosines of queries and keys
    if not rank.drops("core_attn"):
        kept += 4 * model.attention_heads / rank.tp
    return kept + (queries if rank.input != e else 0)  # the output as FP8


def _latent_attention(rank: _Rank) -> float:
    model, e, mla = rank.model, rank.step.bytes_weight, rank.model.latent
    assert mla is not None
    heads = model.attention_heads / rank.tp
    query, value = heads * (mla.qk + mla.qk_rope), heads * mla.v
    kept = rank.norm(rank.hidden) + rank.hidden * (0 if rank.drops("layernorm") else rank.input)
    kept += value * (e + (rank.input if rank.input != e else 0))  # the output, and as FP8
    kept += mla.qk_rope * e
    for width in (mla.q_rank or model.hidden * model.qk_norm, mla.kv_rank):
        kept += width * rank.input + (rank.norm(width) if model.qk_norm and width else 0)
    if rank.step.stack != "te":
        kept += 4 * mla.qk_rope * e / rank.step.micro_batch  # sines and cosines of queries and keys
    if rank.step.stack == "cpu":
        # torch's kernels there take no values of another width: scores are kept, and all in fp32.
        return kept + 4 * (2 * query + value + heads * rank.positions)
    return kept + 4 * heads + (0 if rank.drops("mla_up_proj") else (2 * query + value) * e)


def _mlp(rank: _Rank) -> float:
    kept = rank.norm(rank.hidden) + rank.hidden * (0 if rank.drops("layernorm") else rank.input)
    return kept + (0.0 if rank.drops("mlp") else _inner(rank, rank.model.ffn / rank.tp))


def _inner(rank: _Rank, width: float) -> float:
    """What the activation function and the second linear layer keep."""
    return width * (2 if rank.model.gated else 1) * rank.step.bytes_weight + width * rank.input


def _experts(rank: _Rank) -> float:
    model = rank.model
    kept = rank.norm(rank.hidden) + rank.hidden * rank.step.bytes_weight
    kept += 8 * model.experts + 28 * model.router_topk  # scores of the router, places of the tokens
    if rank.drops("moe"):
        return kept
    width = model.expert_ffn / rank.etp
    inner = _inner(rank, width) - (width * rank.input if rank.drops("moe_act") else 0)
    # Tokens meet their experts on other ranks, in the mean as many as are sent.
    tokens_of_tp = rank.tp if rank.hidden == model.hidden and rank.etp == 1 else 1
    kept += model.router_topk * (model.hidden * rank.input + inner) * rank.etp / rank.tp * tokens_of_tp
    if model.shared_ffn and not rank.drops("shared_experts"):
        kept += _inner(rank, model.shared_ffn / rank.tp)
    return kept


_LAYERS = {"*": _attention, "+": _latent_attention, "-": _mlp, "E": _experts}
