"""Continuations of many prompts: a batch whose finished sequences leave and whose free places are filled at once.

Every sequence has random numbers of its own, from the seed and its key: what is drawn for it depends neither on its
neighbours nor on how prompts are dealt over ranks.

Deliberately absent: text; prompts and continuations are token ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.decoder import Decoder


@dataclass(frozen=True)
class Request:
    """A prompt of at least one token, and how many tokens to generate at most. `key` tells requests apart."""

    key: int
    prompt: list[int]
    max_new_tokens: int


@dataclass
class Generation:
    """What became of a request.

    Attributes:
        tokens: new tokens, with the end-of-document token if that ended it.
        acceptance: counts of its drafts.
        num_steps: passes of the main model after the prompt's.
        seconds: time since the generation before it was done. The sum over all is the time of the whole.
        prefill_seconds: the part of it that went into prompts.
        draft_seconds: the part of it that went into drafting.
    """

    key: int
    tokens: list[int]
    acceptance: Acceptance
    num_steps: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0


@dataclass
class _Row:
    request: Request
    generation: Generation
    random: torch.Generator
    done: bool = field(default=False)

    def extend(self, tokens: list[int], eod: int | None) -> None:
        """Take new tokens, up to the end of the document and of what was asked for."""
        mine, limit = self.generation.tokens, self.request.max_new_tokens
        for token in tokens:
            mine.append(token)
            if token == eod or len(mine) >= limit:
                self.done = True
                return


def room_for(decoder: Decoder) -> int:
    """The most tokens that prompt and continuation may have together."""
    return decoder.state.capacity - decoder.num_heads - 1


def generate(
    decoder: Decoder, requests: Iterable[Request], eod: int | None = None, seed: int = 0
) -> Iterator[Generation]:
    """Continue the requests, in the order in which they end. Raises ValueError for one that does not fit."""
    waiting = iter(requests)
    rows: list[_Row] = []
    clock = _Clock(decoder)
    while True:
        arrived = [_row(decoder, r, seed) for r in islice(waiting, decoder.state.slots - len(rows))]
        if arrived:
            clock.prefill_begins()
            draws = None
            if not decoder.sampling.greedy:
                draws = torch.stack([torch.rand((), dtype=torch.float64, generator=row.random) for row in arrived])
            firsts = decoder.prefill(len(rows), [row.request.prompt for row in arrived], draws)
            clock.prefill_ends()
            for row, first in zip(arrived, firsts, strict=True):
                row.extend([first], eod)
            rows += arrived
        elif not rows:
            return
        for slot in reversed(range(len(rows))):
            if rows[slot].done:
                row, last = rows[slot], rows.pop()
                if row is not last:
                    decoder.state.move(len(rows), slot)
                    rows[slot] = last
                mine = row.generation
                mine.seconds, mine.prefill_seconds, mine.draft_seconds = clock.lap()
                yield mine
        if rows:
            _step(decoder, rows, eod)


def _row(decoder: Decoder, request: Request, seed: int) -> _Row:
    length = len(request.prompt) + request.max_new_tokens
    if not request.prompt or request.max_new_tokens < 1 or length > room_for(decoder):
        raise ValueError(
            f"Request {request.key} has {len(request.prompt)} tokens and asks for {request.max_new_tokens}: give at "
            f"least one of each, and at most {room_for(decoder)} together."
        )
    # Two numbers into one seed; the generator mixes it further.
    random = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + request.key) % 2**63)
    return _Row(request, Generation(request.key, [], Acceptance.of_heads(decoder.num_heads)), random)


def _step(decoder: Decoder, rows: list[_Row], eod: int | None) -> None:
    draws = None
    if not decoder.sampling.greedy:
        size = 2 * decoder.num_heads + 1
        draws = torch.stack([torch.rand(size, dtype=torch.float64, generator=row.random) for row in rows])
    done = decoder.step(len(rows), draws)
    for row, tokens, drafted in zip(rows, done.tokens, done.num_drafted, strict=True):
        row.generation.num_steps += 1
        row.generation.acceptance.add(drafted, len(tokens) - 1)
        row.extend(tokens, eod)


def now(device: torch.device) -> float:
    """Seconds of `time.perf_counter`, when all is done that a device has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Clock:
    """Wall time between laps, and how much of it was prefill and drafting."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._draft = decoder, decoder.draft_seconds
        self._lap, self._prefill, self._begin = time.perf_counter(), 0.0, 0.0

    def prefill_begins(self) -> None:
        self._begin = now(self._decoder.device)

    def prefill_ends(self) -> None:
        self._prefill += now(self._decoder.device) - self._begin

    def lap(self) -> tuple[float, float, float]:
        end, draft = now(self._decoder.device), self._decoder.draft_seconds
        parts = end - self._lap, self._prefill, draft - self._draft
        self._lap, self._prefill, self._draft = end, 0.0, draft
        return parts
