"""A model of transformers gets heads, trains with the flags that the import wrote, and goes back: by the commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_mtpd.checkpoint.hf.architectures.architecture import LLAMA3

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e

TRAINING = (
    "--seq-length 32 --mock-data --micro-batch-size 2 --global-batch-size 2 --train-iters 2 --lr 1e-3 "
    "--lr-decay-style constant --save-interval 100 --eval-iters 0 --split 100,0,0 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --mtpd-train heads --no-save-optim --ckpt-format torch_dist"
)


def run(tool: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_import_train_benchmark_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, **LLAMA3},
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "hf")
    said = run("convert_hf.py", "import", "--hf", tmp_path / "hf", "--save", tmp_path / "ours", "--num-heads", 2)
    assert "Qwen3ForCausalLM, 2 heads, float32" in said

    lines = (tmp_path / "ours" / "model.args").read_text().splitlines()
    assert "--use-rope-scaling --rope-scaling-factor 8.0" in lines
    flags = [word for line in lines if not line.startswith("#") for word in line.split()]
    folders = ["--load", str(tmp_path / "ours"), "--save", str(tmp_path / "trained")]
    log = run("pretrain_mtpd.py", *flags, *TRAINING.split(), *folders)
    assert "successfully loaded checkpoint" in log

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "1 2 3 4 5"}) + "\n")
    run(
        *("benchmark_acceptance.py", "--load", tmp_path / "trained", "--prompts", prompts, "--max-new-tokens", 16),
        *("--output", tmp_path / "acceptance"),
    )
    acceptance = tmp_path / "acceptance" / "acceptance.json"
    export = ["export", "--load", tmp_path / "trained", "--hf", tmp_path / "hf", "--acceptance", acceptance]
    run("convert_hf.py", *export, "--save", tmp_path / "served")
    assert "| 2 | " in (tmp_path / "served" / "README.md").read_text()

    before = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # trunk was frozen
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    fixed = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, use_mtp=True, **fixed), model.generate(prompt, **fixed))
