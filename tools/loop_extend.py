"""Give a trained checkpoint more multi-token prediction heads (looped extension), or fewer.

The K trained heads, in order, initialise heads K+1, K+2, ... Works on torch_dist checkpoints of
Megatron's HybridModel and GPTModel, of any parallel layout and size, in about a second, without a GPU:
new heads are new names for old bytes, and the data files are hard links, so the old checkpoint can go.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mtpd.checkpoint.extend import extend, summary
from megatron_mtpd.checkpoint.looping import make_plan, parse_pattern

EXAMPLES = """\
examples:
  python tools/loop_extend.py --load runs/4-heads/checkpoints --save runs/16-heads --num-heads 16
  python tools/loop_extend.py --load CKPT --save OUT --pattern 1,2,3,4,4,4,4,4 --dry-run
then benchmark with --load OUT, or train: --load OUT --mtp-num-layers 16 --mtpd-train new-heads (from iteration 0).
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="a run's checkpoints, or one of them")
    add("--save", type=Path, required=True, metavar="DIR", help="where the new checkpoint goes")
    add("--num-heads", type=int, metavar="N", help="heads that it has; fewer than now drops the last ones")
    add("--pattern", metavar="A,B,...", help="the old head, from 1, that each new head is made of")
    add("--ckpt-step", type=int, metavar="N", help="extend iteration N (default: the run's latest)")
    add("--keep-optimizer", action="store_true", help="keep its state for what existed, and go on where it stopped")
    add("--iteration", type=int, metavar="N", help="store it as iteration N, to resume from there")
    mode = parser.add_mutually_exclusive_group()
    for name, text in (("copy", "copy the data files"), ("materialize", "write every tensor's own bytes")):
        mode.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="link", help=text)
    add("--force", action="store_true", help="replace what is in --save, all of it")
    add("--verify", action="store_true", help="load both checkpoints and compare every tensor")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    options = parser.parse_args(argv)

    try:
        pattern = parse_pattern(options.pattern) if options.pattern is not None else None
        plan = make_plan(
            options.load, options.num_heads, pattern, options.ckpt_step, options.keep_optimizer, options.iteration
        )
        print(summary(plan, options.mode))
        if not options.dry_run:
            mode = extend(plan, options.save, options.mode, options.force, options.verify)
            print(f"{'written to':<16}{options.save} ({mode}{', verified' if options.verify else ''})")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
