"""transformers' own `generate(use_mtp=True)` on an export, against our decoder: tokens and accepted drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.decoder import Decoder
from tests.unit.checkpoint.hf.greedy import greedy, toy_prompts
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape

HEADS, NEW = 4, 24


def theirs(model: Any, prompt: list[int], matches: list[int]) -> tuple[list[int], list[int]]:
    """Greedy tokens, and how many drafts each step accepted.

    Asked for as many tokens more as there are heads, since it cuts the last step's count at what was asked for. Its
    first step is the prompt's pass, without drafts. Without a mask it would take tokens of the prompt for padding.
    """
    matches.clear()
    ids = torch.tensor([prompt])
    fixed = {"do_sample": False, "max_new_tokens": NEW + HEADS, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), use_mtp=True, **fixed)[0, len(prompt) :].tolist()
    return tokens[:NEW], matches[1:]


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({}, 50),
        ({"tied": True}, 8),
        ({"rope_factor": 4}, 8),
        ({"rope_scaling_factor": 32.0}, 8),
        ({"qkv_bias": True}, 8),
        ({"qk_norm": True}, 8),
    ],
    ids=["llama", "tied", "scaled", "llama-3", "qwen2", "qwen3"],
)
def test_transformers_accepts_what_we_accept(
    options: dict[str, Any], number: int, tmp_path: Path, one_process: None, matches: list[int]
) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(HEADS, **options))
    export_hf(tmp_path / "ours", tmp_path / "out")
    prompts = toy_prompts(number, HEADS)
    decoder = Decoder(loading.load(tmp_path / "ours").model, HEADS, number, 512, vocab_size=96)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    seen: set[int] = set()
    for prompt, tokens, accepted in zip(prompts, *greedy(decoder, prompts, NEW), strict=True):
        found, counts = theirs(model, prompt, matches)
        assert (found, counts[: len(accepted)]) == (tokens, accepted)
        seen |= set(accepted)
    assert {0, HEADS} < seen, "too few different numbers of accepted drafts to tell heads apart"
