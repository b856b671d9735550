"""Measure whole training steps side by side: no MTP, Megatron's own MTP, MTP-D. Prints medians and ratios."""

import argparse
import sys
from pathlib import Path

from megatron_mtpd.training.benchmark_step import FROZEN, VARIANTS, benchmark, save, table

EXAMPLE = """\
All flags that are not below are those of tools/pretrain_mtpd.py, and describe model and batch:
  python tools/benchmark_step.py --rounds 5 --steps 4 --num-layers 3 --mtp-num-layers 4 --hidden-size 128 \\
      --ffn-hidden-size 384 --num-attention-heads 4 --seq-length 128 --vocab-size 2048 --micro-batch-size 8
"""
DEFAULTS = (
    "--mock-data --tokenizer-type NullTokenizer --num-workers 0 --lr 1e-4 --no-create-attention-mask-in-dataloader"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [*VARIANTS, FROZEN]
    parser.add_argument("--variants", nargs="+", choices=names, default=list(VARIANTS), help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant [%(default)s]")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    options, flags = parser.parse_known_args()
    flags = [*DEFAULTS.split(), *flags]
    if "--max-position-embeddings" not in flags and "--seq-length" in flags:
        flags += ["--max-position-embeddings", flags[flags.index("--seq-length") + 1]]

    def progress(turn: int) -> None:
        print(f"round {turn + 1}/{options.rounds}", file=sys.stderr, flush=True)

    try:
        rows = benchmark(flags, options.variants, options.rounds, options.steps, options.threads, progress)
    except RuntimeError as error:
        sys.exit(str(error))
    print(table(rows))
    if options.json:
        save(rows, options.json, options, flags)


if __name__ == "__main__":
    main()
