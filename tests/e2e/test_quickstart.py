"""`make quickstart`'s command, at its smallest: the whole way from text to a table."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD_FIELDS = {"cross_entropy", "kl", "acceptance_rate", "cumulative_acceptance_rate", "overlap"}


@pytest.mark.e2e
@pytest.mark.slow
def test_quickstart(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart" / "run.py", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "QUICK": "1"}, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    for variant in ("mtp", "mtpd"):
        result = summary[variant]
        assert 0 < result["main_loss"] < math.log(2048) - 1, "the main head learned something"
        assert len(result["heads"]) == 4
        for head in result["heads"]:
            assert set(head) == HEAD_FIELDS
            assert 0 < head["cross_entropy"] < math.log(2048) - 1
            assert head["kl"] > 0
            assert 0 <= head["cumulative_acceptance_rate"] <= head["acceptance_rate"] <= 1
            assert 0 < head["overlap"] < 1
        rates = [head["cumulative_acceptance_rate"] for head in result["heads"]]
        assert rates == sorted(rates, reverse=True)
        assert 1 <= result["tokens_per_step"] <= 5
        assert (tmp_path / "checkpoints" / variant / "latest_checkpointed_iteration.txt").exists()
        decoding = result["decoding"]
        assert decoding["complete"] and [run["num_heads"] for run in decoding["runs"]] == [0, 1, 4]
        for run in decoding["runs"][1:]:
            assert 1 <= run["acceptance_length"] <= 1 + run["num_heads"]
            assert run["speedup_vs_autoregressive"] > 0
            assert run["outputs_equal_to_plain"] == "6 of 6"
        # Same heads, other text: after so little training acceptance is far from even, but it is there.
        assert decoding["runs"][-1]["num_accepted_tokens_per_pos"][0] > 0
        assert decoding["step_cost"]["best_num_heads_predicted"] in range(5)
        assert decoding["settings"]["checkpoint"].endswith(f"checkpoints/{variant}/iter_0000090")
        assert list((tmp_path / "tensorboard" / variant).glob("events.out.tfevents.*"))
    assert summary["mtp"]["main_loss"] != summary["mtpd"]["main_loss"], "the variants differ"
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert "main head: loss" in done.stdout and "MTP-D" in done.stdout
    assert "4 heads: tokens a step" in done.stdout and "speed over plain decoding" in done.stdout
