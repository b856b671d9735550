"""One replica's share of the benchmark: its prompts through the model, every result written as soon as it is there.

A prompt that cannot be used is a result too, and costs nothing else. There is no communication with other replicas.

Deliberately absent: which prompts there are, and what becomes of the results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_mtpd.data.tokenizers import Tokenizer
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.options import require_at_least
from megatron_mtpd.speculative.prompts import Prompt
from megatron_mtpd.speculative.results import Results, Run
from megatron_mtpd.speculative.sampling import Sampling
from megatron_mtpd.speculative.teacher_forced import per_batch

TEACHER_FORCED = "teacher_forced"


@dataclass(frozen=True)
class Options:
    """What is measured, and where to. Raises ValueError for values that cannot work."""

    load: Path
    prompts: Sequence[str]
    output: Path
    num_heads: Sequence[int] = ()
    """Runs beside plain decoding and one head; empty: all heads of the checkpoint."""
    ckpt_step: int | None = None
    tensor_parallel: int = 1
    dtype: str | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    batch_size: int = 8
    max_new_tokens: int = 128
    max_prompt_tokens: int | None = None
    """Longer prompts lose their beginning. Default: what the training's sequence length leaves."""
    limit: int | None = None
    """At most so many prompts of each benchmark, chosen at random by the seed."""
    sampling: Sampling = field(default_factory=Sampling)
    min_confidence: float = 0.0
    mask_position_0: bool = False
    draft_vocab_size: int | None = None
    """Heads draft among so many ids, from 0; None: all."""
    ignore_eod: bool = False
    teacher_forced_only: bool = False
    every_checkpoint: bool = False
    """Of the run that `load` is the folder of."""
    seed: int = 1234

    def __post_init__(self) -> None:
        require_at_least(self, batch_size=1, max_new_tokens=1, max_prompt_tokens=1, limit=1)
        if self.every_checkpoint and self.ckpt_step is not None:
            raise ValueError(f"--ckpt-step {self.ckpt_step} is one checkpoint: leave it out, or --every-checkpoint.")


class NumberTokenizer:
    """Megatron's NullTokenizer: a text is its token ids, with spaces between."""

    type: str = "NullTokenizer"
    model: str = ""
    eod: int | None = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def sha256(self) -> dict[str, str]:
        return {}


def max_prompt_tokens(options: Options, loaded: loading.Loaded) -> int:
    """How long a prompt may be. Raises ValueError when nothing is left for it."""
    room = loaded.args.max_position_embeddings - options.max_new_tokens
    if options.max_prompt_tokens is None and room < 1:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens} leaves no room for prompts in the training's "
            f"{loaded.args.max_position_embeddings} tokens: give less, or set --max-prompt-tokens."
        )
    return options.max_prompt_tokens or room


