"""Runs of the real entry that are continued: bit for bit where nothing changed, and in other parallel layouts.

Each run saves after half of its iterations and goes on; another one is started from that checkpoint. With the weights
alone it would not follow: Adam's moments, the schedule, the place in the data and the random state decide as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtpd.checkpoint.iterations import check_loadable

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, SAVED = 6, 3
TOY = [
    *("--num-layers", "2", "--mtp-num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--group-query-attention", "--num-query-groups", "2", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights", "--attention-dropout", "0"),
    *("--hidden-dropout", "0", "--seq-length", "16", "--max-position-embeddings", "16", "--mtpd-top-n", "20"),
    # 255 and the end of documents: padded to 256 whether one or two ranks share it
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--min-lr", "1e-4"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--clip-grad", "1.0", "--train-iters", str(ITERATIONS)),
    *(
        "--eval-iters",
        "0",
        "--eval-interval",
        "1000",
        "--log-interval",
        "1",
        "--mtpd-distill-start",
        "1",
        "--mtpd-distill-ramp",
        "4",
    ),
    *("--save-interval", str(SAVED), "--use-cpu-initialization"),
]
LAYOUTS = {
    "one": (1, []),
    "one-dropout": (1, ["--attention-dropout", "0.1"]),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]),
    "dp2-sharded": (2, ["--use-distributed-optimizer"]),
    "one-sharded": (1, ["--use-distributed-optimizer"]),
}

pytestmark = [pytest.mark.e2e, pytest.mark.distributed, pytest.mark.slow]


def run(folder: Path, layout: str, *flags: str) -> dict[int, dict[str, float]]:
    """Train and give the metrics of every iteration."""
    ranks, parallel = LAYOUTS[layout]
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    jsonl = folder / "metrics.jsonl"
    command = [*start, str(ROOT / "tools" / "pretrain_mtpd.py"), *TOY, *parallel, *flags, "--metrics-jsonl", str(jsonl)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    records = [json.loads(line) for line in jsonl.read_text().splitlines()]
    timings = ("time", "throughput")
    return {
        record["iteration"]: {k: v for k, v in record.items() if not any(word in k for word in timings)}
        for record in records
    }


def first_run(folder: Path, layout: str) -> tuple[str, dict]:
    """The checkpoints of a run, and its second half."""
    for part in ("first", "second"):
        (folder / part).mkdir()
    checkpoints = str(folder / "checkpoints")
    whole = run(folder / "first", layout, "--save", checkpoints)
    assert list(whole) == list(range(1, ITERATIONS + 1))
    return checkpoints, {iteration: whole[iteration] for iteration in range(SAVED + 1, ITERATIONS + 1)}


def test_the_curve_continues_bit_for_bit(tmp_path):
    """From the last good checkpoint, because the last one is damaged. That one is saved again, and good then."""
    checkpoints, whole = first_run(tmp_path, "one-dropout")
    data = next(Path(checkpoints, f"iter_{ITERATIONS:07d}").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    own = ("--load", checkpoints, "--save", checkpoints, "--resume-from-last-good")
    assert run(tmp_path / "second", "one-dropout", *own) == whole
    assert check_loadable(Path(checkpoints)) == ITERATIONS


@pytest.mark.parametrize(
    ("layout", "other"), [("tp2-pp2", "one"), ("dp2-sharded", "one-sharded")], ids=["tp2-pp2", "dp2-sharded"]
)
def test_it_continues_in_one_process(tmp_path, layout, other):
    """The same numbers, added in another order. Measured: 5e-6, and 1e-2 without Adam's moments."""
    checkpoints, whole = first_run(tmp_path, layout)
    resumed = run(tmp_path / "second", other, "--load", checkpoints, "--ckpt-step", str(SAVED))
    assert resumed.keys() == whole.keys()
    for iteration, record in whole.items():
        losses = {
            k: v for k, v in record.items() if k.startswith(("lm loss", "cross_entropy", "distillation", "grad_norm"))
        }
        assert losses == pytest.approx({name: resumed[iteration][name] for name in losses}, rel=1e-4), iteration
