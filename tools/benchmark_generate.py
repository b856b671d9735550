"""Tokens a second from prompt to last token: our decoding beside transformers' plain generate, in turns."""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative.end_to_end import Options, compare, table

EXAMPLE = """example:
  python tools/convert_hf.py export --load checkpoints/run --save exported --format transformers --hf original
  python tools/benchmark_generate.py --load checkpoints/run --hf exported --prompts prompts.jsonl --num-heads 1 2 \\
      --json generate.json                             (OMP_NUM_THREADS: the threads on a CPU)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="checkpoint, or the folder of a run")
    add("--hf", type=Path, required=True, metavar="DIR", help="its export for transformers, which gives the dtype")
    add("--prompts", nargs="+", required=True, metavar="PATH", help="as in the acceptance benchmark")
    add("--num-heads", type=int, nargs="+", default=[1], metavar="K", help="beside plain decoding [1]")
    add("--draft-vocab-size", type=int, nargs="+", default=[], metavar="N", help="once more with drafts of N ids each")
    add("--new-tokens", type=int, default=64, metavar="N", help="of each prompt, whatever ends [%(default)s]")
    add("--max-prompt-tokens", type=int, default=512, metavar="N", help="longer ones lose the beginning [%(default)s]")
    add("--limit", type=int, metavar="N", help="the first N prompts [all]")
    add("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    given = vars(parser.parse_args())
    save = given.pop("json")
    try:
        found = compare(Options(**given))
    except (ValueError, CheckpointError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    print(table(found))
    if save:
        with written_whole(save) as file:
            file.write(json.dumps({**found, "provenance": provenance()}, indent=1).encode())


if __name__ == "__main__":
    main()
