"""An export in vLLM on the CPU: greedy, in fp32, it gives our tokens and accepts the drafts that our decoder accepts.

vLLM pins another torch, so it has an environment of its own, `.venv-vllm`, that `tests/serving/make-env` makes
(`make test-serving` does both). All tests share one process of it, since importing it takes as long as a test.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from megatron_mtpd.checkpoint.hf.exporting import export_hf  # noqa: E402
from megatron_mtpd.speculative import loading  # noqa: E402
from megatron_mtpd.speculative.counts import Acceptance  # noqa: E402
from megatron_mtpd.speculative.decoder import Decoder  # noqa: E402
from tests.unit.checkpoint.hf.greedy import greedy, toy_prompts  # noqa: E402
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape  # noqa: E402

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
HEADS, SECONDS = 4, 600  # an answer takes 10 to 40 on a free core

pytestmark = pytest.mark.serving


class VLLM:
    """A process with vLLM that answers one question after the other; see `vllm_client`."""

    def __init__(self, log: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.log, pipe = log, subprocess.PIPE
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(PYTHON), str(Path(__file__).with_name("vllm_client.py"))],
                stdin=pipe,
                stdout=pipe,
                stderr=errors,
                text=True,
                env=environment,
            )

    def __call__(self, folder: Path, prompts: list[list[int]], new_tokens: int, heads: int = HEADS) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        question = {"folder": str(folder), "heads": heads, "prompts": prompts, "new_tokens": new_tokens}
        late = threading.Timer(SECONDS, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        assert line, f"vLLM died, or took more than {SECONDS} s:\n{self.log.read_text()[-4000:]}"
        return json.loads(line)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    if not PYTHON.exists():
        pytest.fail(f"There is no {PYTHON}: `make test-serving` makes it, and then runs these tests.")
    engine = VLLM(tmp_path_factory.mktemp("vllm") / "log")
    yield engine
    engine.process.kill()
    engine.process.communicate()


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    loading.start_distributed()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def ours(root: Path, prompts: list[list[int]], new_tokens: int, heads: int = HEADS) -> dict[str, Any]:
    """What vLLM has to answer, by our decoder, the embedding at position 0 zeroed as vLLM does."""
    model = loading.load(root).model
    decoder = Decoder(model, heads, len(prompts), 512, vocab_size=96, mask_position_0=True)
    tokens, accepted = greedy(decoder, prompts, new_tokens)
    counts = Acceptance.of_heads(heads)
    for number in chain.from_iterable(accepted):
        counts.add(heads, number)
    assert counts.num_accepted_tokens_per_pos[-1] > 0, "no draft of the last head was accepted: nothing to compare"
    return {
        "tokens": tokens,
        "accepted": accepted,
        "num_drafts": counts.num_drafts,
        "num_accepted_tokens_per_pos": counts.num_accepted_tokens_per_pos,
    }


@pytest.mark.parametrize(
    ("tied", "held", "used", "number", "new_tokens"),
    [(False, 4, 4, 50, 32), (True, 4, 4, 50, 32), (False, 4, 2, 10, 24), (False, 1, 1, 10, 24), (True, 16, 16, 8, 48)],
    ids=["untied", "tied", "two-of-four-heads", "one-head", "sixteen-heads"],
)
def test_vllm_gives_our_tokens_and_accepts_our_drafts(
    vllm: VLLM, tied: bool, held: int, used: int, number: int, new_tokens: int, tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(held, tied=tied))
    export_hf(tmp_path / "ours", tmp_path / "out", "deepseek-v3")
    prompts = toy_prompts(number, held)
    expected = ours(tmp_path / "ours", prompts, new_tokens, used)
    found = vllm(tmp_path / "out", prompts, new_tokens, used)
    assert {name: found[name] for name in expected} == expected


def test_llama_3s_scaled_rotary_positions(vllm: VLLM, tmp_path: Path) -> None:
    """Prompts long enough for them to matter."""
    prompts = [5 * prompt for prompt in toy_prompts(20, HEADS)]
    for name, factor in (("scaled", 32.0), ("unscaled", 1.0)):
        toy_checkpoint(tmp_path / name, toy_shape(HEADS, rope_scaling_factor=factor, rope_base=500_000))
    expected, unscaled = (ours(tmp_path / name, prompts, 32) for name in ("scaled", "unscaled"))
    assert expected["tokens"] != unscaled["tokens"]
    export_hf(tmp_path / "scaled", tmp_path / "out", "deepseek-v3")
    found = vllm(tmp_path / "out", prompts, 32)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("broken", range(HEADS))
def test_a_broken_head_shows_at_its_own_position_and_behind(vllm: VLLM, broken: int, tmp_path: Path) -> None:
    """So every head is used where it belongs. The output stays what it was."""
    shape = toy_shape(HEADS)
    toy_checkpoint(tmp_path / "ours", shape)
    export_hf(tmp_path / "ours", tmp_path / "out", "deepseek-v3")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.{shape.num_layers + broken}.shared_head.norm.weight"] *= -1  # it prefers what it avoided
    save_file(tensors, file, metadata={"format": "pt"})
    prompts = toy_prompts(10, HEADS)
    whole, found = ours(tmp_path / "ours", prompts, 24), vllm(tmp_path / "out", prompts, 24)
    assert found["tokens"] == whole["tokens"]
    accepted = found["num_accepted_tokens_per_pos"]
    assert all(accepted[:broken]) and not any(accepted[broken:])
