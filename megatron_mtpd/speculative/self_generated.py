"""Text that a checkpoint writes itself, to train heads on what it says (FastMTP, arXiv 2509.18362).

Documents are continuations of given prompts, or questions that an instruct model asks itself and answers (Magpie,
arXiv 2406.08464: see `chat`). Each document has random numbers of its own, so that batches, ranks and reruns change
nothing in it but the last bits of its logits. Each part is on disk as soon as it is there (`results`): a rerun
does what is left, and the JSONL appears whole when all is done.

Training sees exactly the tokens that were generated, because preprocessing takes token ids: a tokenizer would cut the
text of many documents into other tokens than the model chose. There is no communication between replicas until all are
done.

Deliberately absent: filtering by quality, and several turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.chat import UserTurn, user_turn
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.options import require_at_least
from megatron_mtpd.speculative.prompts import Prompt, read_prompts
from megatron_mtpd.speculative.results import Results
from megatron_mtpd.speculative.sampling import Sampling
from megatron_mtpd.speculative.worker import NumberTokenizer, Progress

TEXTS, SUMMARY = "generated.jsonl", "summary.json"
QUESTIONS, DOCUMENTS = "questions", "documents"


@dataclass(frozen=True)
class Options:
    """What is written, and where to. Raises ValueError for values that cannot work."""

    load: Path
    output: Path
    prompts: Sequence[str] = ()
    """Files as the acceptance benchmark reads them, `PATH` or `NAME=PATH`."""
    samples: int = 1
    """Continuations of each prompt."""
    chat: bool = False
    """Ask the prompts by the chat template."""
    questions: int = 0
    """Documents of which the model writes the question too. A rerun may ask for more."""
    num_heads: int = 0
    """Heads that draft."""
    max_new_tokens: int = 256
    """Of each turn that the model writes."""
    batch_size: int = 32
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    ckpt_step: int | None = None
    tensor_parallel: int = 1
    dtype: str | None = None
    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        require_at_least(self, samples=1, questions=0, num_heads=0, max_new_tokens=1, batch_size=1)
        if not self.prompts and not self.questions:
            raise ValueError("There is nothing to generate: give --prompts, or --questions for the model's own.")
        if self.sampling.greedy and (self.questions or self.samples > 1):
            raise ValueError("--temperature 0 writes one text again and again: give one above 0.")


def run(options: Options) -> dict[str, Any] | None:
    """Generate what is left, and on rank 0 write `generated.jsonl` and return what `summary.json` holds.

    A line of the JSONL: `tokens`, the document's ids; `text`, the same for people; `prompt_tokens`, how many of these,
    from the first, were given and not generated; `ended`, whether the model ended it. Every rank of the job calls it.
    Raises ValueError or CheckpointError before anything is generated or written, and ValueError where no document came
    of it.
    """
    prompts = [prompt for prompt in read_prompts(options.prompts) for _ in range(options.samples)]
    loading.start_distributed(options.tensor_parallel)
    # Where all ranks meet at the end, without a limit to speak of: a replica may take far longer than another.
    everyone: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    loaded = loading.load(options.load, options.ckpt_step, options.dtype)
    tokenizer = _tokenizer(loaded, options)
    turn = user_turn(tokenizer) if options.questions or options.chat else None
    writer = Writer(options, loaded, tokenizer, turn, prompts)
    settings = _settings(options, loaded, tokenizer, turn, prompts)
    results = Results(options.output, settings, dist.get_rank())
    writer.run(results)
    results.close()
    dist.barrier(group=everyone)
    number = len(prompts) + options.questions
    return None if dist.get_rank() else _finish(options, number, tokenizer, settings, results)


def _tokenizer(loaded: loading.Loaded, options: Options) -> Tokenizer:
    kind = options.tokenizer_type or loaded.args.tokenizer_type
    if kind == NumberTokenizer.type:
        return NumberTokenizer(loaded.args.vocab_size)
    return load_tokenizer(kind, options.tokenizer_model or str(loaded.args.tokenizer_model))


def _settings(
    options: Options, loaded: loading.Loaded, tokenizer: Tokenizer, turn: UserTurn | None, prompts: list[Prompt]
) -> dict[str, Any]:
    """What decides the text of each document."""
    return {
        "checkpoint": str(loaded.directory.resolve()),
        "iteration": loaded.iteration,
        "tokenizer": tokenizer.sha256(),
        "turn": turn and list(turn),
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest(),
        "chat": options.chat,
        "num_heads": options.num_heads,
        "max_new_tokens": options.max_new_tokens,
        "dtype": str(loaded.args.params_dtype).removeprefix("torch."),
        **asdict(options.sampling),
        "seed": options.seed,
    }


class Writer:
    """One replica's work. All ranks of a tensor-parallel group do the same; the first of them writes.

    Raises ValueError where nothing fits into the sequence length of training.
    """

    def __init__(
        self,
        options: Options,
        loaded: loading.Loaded,
        tokenizer: Tokenizer,
        turn: UserTurn | None,
        prompts: list[Prompt],
    ) -> None:
        self.options, self.loaded, self.tokenizer = options, loaded, tokenizer
        self.turn, self.prompts = turn, prompts
        self.first = tokenizer.encode([""])[0]
        """What the tokenizer puts before every text: usually nothing, or a token for the beginning."""
        self.before = self.first + (self._encode(turn.before) if turn else [])
        self.question_end = tokenizer.eod if turn is None or turn.end is None else turn.end
        if options.num_heads > loaded.num_heads:
            raise ValueError(
                f"--num-heads {options.num_heads}: the model has {loaded.num_heads} heads; give at most that many."
            )
        if options.questions and not self.before:
            raise ValueError(
                f"--questions {options.questions}: the chat template of {tokenizer.model} has nothing before the "
                "user's words to start a question with. Give --prompts."
            )
        longest, new = loaded.args.max_position_embeddings, options.max_new_tokens
        self.longest_prompt = longest - new
        answered = len(self.before) + new + len(self._encode(turn.behind)) if options.questions and turn else 1
        if answered > self.longest_prompt:
            raise ValueError(
                f"--max-new-tokens {new} leaves no room for prompts in the {longest} tokens of training: give less."
            )

    def run(self, results: Results) -> None:
        """Write this replica's share of what is not written yet."""
        there = {(line["run"], line["prompt"]): line for line in results.lines()}
        dist.barrier()  # all ranks read before any of them writes: they have to deal from the same list
        left = [i for i in range(len(self.prompts) + self.options.questions) if (DOCUMENTS, i) not in there]
        share = left[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
        writes = parallel_state.get_tensor_model_parallel_rank() == 0
        append: Callable = results.append if writes else lambda *_, **__: None

        own = [i for i in share if i >= len(self.prompts)]
        questions = {i: there[QUESTIONS, i]["tokens"] for i in own if (QUESTIONS, i) in there}
        for index, tokens in self._continue(QUESTIONS, {i: self.before for i in own if i not in questions}):
            append(QUESTIONS, index, tokens=tokens)
            questions[index] = tokens

        starts: dict[int, list[int]] = {}
        given: dict[int, int] = {}
        for index in share:
            own_question = questions.get(index)
            try:
                starts[index] = self._prompt(index) if own_question is None else self._asked(own_question)
            except ValueError as error:
                append(DOCUMENTS, index, error=str(error))
            else:
                given[index] = len(starts[index] if own_question is None else self.before)
        for index, tokens in self._continue(DOCUMENTS, starts):
            ended = tokens[-1] == self.tokenizer.eod
            append(DOCUMENTS, index, tokens=starts[index] + tokens, prompt_tokens=given[index], ended=ended)

    def _encode(self, text: str) -> list[int]:
        """Token ids of a piece of a document."""
        return self.tokenizer.encode([text])[0][len(self.first) :]

    def _prompt(self, index: int) -> list[int]:
        """Token ids of a prompt. Raises ValueError, saying why there are none."""
        prompt = self.prompts[index]
        if prompt.error:
            raise ValueError(prompt.error)
        ids = list(prompt.tokens[: prompt.given])
        if ids and self.options.chat:
            raise ValueError("it is token ids, which no chat template goes around: leave --chat out")
        if not ids:
            ids = self.first + self._encode(self.turn.around(prompt.text) if self.turn else prompt.text)
        if not ids or len(ids) > self.longest_prompt:
            raise ValueError(f"{len(ids)} tokens; with --max-new-tokens there is room for {self.longest_prompt}")
        if max(ids) >= self.tokenizer.vocab_size or min(ids) < 0:
            raise ValueError("token ids outside the vocabulary")
        return ids

    def _asked(self, question: list[int]) -> list[int]:
        """Token ids up to where the answer begins. Raises ValueError for what is no whole question."""
        assert self.turn is not None
        if question[-1] != self.question_end or len(question) == 1:
            raise ValueError("the question is empty" if len(question) == 1 else "the question has no end")
        return self.before + question[:-1] + self._encode(self.turn.behind)

    def _continue(self, run: str, starts: dict[int, list[int]]) -> Iterator[tuple[int, list[int]]]:
        """New tokens of each, in the order in which they end."""
        if not starts:
            return
        options, vocabulary = self.options, self.tokenizer.vocab_size
        slots = min(options.batch_size, len(starts))
        capacity = max(map(len, starts.values())) + options.max_new_tokens + options.num_heads + 1
        decoder = Decoder(self.loaded.model, options.num_heads, slots, capacity, vocabulary, options.sampling)
        # Two keys a document, so that question and answer draw random numbers of their own.
        is_last = run == DOCUMENTS
        requests = (Request(2 * i + is_last, ids, options.max_new_tokens) for i, ids in starts.items())
        with Progress(run, len(starts)) as advance:
            for done in generate(decoder, requests, self.tokenizer.eod if is_last else self.question_end, options.seed):
                yield done.key // 2, done.tokens
                advance(len(done.tokens))


def _finish(
    options: Options, number: int, tokenizer: Tokenizer, settings: dict[str, Any], results: Results
) -> dict[str, Any]:
    """Write the JSONL, the first `number` documents in order, and what it holds."""
    lines = [line for line in results.lines() if line["run"] == DOCUMENTS and line["prompt"] < number]
    if all("error" in line for line in lines):
        reasons = sorted({line["error"] for line in lines})
        raise ValueError(f"Not one of {number} documents has text: {'; '.join(reasons[:3])}.")
    counts = dict.fromkeys(("documents", "tokens", "generated_tokens", "left_out"), 0)
    with written_whole(options.output / TEXTS) as file:
        for line in sorted(lines, key=lambda line: line["prompt"]):
            if "error" in line:
                counts["left_out"] += 1
                continue
            record = {name: line[name] for name in ("tokens", "prompt_tokens", "ended")}
            file.write(json.dumps({"text": tokenizer.decode(line["tokens"]), **record}).encode() + b"\n")
            counts["documents"] += 1
            counts["tokens"] += len(line["tokens"])
            counts["generated_tokens"] += len(line["tokens"]) - line["prompt_tokens"]
    found = {**counts, "settings": settings, "provenance": provenance()}
    with written_whole(options.output / SUMMARY) as file:
        file.write(json.dumps(found, indent=1).encode())
    return found


def for_terminal(found: dict[str, Any], output: Path) -> str:
    """What `run` returned, for a person."""
    lines = [
        f"{output / TEXTS}: {found['documents']:,} documents, {found['tokens']:,} tokens, "
        f"{found['generated_tokens']:,} of them generated"
    ]
    if found["left_out"]:
        lines.append(f"left out: {found['left_out']:,} without a usable prompt or a whole question")
    return "\n".join(lines)
