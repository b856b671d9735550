"""Tokenize text into Megatron's indexed dataset (PREFIX.bin, PREFIX.idx), in parallel."""

import argparse
import sys
from collections.abc import Sequence

from megatron_mtpd.data.cli import add_corpus_arguments, run, take_corpus
from megatron_mtpd.data.preprocess import preprocess, summary
from megatron_mtpd.data.tokenizers import TOKENIZER_TYPES

EXAMPLES = """\
examples:
  python tools/preprocess_data.py --input shards/*.jsonl.gz --json-key text --workers 16 \\
      --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --output-prefix data/web
  python tools/preprocess_data.py --input ~/code --suffix .py .md \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/folder --output-prefix data/code
then train with --data-path data/web and the same two tokenizer flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    group = parser.add_argument_group("tokens")
    types = " or ".join(TOKENIZER_TYPES)
    group.add_argument("--tokenizer-type", required=True, metavar="TYPE", help=f"{types}, as in training")
    group.add_argument(
        "--tokenizer-model", required=True, metavar="PATH", help="its .model file, or folder, or Hub name"
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default; document masking needs it)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="write PREFIX.bin, .idx and .json")
    group.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    group.add_argument("--force", action="store_true", help="replace an existing dataset")
    options = vars(parser.parse_args(argv))

    def command() -> str:
        corpus = take_corpus(options)
        return summary(preprocess(corpus, **options), options["output_prefix"])

    return run(parser, command)


if __name__ == "__main__":
    sys.exit(main())
