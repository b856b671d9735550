"""Quickstart: plain MTP and MTP-D, from the same seed, on Python's own sources, on a CPU in a few minutes.

What it does, by the same steps as a real run: train a tokenizer, tokenize text, pretrain twice with the real entry
(once with the distillation's weight at 0), show what each head learned beside the main head's loss, and decode with the
heads: how many of their drafts the main head accepts, and what that makes of the speed. Everything is written under
runs/quickstart; a new run replaces the results of the last one and keeps the data.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decoding import decode, print_decoding
from report import TITLES, draw, print_table, summarize, write
from toy import PLAIN_MTP, ROOT, prepare_data, train, training_command

VARIANTS = {"mtp": PLAIN_MTP, "mtpd": []}
NUM_HEADS = 4


@dataclass(frozen=True)
class Scale:
    """How much is trained, and how much is decoded."""

    steps: int
    eval_iters: int
    prompts: int
    num_heads: tuple[int, ...]


FULL = Scale(steps=600, eval_iters=20, prompts=24, num_heads=(1, 2, 4))
QUICK = Scale(steps=90, eval_iters=4, prompts=6, num_heads=(1, 4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="QUICK=1 in the environment does the same as --quick."
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

    print("1/4 Text: Python's standard library, tokenized with SentencePiece", flush=True)
    data = prepare_data(out / "data")
    for old in ("checkpoints", "tensorboard", "acceptance"):
        shutil.rmtree(out / old, ignore_errors=True)
    for old in ("summary.json", "summary.png"):
        (out / old).unlink(missing_ok=True)

    print(f"2/4 Training plain MTP and MTP-D side by side, {scale.steps} steps each", flush=True)
    commands = {
        variant: training_command(
            data,
            scale.steps,
            scale.eval_iters,
            out / "tensorboard" / variant,
            out / "checkpoints" / variant,
            options.seed,
            ["--mtp-num-layers", NUM_HEADS, *flags],
        )
        for variant, flags in VARIANTS.items()
    }
    train(commands, out, scale.steps)

    print("3/4 What was learned, on text that was held out", flush=True)
    summary = summarize(out, commands, scale.steps, options.seed)
    print_table(summary)

    print("\n4/4 Decoding with the heads", flush=True)
    for variant, found in decode(out, list(VARIANTS), scale.prompts, list(scale.num_heads)).items():
        summary[variant]["decoding"] = found
    write(summary, out)
    draw(summary, out / "summary.png")
    print_decoding(TITLES, {variant: summary[variant]["decoding"] for variant in VARIANTS})
    shown = os.path.relpath(out)
    print(f"\n{time.time() - start:.0f} s. Picture: {shown}/summary.png, numbers: {shown}/summary.json")
    print(f"Of the decoding:   {shown}/acceptance/mtpd/acceptance.html")
    print(f"To watch it:       .venv/bin/tensorboard --logdir {shown}/tensorboard")
    print(f"The real command:  head -1 {shown}/mtpd.log")


if __name__ == "__main__":
    main()
