"""Time import and export of a Hugging Face folder beside plain copies of the same files, and their peak memory."""

import argparse
import sys
from pathlib import Path

from megatron_mtpd.training.benchmark_convert import benchmark, save, table

EXAMPLE = """\
example:
  python tools/benchmark_convert.py --size 6 --directory /scratch --json convert.json
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=2.0, metavar="GB", help="of the weights [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds, of which the median [%(default)s]")
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure [that of temporary files]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    options = parser.parse_args()
    try:
        rows = benchmark(int(options.size * 1e9), options.repeats, options.directory)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(table(rows))
    if options.json:
        save(rows, options.json)


if __name__ == "__main__":
    main()
