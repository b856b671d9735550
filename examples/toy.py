"""What the examples on a CPU share: the text, the small model, and training several variants side by side.

Every variant is trained by the real entry in a process of its own; the examples differ in what they vary and show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SEQ_LENGTH, BATCH, VOCAB = 128, 8, 2048
TOKENS_PER_STEP = SEQ_LENGTH * BATCH
MODEL = [
    *("--num-layers", "3", "--hidden-size", "128", "--ffn-hidden-size", "384", "--num-attention-heads", "4"),
    *("--seq-length", str(SEQ_LENGTH), "--max-position-embeddings", str(SEQ_LENGTH)),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--init-method-std", "0.02"),
]
# The output layer learns from the heads too, as in Megatron's own MTP and in the paper.
WITH_OUTPUT = ["--mtpd-ce-output-share", "1", "--mtpd-kd-output-share", "1"]
PLAIN_MTP = ["--mtpd-beta", "0", *WITH_OUTPUT]
AS_PUBLISHED = ["--mtpd-distill-start", "0", *WITH_OUTPUT]


def keep_settings(out: Path, settings: dict) -> None:
    """Stages of other settings must not be taken for those of this run."""
    path = out / "settings.json"
    if path.exists() and (found := json.loads(path.read_text())) != settings:
        sys.exit(f"{out} was made with other options ({found}): name another --output, or delete it.")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def prepare_data(folder: Path) -> tuple[Path, Path]:
    """Tokenizer and dataset of Python's standard library, made once: the tokenizer's file and the dataset's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, dataset = folder / "tokenizer", folder / "tokens"
    model, tools = folder / "tokenizer.model", ROOT / "tools"
    if not model.exists():
        to_tokenizer = ["--vocab-size", VOCAB, "--output-prefix", tokenizer]
        _run([tools / "train_tokenizer.py", "--input", "python-stdlib", *to_tokenizer])
    if not (folder / "tokens.idx").exists():
        tokenize = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
        to_dataset = ["--output-prefix", dataset, "--workers", 2, "--force"]
        _run([tools / "preprocess_data.py", "--input", "python-stdlib", *tokenize, *to_dataset])
    return model, dataset


def _run(command: list) -> None:
    words = [str(word) for word in command]
    shown = (os.path.relpath(w, ROOT) if w.startswith("/") else w for w in words)
    print("$ python " + " ".join(shown), flush=True)
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def training_command(
    data: tuple[Path, Path], steps: int, eval_iters: int, tensorboard: Path, save: Path | None, seed: int, flags: list
) -> list[str]:
    """The command that trains one variant: what a user would type. `flags` are what the variant adds."""
    tokenizer, dataset = data
    command = [ROOT / "tools" / "pretrain_mtpd.py", *MODEL, *flags]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer, "--data-path", dataset]
    command += ["--split", "95,5,0", "--data-cache-path", dataset.parent / "index", "--num-workers", "0"]
    command += ["--no-create-attention-mask-in-dataloader"]
    command += ["--train-iters", steps, "--micro-batch-size", BATCH, "--global-batch-size", BATCH, "--seed", seed]
    command += ["--lr", "2e-3", "--min-lr", "2e-4", "--lr-decay-style", "cosine", "--weight-decay", "0.1"]
    command += ["--lr-warmup-iters", max(1, steps // 20), "--clip-grad", "1.0", "--adam-beta2", "0.95"]
    command += ["--log-interval", "10", "--eval-interval", max(1, steps // 4), "--eval-iters", eval_iters]
    command += ["--tensorboard-dir", tensorboard, "--tensorboard-log-interval", "1"]
    if save is not None:
        command += ["--save", save, "--save-interval", steps]
    return [str(word) for word in command]


def train(
    commands: Mapping[str, list[str]],
    logs: Path,
    steps: int,
    at_once: int = 2,
    on_done: Callable[[str], None] = lambda name: None,
) -> None:
    """Run the training commands, `at_once` at a time, with one bar. Exits with the log's end when one fails."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    waiting, running, done = dict(commands), {}, 0
    logs.mkdir(parents=True, exist_ok=True)
    quiet = not sys.stderr.isatty()
    bar = tqdm(total=steps * len(commands), unit="step", mininterval=10 if quiet else 0.5, dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                command = waiting.pop(name)
                with open(logs / f"{name}.log", "w") as log:
                    log.write("$ python " + " ".join(command) + "\n")
                    log.flush()
                    running[name] = subprocess.Popen(
                        [sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
                    )
            time.sleep(0.5)
            last = {name: last_record(metrics_file(commands[name])) for name in running}
            losses = [f"{name} {record['lm loss']:.3f}" for name, record in last.items() if record.get("lm loss")]
            bar.set_postfix_str("main loss: " + ", ".join(losses), refresh=False)
            bar.update(done * steps + sum(record.get("iteration", 0) for record in last.values()) - bar.n)
            for name, process in list(running.items()):
                if process.poll() == 0:
                    del running[name]
                    done += 1
                    on_done(name)
                elif process.poll() is not None:
                    bar.close()
                    tail = (logs / f"{name}.log").read_text(errors="replace").splitlines()[-30:]
                    sys.exit("\n".join([*tail, f"Training {name} failed; the whole log: {logs / name}.log"]))
        bar.update(bar.total - bar.n)
    finally:
        bar.close()
        for process in running.values():
            process.terminate()


def metrics_file(command: list[str]) -> Path:
    """Where a training command writes its metrics."""
    return Path(command[command.index("--tensorboard-dir") + 1]) / "metrics.jsonl"


def records(path: Path) -> list[dict]:
    """All records of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_record(path: Path) -> dict:
    """The last complete record of training in a metrics file that is being written, or {}."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().decode().split("\n")[:-1]
    return next((r for r in _parsed(reversed(lines)) if "lm loss" in r), {})


def _parsed(lines: Iterable[str]) -> Iterable[dict]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the first line of the window may be cut
            continue


HEAD_METRICS = {
    "cross_entropy": "cross_entropy",
    "kl": "distillation",
    "acceptance_rate": "acceptance_rate",
    "cumulative_acceptance_rate": "cumulative_acceptance_rate",
    "overlap": "overlap",
}


def final_validation(command: list[str]) -> dict:
    """Main loss, tokens a step, and `heads` (a dict of HEAD_METRICS each), on held-out text at the end of a run."""
    last = next(r for r in reversed(records(metrics_file(command))) if "lm loss validation" in r)
    num_heads = sum(f"overlap/head_{k} validation" in last for k in range(1, 65))
    return {
        "main_loss": last["lm loss validation"],
        "tokens_per_step": last["tokens_per_step/greedy validation"],
        "heads": [
            {name: last[f"{tag}/head_{k} validation"] for name, tag in HEAD_METRICS.items()}
            for k in range(1, num_heads + 1)
        ],
    }
