"""Prompts for the small models, and what our decoder makes of them, step by step: what another engine must repeat."""

from __future__ import annotations

import torch

from megatron_mtpd.speculative.decoder import Decoder


def toy_prompts(number: int, num_heads: int) -> list[list[int]]:
    """Of tokens of `models.toy_shape`, at least as many as there are heads, at most 8 more.

    With fewer, transformers (5.23) raises an error, and vLLM (0.32) goes on: it runs the heads anew over as many
    positions as there are heads, from before the first one of the text, and drafts something else.
    """
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(num_heads, num_heads + 9, (number,), generator=random).tolist()
    return [torch.randint(0, 96, (length,), generator=random).tolist() for length in lengths]


def greedy(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of each prompt its new tokens, and how many drafts each step accepted; the last step's counts whole.

    `decoder` has a slot for each prompt.
    """
    tokens = [[first] for first in decoder.prefill(0, prompts)]
    accepted: list[list[int]] = [[] for _ in prompts]
    while min(map(len, tokens)) < new_tokens:
        for mine, numbers, committed in zip(tokens, accepted, decoder.step(len(prompts)).tokens, strict=True):
            if len(mine) < new_tokens:  # the others go on, unseen, until all have enough
                mine += committed
                numbers.append(len(committed) - 1)
    return [mine[:new_tokens] for mine in tokens], accepted
