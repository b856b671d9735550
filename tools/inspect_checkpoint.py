"""Show what a torch_dist checkpoint holds: heads, parameters, layout, arguments, sizes, shared bytes, integrity.

Reads metadata only, in a fraction of a second whatever the size, and runs nothing that the checkpoint contains.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mtpd.checkpoint.inspection import describe, table

EXAMPLES = """\
examples:
  python tools/inspect_checkpoint.py --load runs/quickstart/checkpoints
  python tools/inspect_checkpoint.py --load runs/quickstart/checkpoints --ckpt-step 500 --verify
  python tools/inspect_checkpoint.py --load CKPT/iter_0000500 --json | jq .parameters
exit status: 0 good, 1 damaged or incomplete, 2 not a checkpoint.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="a run's checkpoints, or one of them")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration N (default: the run's latest)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare its checksum")
    parser.add_argument("--arguments", action="store_true", help="list the stored arguments too")
    parser.add_argument("--tensors", action="store_true", help="list the tensors too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)

    try:
        found = describe(options.load, options.ckpt_step, options.verify)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else table(found, options.arguments, options.tensors))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
