"""Floating-point operations of a token, layer by layer: what a step costs, and what balances the pipeline.

Two a multiplication and addition; backward costs twice forward; causal attention sees half of the positions. Only
matrix products count, as in Megatron's own figure, beside which `eh_proj` of the heads and the router are counted here.
What is recomputed is no part of a model's operations (MFU), and is added to the time of a stage.
"""

from __future__ import annotations

from megatron_mtpd.planning.shape import Model, Run, Step


def of_layer(model: Model, symbol: str, sequence: int) -> float:
    """Forward, a token."""
    h = model.hidden
    if symbol == "*":
        queries, keys = (n * model.kv_channels for n in (model.attention_heads, model.query_groups))
        return 2 * h * (queries + 2 * keys) + 2 * queries * h + 2 * sequence * queries
    if symbol == "+":
        mla, heads = model.latent, model.attention_heads
        assert mla is not None
        query = heads * (mla.qk + mla.qk_rope)
        to_query = h * query if mla.q_rank is None else mla.q_rank * (h + query)
        to_rest = h * (mla.kv_rank + mla.qk_rope) + mla.kv_rank * heads * (mla.qk + mla.v) + heads * mla.v * h
        return 2 * (to_query + to_rest) + sequence * (query + heads * mla.v)
    linears = 3 if model.gated else 2
    if symbol == "-":
        return 2 * h * model.ffn * linears
    experts = model.router_topk * model.expert_ffn + model.shared_ffn
    return 2 * h * model.experts + 2 * h * experts * linears


def of_head(model: Model, sequence: int) -> float:
    """Forward of one MTP head, a token, without its logits."""
    return 4 * model.hidden**2 + sum(of_layer(model, symbol, sequence) for symbol in model.head)


def of_logits(model: Model) -> float:
    """Forward of the output layer for one head, a token."""
    return 2 * model.hidden * model.vocabulary


def of_token(model: Model, sequence: int) -> float:
    """Forward and backward of everything, a token."""
    trunk = sum(of_layer(model, symbol, sequence) for symbol in model.layers)
    heads = model.heads * of_head(model, sequence)
    return 3 * (trunk + heads + (1 + model.heads) * of_logits(model))


def of_stages(run: Run) -> list[float]:
    """Work of each virtual stage for a token: forward, backward and what is recomputed."""
    model = run.model
    stages = [sum(work_of_layer(run, symbol) for symbol in stage) for stage in model.stages]
    stages[-1] += work_of_the_end(run)
    return stages


def work_of_layer(run: Run, symbol: str) -> float:
    """Of a layer of the main model, for a token. A frozen one has no backward."""
    forward = of_layer(run.model, symbol, run.step.sequence)
    return forward * (_passes(run.step) if run.step.trained == "all" else 1)


def work_of_the_end(run: Run) -> float:
    """Of the heads and the output layer, which stand on the last stage.

    With --mtpd-train new-heads the first heads have a forward pass alone, and so have the output layer's weights.
    """
    model, step = run.model, run.step
    new = model.heads - (step.old_heads if step.trained == "new-heads" else 0)
    head, passes = of_head(model, step.sequence), _passes(step)
    heads = step.passes_of_heads * head * (new * passes + (model.heads - new))
    logits = of_logits(model)
    if step.trained == "all":
        return heads + 3 * (1 + model.heads) * logits
    return heads + (1 + model.heads + new) * logits


def _passes(step: Step) -> float:
    return 4 if step.recompute == "full" else 3
