"""transformers' own `generate(use_mtp=True)` on an export, against our decoder: tokens and accepted drafts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import candidate_generator

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.decoder import Decoder
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape

HEADS, NEW = 4, 60
# Shorter ones than there are heads raise an error in transformers 5.23.
PROMPTS = [[5, 17, 3, 80], [24, 7, 24, 7, 24], list(range(1, 11)), [72, 48, 9, 24]]


def ours(model: MTPDModel, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Greedy tokens, and how many drafts each step accepted."""
    decoder = Decoder(model, HEADS, 1, 256, vocab_size=96)
    tokens, accepted = decoder.prefill(0, [prompt]), []
    while len(tokens) < NEW:
        (committed,) = decoder.step(1).tokens
        tokens += committed
        accepted.append(len(committed) - 1)
    return tokens, accepted


@pytest.fixture
def matches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many drafts each step of transformers accepted, as it goes."""
    found: list[int] = []

    def record(self: Any, input_ids: Any, scores: Any, num_matches: Any) -> None:
        found.append(int(num_matches))

    monkeypatch.setattr(candidate_generator.MTPCandidateGenerator, "update_candidate_strategy", record)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"qkv_bias": True}, {"qk_norm": True}], ids=["llama", "tied", "qwen2", "qwen3"]
)
def test_transformers_accepts_what_we_accept(
    options: dict[str, Any], tmp_path: Path, one_process: None, matches: list[int]
) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(HEADS, **options))
    export_hf(tmp_path / "ours", tmp_path / "out")
    model = loading.load(tmp_path / "ours").model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    fixed = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    seen = set()
    for prompt in PROMPTS:
        tokens, accepted = ours(model, prompt)
        matches.clear()
        found = theirs.generate(torch.tensor([prompt]), use_mtp=True, **fixed)[0, len(prompt) :].tolist()
        plain = theirs.generate(torch.tensor([prompt]), **fixed)[0, len(prompt) :].tolist()
        assert tokens[:NEW] == found == plain
        # Its first step is the prompt's pass, without drafts; the last ones are cut at the number of tokens asked for.
        steps = len(matches) - 3
        assert accepted[:steps] == matches[1 : steps + 1]
        seen |= set(accepted[:steps])
    assert len(seen) >= 3, "too few different numbers of accepted drafts to tell heads apart"
