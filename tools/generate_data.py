"""Let a checkpoint write text to train heads on: continuations of prompts, or its own questions with its answers."""

import argparse
import os
import sys
from pathlib import Path

from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.speculative.sampling import Sampling
from megatron_mtpd.speculative.self_generated import Options, for_terminal, run

EXAMPLE = """examples:
  python tools/generate_data.py --load runs/smollm2 --questions 10000 --output data/own
  python tools/generate_data.py --load runs/smollm2 --prompts questions.jsonl --chat --samples 4 --output data/own
then tools/preprocess_data.py --input data/own/generated.jsonl --json-key tokens, with the checkpoint's tokenizer.
On more than one GPU, or to use all cores: torchrun --nproc-per-node 8 tools/generate_data.py ...
"""


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=as_it_is)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="checkpoint, or the folder of a run")
    add("--ckpt-step", type=int, metavar="N", help="iteration to load [the last]")
    add("--output", type=Path, required=True, metavar="DIR", help="gets generated.jsonl; a rerun continues")
    add("--prompts", nargs="+", default=[], metavar="[NAME=]PATH", help="JSONL, text, or published benchmarks")
    add("--chat", action="store_true", help="ask the prompts by the tokenizer's chat template")
    add("--samples", type=int, default=1, help="continuations of each prompt [%(default)s]")
    add("--questions", type=int, default=0, metavar="N", help="documents whose question the model writes too")
    add("--max-new-tokens", type=int, default=256, help="of each turn of the model's [%(default)s]")
    add("--temperature", type=float, default=1.0, help="0 is greedy [%(default)s]")
    add("--top-k", type=int, default=0, help="0: all tokens [%(default)s]")
    add("--top-p", type=float, default=1.0, help="[%(default)s]")
    add("--num-heads", type=int, default=0, metavar="K", help="heads that draft; 0: plain decoding [%(default)s]")
    add("--batch-size", type=int, default=32, help="sequences at once, on each replica [%(default)s]")
    add("--tensor-model-parallel-size", dest="tensor_parallel", type=int, default=1, metavar="N", help="[%(default)s]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights [as trained]")
    add("--tokenizer-type", help="[the checkpoint's]")
    add("--tokenizer-model", metavar="PATH", help="[the checkpoint's]")
    add("--seed", type=int, default=1234, help="[%(default)s]")
    given = vars(parser.parse_args())
    try:
        sampling = Sampling(*map(given.pop, ("temperature", "top_k", "top_p")))
        found = run(Options(**given, sampling=sampling))
    except (ValueError, CheckpointError) as error:
        sys.exit(f"generate_data.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    if found:
        print(for_terminal(found, given["output"]))


if __name__ == "__main__":
    main()
