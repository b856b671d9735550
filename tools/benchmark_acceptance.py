"""Measure acceptance and speed of speculative decoding with a checkpoint's heads. Resumable; one rank or many nodes."""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.speculative.benchmark import run
from megatron_mtpd.speculative.report import for_terminal
from megatron_mtpd.speculative.sampling import Sampling
from megatron_mtpd.speculative.worker import Options

EXAMPLE = """example:
  python tools/benchmark_acceptance.py --load runs/quickstart/checkpoints/mtpd --prompts gsm8k=test.jsonl mine.txt \\
      --num-heads 2 4 --output runs/acceptance          (torchrun --nproc-per-node 8 ... for the ranks of a node)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="checkpoint, or the folder of a run")
    add("--ckpt-step", type=int, metavar="N", help="iteration to load [the last]")
    add("--prompts", nargs="+", required=True, metavar="[NAME=]PATH", help="JSONL, text, or published benchmarks")
    add("--output", type=Path, required=True, metavar="DIR", help="a rerun continues what is there")
    add("--num-heads", type=int, nargs="+", default=[], metavar="K", help="one run each, beside 0 and 1 [all heads]")
    add("--temperature", type=float, default=0.0, help="0 is greedy [%(default)s]")
    add("--top-k", type=int, default=0, help="0: all tokens [%(default)s]")
    add("--top-p", type=float, default=1.0, help="[%(default)s]")
    add("--draft", choices=("greedy", "sampled"), default="greedy", help="[%(default)s]")
    add("--min-confidence", type=float, default=0.0, help="stop a draft below this probability [%(default)s]")
    add("--draft-vocab-size", type=int, metavar="N", help="heads draft among the first N token ids alone [all]")
    add("--mask-position-0", action="store_true", help="zero the embedding at position 0 in the heads, as vLLM does")
    add("--max-new-tokens", type=int, default=128, help="[%(default)s]")
    add("--max-prompt-tokens", type=int, metavar="N", help="longer prompts lose their beginning [what training allows]")
    add("--limit", type=int, metavar="N", help="prompts of each benchmark, chosen by the seed [all]")
    add("--batch-size", type=int, default=8, help="sequences at once, on each replica [%(default)s]")
    add("--ignore-eod", action="store_true", help="go on behind the end of a document")
    add("--teacher-forced", dest="teacher_forced_only", action="store_true", help="one pass over the text, no decoding")
    add("--every-checkpoint", action="store_true", help="all checkpoints of the run that --load is the folder of")
    add("--tensor-model-parallel-size", dest="tensor_parallel", type=int, default=1, metavar="N", help="[%(default)s]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights [as trained]")
    add("--tokenizer-type", help="[the checkpoint's]")
    add("--tokenizer-model", metavar="PATH", help="[the checkpoint's]")
    add("--seed", type=int, default=1234, help="[%(default)s]")
    given = vars(parser.parse_args())
    try:
        values = map(given.pop, ("temperature", "top_k", "top_p"))
        sampling = Sampling(*values, sampled_drafts=given.pop("draft") == "sampled")
        found = run(Options(**given, sampling=sampling))
    except (ValueError, CheckpointError) as error:
        sys.exit(f"benchmark_acceptance.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    if found:
        print(for_terminal(found, given["output"]))
        sys.exit(not found["complete"])


if __name__ == "__main__":
    main()
