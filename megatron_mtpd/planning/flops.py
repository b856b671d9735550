"""Floating-point operations of a token, layer by layer: what a step costs, and what balances the pipeline.

Two a multiplication and addition; backward costs twice forward; causal attention sees half of the positions. Only
matrix products count, as in Megatron's own figure, beside which `eh_proj` of the heads and the router are counted here.
What is recomputed is no part of a model's operations (MFU), and is added to the time of a stage.

In an FP8 run the linear layers of trunk and heads are made in FP8, without those that --first-last-layers-bf16 names.
Attention's own products, the router and the output layer are not, and stay in the run's ordinary precision, in which
every other run makes all.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mtpd.planning.shape import Model, Run, Step


@dataclass(frozen=True)
class Work:
    """Operations, by the precision that they are made in."""

    ordinary: float = 0.0
    fp8: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.ordinary + other.ordinary, self.fp8 + other.fp8)

    def __mul__(self, times: float) -> Work:
        return Work(self.ordinary * times, self.fp8 * times)

    @property
    def total(self) -> float:
        return self.ordinary + self.fp8


def of_layer(model: Model, symbol: str, sequence: int) -> tuple[float, float]:
    """Forward, a token: of its linear layers, and of the rest."""
    h = model.hidden
    if symbol == "*":
        queries, keys = (n * model.kv_channels for n in (model.attention_heads, model.query_groups))
        return 2 * h * (queries + 2 * keys) + 2 * queries * h, 2 * sequence * queries
    if symbol == "+":
        mla, heads = model.latent, model.attention_heads
        assert mla is not None
        query = heads * (mla.qk + mla.qk_rope)
        to_query = h * query if mla.q_rank is None else mla.q_rank * (h + query)
        to_rest = h * (mla.kv_rank + mla.qk_rope) + mla.kv_rank * heads * (mla.qk + mla.v) + heads * mla.v * h
        return 2 * (to_query + to_rest), sequence * (query + heads * mla.v)
    linears = 3 if model.gated else 2
    if symbol == "-":
        return 2 * h * model.ffn * linears, 0
    experts = model.router_topk * model.expert_ffn + model.shared_ffn
    return 2 * h * experts * linears, 2 * h * model.experts


def of_trunk(run: Run) -> list[Work]:
    """Forward of each layer of the main model, a token."""
    step, layers = run.step, run.model.layers
    first, last = step.first_layers_in_bf16, len(layers) - step.last_layers_in_bf16
    return [
        _work(of_layer(run.model, symbol, step.sequence), in_fp8=step.fp8 and first <= place < last)
        for place, symbol in enumerate(layers)
    ]


def of_head(run: Run) -> Work:
    """Forward of one MTP head, a token, without its logits."""
    model, step = run.model, run.step
    layers = (of_layer(model, symbol, step.sequence) for symbol in model.head)
    return sum((_work(layer, step.fp8) for layer in layers), _work((4 * model.hidden**2, 0), step.fp8))


def of_logits(model: Model) -> Work:
    """Forward of the output layer for one head, a token."""
    return Work(2 * model.hidden * model.vocabulary)


def of_token(run: Run) -> Work:
    """Forward and backward of everything, a token."""
    model = run.model
    return (sum(of_trunk(run), Work()) + of_head(run) * model.heads + of_logits(model) * (1 + model.heads)) * 3


def of_stages(run: Run) -> list[Work]:
    """Work of each virtual stage for a token: forward, backward and what is recomputed."""
    layers = iter(work_of_layers(run))
    stages = [sum((next(layers) for _ in stage), Work()) for stage in run.model.stages]
    stages[-1] += work_of_the_end(run)
    return stages


def work_of_layers(run: Run) -> list[Work]:
    """Of each layer of the main model, for a token. A frozen one has no backward."""
    return [forward * (_passes(run.step) if run.step.trained == "all" else 1) for forward in of_trunk(run)]


def work_of_the_end(run: Run) -> Work:
    """Of the heads and the output layer, which stand on the last stage.

    With --mtpd-train new-heads the first heads have a forward pass alone, and so have the output layer's weights.
    """
    model, step = run.model, run.step
    new = model.heads - (step.old_heads if step.trained == "new-heads" else 0)
    heads = of_head(run) * (step.passes_of_heads * (new * _passes(step) + (model.heads - new)))
    logits = of_logits(model)
    if step.trained == "all":
        return heads + logits * (3 * (1 + model.heads))
    return heads + logits * (1 + model.heads + new)


def _work(operations: tuple[float, float], in_fp8: bool) -> Work:
    linear, rest = operations
    return Work(rest, linear) if in_fp8 else Work(rest + linear)


def _passes(step: Step) -> float:
    return 4 if step.recompute == "full" else 3
