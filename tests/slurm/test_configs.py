"""The model configurations in slurm/configs: Megatron accepts them at every size that they have a layout for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "slurm" / "configs"
GPUS, VOCABULARY = 8, 122_880  # a node's; the paper's

# Parses the flags of every layout as rank 0 of the real number of ranks, on a GPU that is not there.
PARSE = """
import json, os, sys
from megatron_mtpd.training import pretrain
from megatron_mtpd import platform
import torch
platform.check_flags = lambda flags: None
torch.cuda.get_device_capability = lambda *device: (9, 0)
found = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Megatron's messages
for ranks, flags in json.load(sys.stdin):
    if os.fork() == 0:
        os.environ |= {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
        args = pretrain.parse(flags)
        pretrain.model_config_from_args(args)
        names = ["data_parallel_size", "global_batch_size", "micro_batch_size", "hidden_size", "ffn_hidden_size",
                 "num_attention_heads", "num_query_groups", "kv_channels", "num_experts", "moe_router_topk",
                 "moe_ffn_hidden_size", "mtp_num_layers", "hybrid_layer_pattern", "exit_signal"]
        print(json.dumps({name: getattr(args, name) for name in names}, default=str), file=found, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""


def words(file: Path) -> list[str]:
    lines = subprocess.run(
        ["bash", "-c", f"source {ROOT}/slurm/entry.sh; arguments_of {file}"], capture_output=True, text=True, check=True
    )
    return lines.stdout.splitlines()


def sizes(model: str) -> list[int]:
    return sorted(int(file.stem.removeprefix("nodes-")) for file in (CONFIGS / model).glob("nodes-*.args"))


@pytest.fixture(scope="module")
def parsed() -> dict[tuple[str, int], dict]:
    """By model and number of nodes: what Megatron makes of the flags."""
    cases = [(folder.name, nodes) for folder in sorted(CONFIGS.iterdir()) for nodes in sizes(folder.name)]
    own = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY - 1)]
    own += ["--exit-signal-handler", "--exit-signal", "SIGUSR1"]
    flags = [
        (nodes * GPUS, words(CONFIGS / model / "model.args") + words(CONFIGS / model / f"nodes-{nodes}.args") + own)
        for model, nodes in cases
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE], input=json.dumps(flags), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_layout_is_accepted(parsed: dict[tuple[str, int], dict]) -> None:
    for case, args in parsed.items():
        assert args["global_batch_size"] % (args["data_parallel_size"] * args["micro_batch_size"]) == 0, case
        assert args["exit_signal"] == signal.SIGUSR1


@pytest.mark.parametrize("model", ["dense-2b", "moe-10b-a1b"])
def test_the_paper_s_models_have_a_layout_for_each_size_and_train_the_same(model, parsed) -> None:
    assert sizes(model) == [1, 4, 32, 256]
    of_the_recipe = ("global_batch_size", "hybrid_layer_pattern", "hidden_size", "num_experts")
    assert len({tuple(parsed[model, nodes][name] for name in of_the_recipe) for nodes in sizes(model)}) == 1


def parameters(args: dict, active: bool = False) -> float:
    """Billions of parameters of the main model, from the arithmetic of a transformer."""
    hidden, kv = args["hidden_size"], args["kv_channels"]
    attention = 2 * hidden * kv * (args["num_attention_heads"] + args["num_query_groups"])
    if args["num_experts"]:
        experts = args["moe_router_topk"] if active else args["num_experts"]
        mlp = experts * 3 * hidden * args["moe_ffn_hidden_size"] + hidden * args["num_experts"]
    else:
        mlp = 3 * hidden * args["ffn_hidden_size"]
    blocks = args["hybrid_layer_pattern"].split("/")[0].count("*")
    return (blocks * (attention + mlp) + 2 * VOCABULARY * hidden) / 1e9


def test_the_sizes_are_the_paper_s(parsed: dict[tuple[str, int], dict]) -> None:
    assert parameters(parsed["dense-2b", 1]) == pytest.approx(2, rel=0.05)
    assert parameters(parsed["moe-10b-a1b", 1]) == pytest.approx(10, rel=0.05)
    assert parameters(parsed["moe-10b-a1b", 1], active=True) == pytest.approx(1, rel=0.05)
    assert all(parsed[case]["mtp_num_layers"] == 4 for case in parsed if case[0] != "tiny")
