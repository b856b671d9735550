"""Train a SentencePiece tokenizer (PREFIX.model) that gives every text back exactly, spaces included."""

import argparse
import sys
from collections.abc import Sequence

from megatron_mtpd.data.cli import add_corpus_arguments, run, take_corpus
from megatron_mtpd.data.spm import MODEL_TYPES, summary, train_tokenizer

EXAMPLE = """\
example:
  python tools/train_tokenizer.py --input python-stdlib --vocab-size 4096 --output-prefix data/tokenizer
then preprocess and train with --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_arguments(parser)
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of pieces, all included")
    group.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="(default: bpe)")
    group.add_argument(
        "--max-bytes",
        type=float,
        default=1e8,
        metavar="BYTES",
        help="of more text than this, take a sample: the chunks with the smallest hashes (default: 1e8)",
    )
    group.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="of all characters, that many get pieces; the rest are spelled in bytes (default: 0.9995)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="write PREFIX.model and PREFIX.json")
    group.add_argument("--force", action="store_true", help="replace an existing tokenizer")
    group.add_argument("--verbose", action="store_true", help="show SentencePiece's own log")
    options = vars(parser.parse_args(argv))

    def command() -> str:
        corpus = take_corpus(options)
        options["max_bytes"] = int(options["max_bytes"])
        return summary(train_tokenizer(corpus, **options), options["output_prefix"])

    return run(parser, command)


if __name__ == "__main__":
    sys.exit(main())
