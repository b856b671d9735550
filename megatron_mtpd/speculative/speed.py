"""How fast decoding is: against transformers' `generate`, and against what its own passes allow.

Two questions, measured side by side in turns, so that a busy machine disturbs both alike; the best turn of each counts.
Is plain decoding as fast as transformers' `generate` on a Llama of the same size (random weights: they do not change
the time)? And how much of a speculative step is spent outside the model: the bound of its speedup is the tokens of a
step over the cost of its passes relative to those of a plain step.

Deliberately absent: prompts and acceptance of real text; `benchmark` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate, now
from megatron_mtpd.speculative.loading import Loaded

PASSES: tuple[str, ...] = ("main model", "heads", "output layer")


def llama_of_the_same_size(loaded: Loaded) -> Any:
    """transformers' LlamaForCausalLM with the shapes and dtype of the checkpoint's main model, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, model = loaded.model.config, loaded.model
    llama = LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size or 4 * config.hidden_size,
        num_hidden_layers=loaded.args.hybrid_layer_pattern.split("/")[0].count("*"),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        **dict.fromkeys(("bos_token_id", "eos_token_id")),
        pad_token_id=0,
    )
    parameter = next(model.parameters())
    return LlamaForCausalLM(llama).to(parameter.device, parameter.dtype).eval()


class _Timed:
    """A decoder whose passes of the model are timed: seconds of each part."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.seconds = decoder, dict.fromkeys(PASSES, 0.0)
        decoder._run = self._timing(decoder._run, lambda depth: PASSES[min(depth, 1)])
        decoder._logits = self._timing(decoder._logits, lambda _: PASSES[2])

    def _timing(self, function: Callable, part: Callable[[Any], str]) -> Callable:
        def timed(*args: Any) -> Any:
            start = now(self.decoder.device)
            result = function(*args)
            self.seconds[part(args[0])] += now(self.decoder.device) - start
            return result

        return timed

    def run(self, requests: list[Request]) -> dict[str, float]:
        """Seconds of each part for the requests."""
        self.seconds = dict.fromkeys(PASSES, 0.0)
        for _ in generate(self.decoder, requests):
            pass
        return self.seconds


@torch.inference_mode()
def by_transformers(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens behind prompts of one length, by transformers' `generate`, whatever ends."""
    ids = torch.tensor(prompts, device=model.device)
    fixed = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[:, ids.shape[1] :].tolist()


def measure(
    loaded: Loaded,
    prompts: list[list[int]],
    vocab_size: int,
    num_heads: int,
    batch_size: int,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Tokens a second of transformers, plain and speculative decoding, and the bound of the last.

    The prompts are cut to one length, because `generate` would otherwise compute padding.
    """
    length = min(len(prompt) for prompt in prompts)
    prompts = [prompt[:length] for prompt in prompts[:batch_size]]
    if len(prompts) < batch_size:
        raise ValueError(f"--batch-size {batch_size} needs as many prompts; there are {len(prompts)}.")
    llama = llama_of_the_same_size(loaded)
    requests = [Request(key, prompt, new_tokens) for key, prompt in enumerate(prompts)]
    capacity = length + new_tokens + num_heads + 1
    plain, drafting = (Decoder(loaded.model, k, batch_size, capacity, vocab_size) for k in (0, num_heads))

    def transformers() -> Any:
        return by_transformers(llama, prompts, new_tokens)

    def ours(decoder: Decoder) -> Callable[[], Any]:
        return lambda: list(generate(decoder, requests))

    best = _best(
        {"transformers": transformers, "plain": ours(plain), "speculative": ours(drafting)}, rounds, plain.device
    )
    # The passes alone, in turns of their own: the timers must not slow the others down.
    timed = {name: _Timed(decoder) for name, decoder in (("plain", plain), ("speculative", drafting))}
    passes = _best(
        {name: lambda t=t: t.run(requests) for name, t in timed.items()},
        rounds,
        plain.device,
        lambda _, parts: sum(parts.values()),
    )
    tokens = batch_size * new_tokens
    steps = {name: max(sum(g.num_steps for g in best[name][1]) / batch_size, 1) for name in timed}
    profile = {name: _milliseconds(*passes[name], steps[name]) for name in timed}
    cost = {name: sum(parts[part] for part in PASSES) for name, parts in profile.items()}
    tokens_a_step = (new_tokens - 1) / steps["speculative"]
    speedup = best["plain"][0] / best["speculative"][0]
    bound = tokens_a_step / (cost["speculative"] / cost["plain"])
    return {
        "batch_size": batch_size,
        "num_heads": num_heads,
        **{f"tokens_per_second_{name}": tokens / seconds for name, (seconds, _) in best.items()},
        "plain_over_transformers": best["transformers"][0] / best["plain"][0],
        "tokens_a_step": tokens_a_step,
        "cost_of_a_step": cost["speculative"] / cost["plain"],
        "speedup": speedup,
        "bound": bound,
        "speedup_over_bound": speedup / bound,
        "milliseconds_a_step": profile,
    }


def _milliseconds(total: float, parts: dict[str, float], steps: float) -> dict[str, float]:
    """Of a step of the batch, prompts included; `rest` is all that is not the model: choosing, bookkeeping, timers."""
    parts = parts | {"rest": total - sum(parts.values())}
    return {name: 1000 * seconds / steps for name, seconds in parts.items()}


def _best(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    key: Callable[[float, Any], float] = lambda seconds, _: seconds,
) -> dict[str, tuple[float, Any]]:
    """Seconds and result of each function's best round by `key`, in turns, after one turn to warm up."""
    best: dict[str, tuple[float, Any]] = {}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = now(device)
            result = function()
            seconds = now(device) - start
            if turn and (name not in best or key(seconds, result) < key(*best[name])):
                best[name] = (seconds, result)
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements for a terminal."""
    lines = ["batch heads | tokens/s: transformers  plain  speculative | plain / transformers | speedup  bound  share"]
    for row in rows:
        speeds = [row[f"tokens_per_second_{name}"] for name in ("transformers", "plain", "speculative")]
        lines.append(
            f"{row['batch_size']:>5} {row['num_heads']:>5} "
            f"| {speeds[0]:>22,.0f} {speeds[1]:>6,.0f} {speeds[2]:>12,.0f} "
            f"| {row['plain_over_transformers']:>20.2f} | {row['speedup']:>7.2f} {row['bound']:>6.2f}"
            f" {row['speedup_over_bound']:>6.0%}"
        )
    lines += ["", f"batch heads | ms a step: {'  '.join((*PASSES, 'rest'))}   (rest: all that is not the model)"]
    for row in rows:
        for name, parts in row["milliseconds_a_step"].items():
            shown = "  ".join(f"{parts[part]:>{len(part)}.2f}" for part in (*PASSES, "rest"))
            share = parts["rest"] / sum(parts.values())
            heads = 0 if name == "plain" else row["num_heads"]
            lines.append(f"{row['batch_size']:>5} {heads:>5} | {'':10} {shown}   {share:.0%}")
    return "\n".join(lines)