class Worker:
    """One replica's work. All ranks of a tensor-parallel group do the same; the first of them writes."""

    def __init__(
        self,
        options: Options,
        loaded: loading.Loaded,
        tokenizer: Tokenizer,
        prompts: list[Prompt],
        results: Results,
    ) -> None:
        self.options, self.loaded, self.results = options, loaded, results
        self.prompts, self.tokenizer = prompts, tokenizer
        loaded.model.eod_token_id = tokenizer.eod
        self.writes = parallel_state.get_tensor_model_parallel_rank() == 0
        self.replica = parallel_state.get_data_parallel_rank()
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.max_prompt_tokens = max_prompt_tokens(options, loaded)
        # All ranks read before any of them writes: they have to deal from the same list.
        self.done = results.done()
        dist.barrier()

    def run(self, current: Run) -> None:
        """Do this replica's share of a run."""
        left = [i for i in range(len(self.prompts)) if (current, i) not in self.done]
        share = left[self.replica :: self.replicas]
        if not share:
            return
        with Progress(current, len(share)) as advance:
            if current == TEACHER_FORCED:
                self._measure(share, advance)
            else:
                self._decode(int(current), share, advance)

    def _tokens(
        self, share: list[int], run: Run, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[int], int]]:
        """Number, token ids and tokens cut off, of each good prompt; the bad ones are written as such."""
        for index in share:
            prompt = self.prompts[index]
            error, ids = prompt.error, []
            if not error:
                try:
                    ids = self._encode(prompt, run)
                except Exception as reason:  # whatever a tokenizer finds wrong with a text
                    error = f"{type(reason).__name__}: {reason}"
                if not error and not all(0 <= i < self.tokenizer.vocab_size for i in ids):
                    error = "token ids outside the vocabulary"
                if not error and not ids:
                    error = "no token in it"
            if error:
                self._write(run, index, {"error": error})
                advance(0)
            else:
                yield index, ids[-self.max_prompt_tokens :], max(0, len(ids) - self.max_prompt_tokens)

    def _encode(self, prompt: Prompt, run: Run) -> list[int]:
        if not prompt.tokens:
            return self.tokenizer.encode([prompt.text])[0]
        return list(prompt.tokens if run == TEACHER_FORCED else prompt.tokens[: prompt.given])

    def _write(self, run: Run, index: int, values: dict[str, Any]) -> None:
        if self.writes:
            self.results.append(run, index, **values)

    def _measure(self, share: list[int], advance: Callable[[int], None]) -> None:
        for index, ids, cut in self._tokens(share, TEACHER_FORCED, advance):
            (result,) = per_batch(self.loaded.model, [ids], 1, self.prompts[index].given - cut)
            self._write(TEACHER_FORCED, index, {"cut": cut, **asdict(result)})
            advance(len(ids))

    def _decode(self, num_heads: int, share: list[int], advance: Callable[[int], None]) -> None:
        options = self.options
        capacity = self.max_prompt_tokens + options.max_new_tokens + num_heads + 1
        slots = min(options.batch_size, len(share))
        decoder = Decoder(
            self.loaded.model,
            num_heads,
            slots,
            capacity,
            self.tokenizer.vocab_size,
            options.sampling,
            options.min_confidence if num_heads else 0.0,
            options.mask_position_0,
            options.draft_vocab_size,
        )
        self._warm_up(decoder)
        cuts: dict[int, int] = {}

        def requests() -> Iterator[Request]:
            for index, ids, cut in self._tokens(share, num_heads, advance):
                cuts[index] = cut
                yield Request(index, ids, options.max_new_tokens)

        eod = None if options.ignore_eod else self.tokenizer.eod
        for generation in generate(decoder, requests(), eod, options.seed):
            values = asdict(generation)
            self._write(num_heads, values.pop("key"), {"cut": cuts.pop(generation.key), **values})
            advance(len(generation.tokens))

    def _warm_up(self, decoder: Decoder) -> None:
        """The first passes allocate and choose kernels: not what is to be timed."""
        size = min(4, self.options.max_new_tokens)
        prompts = [Request(-1 - i, [0], size) for i in range(decoder.state.slots)]
        for _ in generate(decoder, prompts):
            pass


class Progress:
    """Prompts done, tokens a second and time left: a bar on a terminal, a line every ten seconds elsewhere. Rank
    0's."""

    def __init__(self, run: Run, total: int) -> None:
        self._name = f"{run} heads" if isinstance(run, int) else run.replace("_", " ")
        self._total, self._prompts, self._tokens = total, 0, 0
        self._start = self._said = time.monotonic()
        self._speaks = dist.get_rank() == 0
        on_terminal = self._speaks and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=self._name, unit="prompt", leave=False) if on_terminal else None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, tokens: int) -> None:
        self._prompts, self._tokens = self._prompts + 1, self._tokens + tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update()
        elif self._speaks and now - self._said >= 10.0:
            self._said = now
            left = (now - self._start) / self._prompts * (self._total - self._prompts)
            done = f"{self._prompts} of {self._total} prompts"
            print(f"{self._name}: {done}, {rate:,.0f} tokens/s, {left:,.0f} s left", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
