"""An export in vLLM on the CPU: its greedy output and its counts of accepted drafts are ours.

vLLM pins another torch, so it has an environment of its own, `.venv-vllm`, that `tests/serving/make-env` makes
(`make test-serving` does both).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402

from megatron_mtpd.checkpoint.hf.exporting import export_hf  # noqa: E402
from megatron_mtpd.speculative import loading  # noqa: E402
from megatron_mtpd.speculative.decoder import Decoder  # noqa: E402
from megatron_mtpd.speculative.generate import Request, generate  # noqa: E402
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape, toy_weight  # noqa: E402

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
HEADS, NEW = 4, 40

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there: tests/serving/make-env makes it"),
]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    loading.start_distributed()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def prompts(number: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 13, (number,), generator=random).tolist()
    return [torch.randint(0, 96, (length,), generator=random).tolist() for length in lengths]


def vllm(folder: Path, asked: list[list[int]], heads: int = HEADS) -> list[dict[str, Any]]:
    client = Path(__file__).with_name("vllm_client.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(client), str(folder), str(heads), str(NEW)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(root: Path, asked: list[list[int]], heads: int = HEADS) -> list[dict[str, Any]]:
    """By our decoder, one prompt at a time, the embedding at position 0 zeroed as vLLM does."""
    decoder = Decoder(loading.load(root).model, heads, 1, 256, vocab_size=96, mask_position_0=True)
    found = []
    for prompt in asked:
        (done,) = generate(decoder, [Request(0, prompt, NEW)])
        counts = done.acceptance
        accepted = counts.num_accepted_tokens_per_pos
        found.append({"tokens": done.tokens, "num_drafts": counts.num_drafts, "num_accepted_tokens_per_pos": accepted})
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_gives_our_tokens_and_accepts_our_drafts(tied: bool, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(HEADS, tied=tied))
    export_hf(tmp_path / "ours", tmp_path / "out", "deepseek-v3")
    asked = prompts(10 if tied else 50)
    expected = ours(tmp_path / "ours", asked)
    assert vllm(tmp_path / "out", asked) == expected
    total = [sum(counts) for counts in zip(*(e["num_accepted_tokens_per_pos"] for e in expected), strict=True)]
    assert total[-1] > 0, "no draft of the last head was accepted: there is nothing to compare"


@pytest.mark.parametrize("broken", range(HEADS))
def test_a_broken_head_shows_at_its_own_position_and_behind(broken: int, tmp_path: Path) -> None:
    """So every head is used where it belongs. The output stays what it was."""
    from safetensors.torch import load_file, save_file

    shape = toy_shape(HEADS)
    toy_checkpoint(tmp_path / "ours", shape)
    export_hf(tmp_path / "ours", tmp_path / "out", "deepseek-v3")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.{shape.num_layers + broken}.shared_head.norm.weight"
    tensors[name] = -toy_weight(f"mtp.layers.{broken}.final_layernorm.weight", shape)  # it prefers what it avoided
    save_file(tensors, file, metadata={"format": "pt"})
    asked = prompts(6)
    whole, found = ours(tmp_path / "ours", asked), vllm(tmp_path / "out", asked)
    assert [answer["tokens"] for answer in found] == [answer["tokens"] for answer in whole]
    totals = [sum(counts) for counts in zip(*(a["num_accepted_tokens_per_pos"] for a in found), strict=True)]
    assert all(totals[:broken]) and not any(totals[broken:])
