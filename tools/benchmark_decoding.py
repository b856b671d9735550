"""Measure decoding side by side with transformers' generate on a Llama of the same size, and against its own bound."""

import argparse
import json
import sys
from pathlib import Path

import torch

from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative import loading, speed

EXAMPLE = """\
example:
  python tools/benchmark_decoding.py --load runs/quickstart/checkpoints/mtpd --num-heads 4 --batch-size 1 8
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="checkpoint, or the folder of a run")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration to load [the last]")
    parser.add_argument("--num-heads", type=int, nargs="+", metavar="K", help="[all heads]")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="[1 8]")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="random tokens [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; the best counts [%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, and where they come from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        loading.start_distributed()
        loaded = loading.load(options.load, options.ckpt_step)
        vocabulary = loaded.args.vocab_size or loaded.args.padded_vocab_size
        random = torch.Generator().manual_seed(1)
        size = (max(options.batch_size), options.prompt_tokens)
        prompts = torch.randint(0, vocabulary, size, generator=random).tolist()
        rows = [
            speed.measure(loaded, prompts, vocabulary, heads, batch, options.new_tokens, options.rounds)
            for batch in options.batch_size
            for heads in options.num_heads or [loaded.num_heads]
        ]
    except (ValueError, CheckpointError) as error:
        sys.exit(f"benchmark_decoding.py: error: {error}")
    print(speed.table(rows))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "provenance": provenance()}, indent=1))


if __name__ == "__main__":
    main()
