"""SIGTERM saves and exits, and the next run goes on from there."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = [
    *("--num-layers", "1", "--mtp-num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "63", "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3"),
    *("--eval-iters", "0", "--eval-interval", "100000", "--log-interval", "1", "--train-iters", "5000"),
    *("--no-create-attention-mask-in-dataloader", "--num-workers", "0", "--save-interval", "100000"),
]

pytestmark = pytest.mark.e2e


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "tools" / "pretrain_mtpd.py", *TOY, "--save", folder / "ckpt", *flags]
    command += ["--tensorboard-dir", folder / "tb"]
    with open(folder / "log", "w") as log:
        return subprocess.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def iterations(folder: Path) -> list[int]:
    file = folder / "tb" / "metrics.jsonl"
    return [json.loads(line)["iteration"] for line in file.read_text().splitlines()] if file.exists() else []


def test_sigterm_saves_and_exits(tmp_path):
    process = start(tmp_path)
    deadline = time.time() + 180
    while len(iterations(tmp_path)) < 5:
        assert process.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    log = (tmp_path / "log").read_text()
    assert "exiting program after receiving SIGTERM" in log
    saved = int((tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text())
    assert saved == iterations(tmp_path)[-1] >= 5

    process = start(tmp_path, "--load", str(tmp_path / "ckpt"), "--exit-interval", str(saved + 2))
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()[-3000:]
    assert iterations(tmp_path) == list(range(1, saved + 3))
