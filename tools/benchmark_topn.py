"""Measure ways to find the N-th largest logit of a row: ours, torch.topk and torch.kthvalue, also over ranks."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_mtpd.training.benchmark_topn import METHODS, Rows, benchmark, save, table

EXAMPLE = """\
  python tools/benchmark_topn.py --rows 128 --vocab 131072 --topn 10000
  python tools/benchmark_topn.py --vocab 32768 --tp 2 --json topn.json
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = {"rows": "rows of logits", "vocab": "tokens of the vocabulary", "topn": "N", "tp": "ranks, a process each"}
    for name, default in asdict(Rows()).items():
        text = texts.get(name, "of the logits: float32, bfloat16 or float16")
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} [%(default)s]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS[:-1]), help="[%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    options = parser.parse_args()
    try:
        rows = Rows(**{name: getattr(options, name) for name in asdict(Rows())})
        results = benchmark(rows, options.methods, options.repeats)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
    print(table(results))
    if options.json:
        save(results, options.json, rows)


if __name__ == "__main__":
    main()
