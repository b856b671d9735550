"""Parameters of each part of the model, whole or of one rank: exactly as many as the built model has.

A rank's are those of its slice: `Parallel` says the division, and `Parallel()` gives the whole. Parameters of experts
are counted apart, because other ranks hold their copies (expert parallelism). Buffers, as the bias of a router, are
none.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtpd.planning.shape import Model, Parallel


@dataclass(frozen=True)
class Count:
    """Parameters that are divided and replicated as the dense layers are, and as the experts are."""

    dense: int = 0
    expert: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.dense + other.dense, self.expert + other.expert)

    def __mul__(self, times: int) -> Count:
        return Count(self.dense * times, self.expert * times)

    @property
    def total(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class Parts:
    """What a stage holds. `heads`: one entry a head (one in all where a head is repeated)."""

    embedding: int
    trunk: Count
    heads: tuple[Count, ...]
    output: int

    @property
    def total(self) -> Count:
        return sum(self.heads, self.trunk + Count(self.embedding + self.output))


def of_layer(model: Model, symbol: str, parallel: Parallel = Parallel()) -> Count:  # noqa: B008  # frozen
    """Of one layer, on one rank."""
    layer = {"*": _attention, "+": _latent_attention, "-": _mlp, "E": _experts}[symbol]
    return layer(model, parallel) + Count(_norm(model, model.hidden))


def of_head(model: Model, parallel: Parallel = Parallel()) -> Count:  # noqa: B008
    """Of one MTP head: two norms of its input, their projection [2h -> h], its layers, a last norm."""
    own = 3 * _norm(model, model.hidden) + 2 * model.hidden * model.hidden // parallel.tp
    return sum((of_layer(model, symbol, parallel) for symbol in model.head), Count(own))


def of_rank(model: Model, parallel: Parallel, pp_rank: int) -> Parts:
    """Of a rank of that pipeline stage, all its virtual stages together."""
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    layers = "".join(model.stages[pp_rank :: parallel.pp])
    trunk = sum((of_layer(model, symbol, parallel) for symbol in layers), Count())
    table = model.vocabulary // parallel.tp * model.hidden
    if last:
        trunk += Count(_norm(model, model.hidden))
    heads = (of_head(model, parallel),) * (1 if model.one_head_repeated else model.heads) if last else ()
    # The heads look tokens up on the last stage: it has a copy of the embedding, which is the output layer if tied.
    embedding = table if first or (last and model.heads) else 0
    output = table if last and not (model.tied and embedding) else 0
    return Parts(embedding, trunk, heads, output)


def whole(model: Model) -> Parts:
    """Of the whole model, every parameter once."""
    one = Model(**{**model.__dict__, "stages": (model.layers,)})
    return of_rank(one, Parallel(), 0)


def active(model: Model) -> tuple[int, int]:
    """Parameters that take part in a token: of the main model, and of all heads. Of experts: those it is routed to."""
    share = model.router_topk / model.experts if model.experts else 0.0
    parts = whole(model)

    def used(count: Count) -> int:
        return count.dense + round(count.expert * share)

    heads = used(of_head(model)) * model.heads
    return parts.embedding + used(parts.trunk) + parts.output, heads


def _norm(model: Model, width: int) -> int:
    return width * (2 if model.norm == "LayerNorm" else 1)


def _attention(model: Model, parallel: Parallel) -> Count:
    queries = model.attention_heads * model.kv_channels
    out = queries + 2 * model.query_groups * model.kv_channels
    weights = (model.hidden * out + queries * model.hidden) // parallel.tp
    biases = out // parallel.tp * (model.bias or model.qkv_bias) + model.hidden * model.bias
    return Count(weights + biases + 2 * model.qk_norm * _norm(model, model.kv_channels))


def _latent_attention(model: Model, parallel: Parallel) -> Count:
    """Its projections down to the ranks are whole on every tensor-parallel rank, as Transformer Engine has them."""
    mla, heads, hidden = model.latent, model.attention_heads, model.hidden
    assert mla is not None
    query = heads * (mla.qk + mla.qk_rope)
    if mla.q_rank is None:
        sliced = hidden * query
        copied = 0
    else:
        sliced = mla.q_rank * query
        copied = hidden * mla.q_rank
    sliced += mla.kv_rank * heads * (mla.qk + mla.v) + heads * mla.v * hidden
    copied += hidden * (mla.kv_rank + mla.qk_rope)
    if model.qk_norm:
        copied += _norm(model, mla.kv_rank) + _norm(model, mla.q_rank or hidden)
    return Count(copied + sliced // parallel.tp + model.bias * hidden)


def _mlp(model: Model, parallel: Parallel) -> Count:
    return Count(_linears(model, model.ffn, parallel.tp))


def _experts(model: Model, parallel: Parallel) -> Count:
    router = model.hidden * model.experts
    shared = _linears(model, model.shared_ffn, parallel.tp) if model.shared_ffn else 0
    gate = model.hidden * (model.shared_gate and bool(model.shared_ffn))
    return Count(router + shared + gate, _linears(model, model.expert_ffn, parallel.etp) * model.experts // parallel.ep)


def _linears(model: Model, width: int, tp: int) -> int:
    inner = width * (2 if model.gated else 1)
    biases = (inner // tp + model.hidden) * model.bias
    return (model.hidden * inner + width * model.hidden) // tp + biases
