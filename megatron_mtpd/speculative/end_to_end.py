"""From prompt to last token: our decoding beside transformers' plain `generate`, with the same weights and prompts.

Every prompt goes through all ways of decoding before the next one does, in an order of its own, so that a busy machine
disturbs all alike. Of each way it says the rate over all prompts, and the median of the ratio to
transformers' rate at the same prompt, with its smallest and largest.

Deliberately absent: acceptance, whose measure is `benchmark`; batches; sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from megatron_mtpd.data.tokenizers import HuggingFaceTokenizer
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate, now
from megatron_mtpd.speculative.options import require_at_least
from megatron_mtpd.speculative.prompts import read_prompts
from megatron_mtpd.speculative.speed import by_transformers

TRANSFORMERS = "transformers, plain"
PLAIN = "ours, plain"
WARM_UP = 8
"""New tokens of a way of decoding before it is timed."""


@dataclass(frozen=True)
class Options:
    """What is compared. Raises ValueError for values that cannot work."""

    load: Path
    hf: Path
    """The checkpoint's export for transformers."""
    prompts: Sequence[str]
    num_heads: Sequence[int] = (1,)
    draft_vocab_size: Sequence[int] = ()
    """Heads draft among all ids, and in a further row of each among so many."""
    new_tokens: int = 64
    max_prompt_tokens: int = 512
    limit: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, new_tokens=2, max_prompt_tokens=1, limit=1)
        if min(self.num_heads, default=1) < 1:
            raise ValueError(f"--num-heads {min(self.num_heads)}: give at least 1; plain decoding is always there.")
        if not (self.hf / "config.json").is_file():
            raise ValueError(f"--hf {self.hf} holds no config.json: export the checkpoint with tools/convert_hf.py.")


@dataclass
class _Way:
    """A way of decoding: of each prompt the new tokens, and the seconds."""

    run: Callable[[list[int], int], tuple[list[int], int]]
    """Prompt and number of new tokens -> these, and the passes of the main model after the prompt's."""
    num_heads: int | None = None
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: int = 0


def compare(options: Options) -> dict[str, Any]:
    """Time all ways of decoding. Once a process, after nothing else; on a CPU with torch's number of threads.

    Raises ValueError and CheckpointError, naming what cannot be used.
    """
    from transformers import AutoModelForCausalLM

    loading.start_distributed()
    hf_model: Any = AutoModelForCausalLM.from_pretrained(options.hf, dtype="auto").eval()
    hf_model.generation_config.eos_token_id = None  # all go on behind the end
    if torch.cuda.is_available():
        hf_model.cuda()
    dtype = {value: key for key, value in loading.DTYPES.items()}[hf_model.dtype]
    loaded = loading.load(options.load, dtype=dtype)
    tokenizer = HuggingFaceTokenizer(str(options.hf))
    texts = [prompt.text for prompt in read_prompts(list(options.prompts))][: options.limit]
    prompts = [ids[-options.max_prompt_tokens :] for ids in tokenizer.encode(texts) if ids]
    if not prompts:
        raise ValueError(f"--prompts {' '.join(options.prompts)}: there is no prompt of a token or more.")
    longest = max(prompts, key=len)
    ours = _ours(options, loaded.model, len(longest), hf_model.config.vocab_size)
    ways = {TRANSFORMERS: _Way(_transformers(hf_model)), **ours}
    for way in ways.values():
        way.run(longest, WARM_UP)
    random, order = Random(1), list(ways.values())
    with tqdm(total=len(prompts) * len(order), unit="answer", desc="one at a time") as bar:
        for prompt in prompts:
            random.shuffle(order)
            for way in order:
                start = now(hf_model.device)
                tokens, steps = way.run(prompt, options.new_tokens)
                way.seconds.append(now(hf_model.device) - start)
                way.tokens.append(tokens)
                way.steps += steps
                bar.update()
    return {
        "rows": _rows(ways, options.new_tokens),
        "prompts": len(prompts),
        "new_tokens": options.new_tokens,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "device": str(hf_model.device),
    }


def _transformers(hf_model: Any) -> Callable[[list[int], int], tuple[list[int], int]]:
    return lambda prompt, new_tokens: (by_transformers(hf_model, [prompt], new_tokens)[0], new_tokens - 1)


def _ours(options: Options, model: MTPDModel, longest: int, vocab_size: int) -> dict[str, _Way]:
    """Plain, and with each number of heads."""
    ways: dict[str, _Way] = {}
    for ids, heads in [(None, 0), *product((None, *options.draft_vocab_size), options.num_heads)]:
        capacity = longest + max(options.new_tokens, WARM_UP) + heads + 1
        decoder = Decoder(model, heads, 1, capacity, vocab_size, draft_vocab_size=ids)
        name = f"ours, {heads} head{'s' * (heads > 1)}" if heads else PLAIN
        ways[name if ids is None else f"{name}, drafts of {ids:,} ids"] = _Way(_with(decoder), heads)
    return ways


def _with(decoder: Decoder) -> Callable[[list[int], int], tuple[list[int], int]]:
    def run(prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
        (done,) = generate(decoder, [Request(0, prompt, new_tokens)])
        return done.tokens, done.num_steps

    return run


def _rows(ways: dict[str, _Way], new_tokens: int) -> list[dict[str, Any]]:
    rows = []
    for name, way in ways.items():
        ratios = {
            other: [b / a for a, b in zip(way.seconds, ways[other].seconds, strict=True)]
            for other in (TRANSFORMERS, PLAIN)
        }
        rows.append(
            {
                "decoding": name,
                "num_heads": way.num_heads,
                "tokens_per_second": len(way.seconds) * new_tokens / sum(way.seconds),
                "tokens_per_step": len(way.seconds) * (new_tokens - 1) / max(way.steps, 1),
                "over_transformers": median(ratios[TRANSFORMERS]),
                "over_transformers_range": [min(ratios[TRANSFORMERS]), max(ratios[TRANSFORMERS])],
                "over_plain": median(ratios[PLAIN]),
                "outputs_equal_to_transformers": sum(
                    a == b for a, b in zip(way.tokens, ways[TRANSFORMERS].tokens, strict=True)
                ),
                "seconds": way.seconds,
            }
        )
    return rows


def table(found: dict[str, Any]) -> str:
    """The comparison in Markdown, which reads well on a terminal too."""
    lines = [
        "| decoding | tokens/s | x transformers | from - to | x plain | tokens/step | outputs equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["over_transformers_range"]
        lines.append(
            f"| {row['decoding']} | {row['tokens_per_second']:.1f} | {row['over_transformers']:.2f} | "
            f"{low:.2f} - {high:.2f} | {row['over_plain']:.2f} | {row['tokens_per_step']:.2f} | "
            f"{row['outputs_equal_to_transformers']} of {found['prompts']} |"
        )
    return "\n".join(lines)
