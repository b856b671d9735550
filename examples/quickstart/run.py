"""Quickstart: plain MTP and MTP-D, from the same seed, on Python's own sources, on a CPU in a few minutes.

What it does, by the same steps as a real run: train a tokenizer, tokenize text, pretrain twice with the real entry
(once with the distillation's weight at 0), and show what each head learned beside the main head's loss. Everything is
written under runs/quickstart; a new run replaces the results of the last one and keeps the data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from report import draw, print_table, summarize
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {"mtp": ["--mtpd-beta", "0"], "mtpd": []}


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    steps: int
    eval_iters: int


FULL = Scale(steps=600, eval_iters=20)
QUICK = Scale(steps=90, eval_iters=4)

SEQ_LENGTH, BATCH, VOCAB = 128, 8, 2048
MODEL = [
    *("--num-layers", "3", "--mtp-num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "384"),
    *("--num-attention-heads", "4", "--seq-length", str(SEQ_LENGTH), "--max-position-embeddings", str(SEQ_LENGTH)),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.02"),
]


def prepare_data(folder: Path) -> tuple[Path, Path]:
    """Tokenizer and dataset, made once: the tokenizer's model file and the dataset's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, dataset = folder / "tokenizer", folder / "tokens"
    model, tools = folder / "tokenizer.model", ROOT / "tools"
    if not model.exists():
        to_tokenizer = ["--vocab-size", VOCAB, "--output-prefix", tokenizer]
        run([tools / "train_tokenizer.py", "--input", "python-stdlib", *to_tokenizer])
    if not (folder / "tokens.idx").exists():
        tokenize = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        to_dataset = ["--output-prefix", dataset, "--workers", 2, "--force"]
        run([tools / "preprocess_data.py", "--input", "python-stdlib", *tokenize, *to_dataset])
    return model, dataset


def run(command: list) -> None:
    """A command of ours, in this Python; what it prints is shown."""
    words = [str(word) for word in command]
    print("$ python " + " ".join(os.path.relpath(w, ROOT) if w.startswith("/") else w for w in words), flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def training_command(variant: str, out: Path, tokenizer: Path, dataset: Path, scale: Scale, seed: int) -> list[str]:
    """The command that trains one variant: what a user would type."""
    data = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer, "--data-path", dataset]
    data += ["--split", "95,5,0", "--data-cache-path", out / "data" / "index", "--num-workers", "0"]
    data += ["--no-create-attention-mask-in-dataloader"]
    steps = ["--train-iters", scale.steps, "--micro-batch-size", BATCH, "--global-batch-size", BATCH, "--seed", seed]
    steps += ["--lr", "2e-3", "--min-lr", "2e-4", "--lr-decay-style", "cosine", "--weight-decay", "0.1"]
    steps += ["--lr-warmup-iters", max(1, scale.steps // 20), "--clip-grad", "1.0", "--adam-beta2", "0.95"]
    reports = ["--log-interval", "10", "--eval-interval", max(1, scale.steps // 4), "--eval-iters", scale.eval_iters]
    reports += ["--tensorboard-dir", out / "tensorboard" / variant, "--tensorboard-log-interval", "1"]
    reports += ["--save", out / "checkpoints" / variant, "--save-interval", scale.steps]
    command = [ROOT / "tools" / "pretrain_mtpd.py", *MODEL, *VARIANTS[variant], *data, *steps, *reports]
    return [str(word) for word in command]


def train(out: Path, commands: dict[str, list[str]], scale: Scale) -> None:
    """Train the variants side by side, with one bar for both. Exits with the log's end when one fails."""
    threads = max(1, (os.cpu_count() or 1) // len(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    processes, logs = {}, {}
    for variant, command in commands.items():
        logs[variant] = out / f"{variant}.log"
        with open(logs[variant], "w") as log:
            log.write("$ python " + " ".join(command) + "\n")
            log.flush()
            processes[variant] = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
            )
    quiet = not sys.stderr.isatty()
    bar = tqdm(total=scale.steps * len(commands), unit="step", mininterval=10 if quiet else 0.5, dynamic_ncols=True)
    try:
        while any(p.poll() is None for p in processes.values()):
            time.sleep(0.5)
            last = {v: last_record(out / "tensorboard" / v / "metrics.jsonl") for v in commands}
            losses = [f"{v} {r['lm loss']:.3f}" for v, r in last.items() if r.get("lm loss")]
            bar.set_postfix_str("main loss: " + ", ".join(losses), refresh=False)
            bar.update(sum(r.get("iteration", 0) for r in last.values()) - bar.n)
            for variant, process in processes.items():
                if process.poll() not in (None, 0):
                    bar.close()
                    tail = logs[variant].read_text(errors="replace").splitlines()[-30:]
                    sys.exit("\n".join([*tail, f"Training {variant} failed; the whole log: {logs[variant]}"]))
        bar.update(bar.total - bar.n)
    finally:
        bar.close()
        for process in processes.values():
            if process.poll() is None:
                process.terminate()


def last_record(path: Path) -> dict:
    """The last complete record of training in a metrics file, or {}."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode().split("\n")[:-1]
    return next((r for r in (parse(line) for line in reversed(lines)) if "lm loss" in r), {})


def parse(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:  # the first line of the window may be cut
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="QUICK=1 in the environment does the same as --quick."
    )
    parser.add_argument(
        "--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"), help="under 90 seconds"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of both variants [%(default)s]")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "quickstart", metavar="DIR", help="[%(default)s]"
    )
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    out = options.output.resolve()
    start = time.time()

    print("1/3 Text: Python's standard library, tokenized with SentencePiece", flush=True)
    tokenizer, dataset = prepare_data(out / "data")
    for old in ("checkpoints", "tensorboard"):
        shutil.rmtree(out / old, ignore_errors=True)
    for old in ("summary.json", "summary.png"):
        (out / old).unlink(missing_ok=True)

    print(f"2/3 Training plain MTP and MTP-D side by side, {scale.steps} steps each", flush=True)
    commands = {v: training_command(v, out, tokenizer, dataset, scale, options.seed) for v in VARIANTS}
    train(out, commands, scale)

    print("3/3 What was learned, on text that was held out", flush=True)
    summary = summarize(out, commands, tokens=scale.steps * BATCH * SEQ_LENGTH, seed=options.seed)
    draw(summary, out / "summary.png")
    print_table(summary)
    shown = os.path.relpath(out)
    print(f"\n{time.time() - start:.0f} s. Picture: {shown}/summary.png, numbers: {shown}/summary.json")
    print(f"To watch it:       .venv/bin/tensorboard --logdir {shown}/tensorboard")
    print(f"The real command:  head -1 {shown}/mtpd.log")


if __name__ == "__main__":
    main()
