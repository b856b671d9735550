"""Measure the loss section side by side: Megatron's own MTP loss (cross-entropy), MTP-D eager, MTP-D fused."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import get_args

from megatron_mtpd.config import Objective
from megatron_mtpd.training.benchmark_loss import VARIANTS, Workload, benchmark, save, table

EXAMPLE = """\
  python tools/benchmark_loss.py --vocab 32768 --tokens 1024 --hidden 512 --repeats 5
  python tools/benchmark_loss.py --vocab 131072 --topn 10000 --tp 2 --sequence-parallel --json loss.json
"""
HELP = {
    "heads": "MTP heads K",
    "vocab": "tokens of the vocabulary",
    "topn": "N of the top-N distillation",
    "tokens": "positions of the one sequence",
    "hidden": "hidden size",
    "dtype": "of hidden states and weight: fp32, bf16 or fp16",
    "tp": "tensor-parallel ranks, a process each",
    "threads": "of each rank, on a CPU",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Workload()
    for name, text in HELP.items():
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{text} [%(default)s]")
    parser.add_argument("--objective", choices=get_args(Objective), default="topn_kl", help="[%(default)s]")
    parser.add_argument("--sequence-parallel", action="store_true", help="spread the sequence over the ranks, too")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="[all]")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each variant, in turns [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    options = parser.parse_args()

    def progress(turn: int) -> None:
        print(f"turn {turn + 1}/{options.repeats}", file=sys.stderr, flush=True)

    try:
        names = [field.name for field in dataclasses.fields(Workload)]
        workload = Workload(**{name: getattr(options, name) for name in names})
        rows = benchmark(workload, options.variants, options.repeats, progress)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(table(rows))
    if options.json:
        save(rows, options.json, workload)


if __name__ == "__main__":
    main()
