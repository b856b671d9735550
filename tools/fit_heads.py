"""Give the heads of a checkpoint a start in closed form: their last projections become the linear maps that predict
most of the main model's next hidden states on some text. For heads that are new to a trained model; minutes, and no
training. Heads that are copies of the trunk's last layer have more to tell than random ones.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.speculative.fit import Options, for_terminal, run

EXAMPLE = """example:
  python tools/convert_hf.py import --hf SmolLM2 --save runs/new --num-heads 4
  python tools/fit_heads.py --load runs/new --data-path data/own --save runs/fitted
then train from it, --load runs/fitted --mtpd-train heads, or benchmark it as it is.
On more than one GPU: torchrun --nproc-per-node 8 tools/fit_heads.py ...
"""


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=as_it_is)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="checkpoint with heads, or the folder of a run")
    add("--ckpt-step", type=int, metavar="N", help="iteration to load [the last]")
    add("--save", type=Path, required=True, metavar="DIR", help="gets the checkpoint; the trunk's files are linked")
    add("--data-path", nargs="+", required=True, metavar="[WEIGHT] PREFIX", help="as in training")
    add("--tokens", type=int, metavar="N", help="of text [64 x hidden size]")
    add("--seq-length", type=int, default=256, help="the most of a document at once [%(default)s]")
    add("--batch-size", type=int, default=8, help="sequences at once, on each replica [%(default)s]")
    add("--tensor-model-parallel-size", dest="tensor_parallel", type=int, default=1, metavar="N", help="[%(default)s]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="to compute in [as trained]")
    add("--seed", type=int, default=1234, help="[%(default)s]")
    add("--force", action="store_true", help="replace what is in --save, all of it")
    given = vars(parser.parse_args())
    try:
        found = run(Options(**given))
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"fit_heads.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    if found:
        print(for_terminal(found, given["save"]))


if __name__ == "__main__":
    main()
