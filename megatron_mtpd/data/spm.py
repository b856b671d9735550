"""Train a SentencePiece tokenizer that loses nothing: text that is encoded and decoded is the same text.

No normalisation, no added or removed spaces; runs of spaces and line ends are learned as pieces (they are half of what
code looks like); tabs, which SentencePiece's trainer cannot learn, are given as pieces; every other character falls
back to its UTF-8 bytes. The one exception is inherent in SentencePiece: its own space symbol U+2581 comes back as a
space. Special pieces: <unk> 0, <s> 1, </s> 2, <pad> 3; Megatron takes </s> as end of document. Digits are single pieces.

The same text and options give the same bytes, whatever the order of the files, the machine and its number of cores.
Of more than `max_bytes` of text a sample is taken: the text is cut into chunks of about 4,000 characters at line ends,
and those with the smallest BLAKE2b hash of their text are kept, as many as fit.

Absent on purpose: SentencePiece's word and char models, its own normalisation rules, other special pieces.
"""

import hashlib
import heapq
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator

from megatron_mtpd.data.accounting import Tally
from megatron_mtpd.data.preprocess import describe, versions
from megatron_mtpd.data.progress import Progress
from megatron_mtpd.data.text import TextFiles
from megatron_mtpd.data.tokenizers import SentencePieceTokenizer
from megatron_mtpd.data.whole_files import WholeFiles

MODEL_TYPES = ("bpe", "unigram")
CHUNK = 4000  # characters
TABS = ["\t" * n for n in (1, 2, 3, 4)]
THREADS = 16  # fixed, not the number of cores: it is part of the result


def train_tokenizer(
    corpus: TextFiles,
    output_prefix: str,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    max_bytes: int = 100_000_000,
    character_coverage: float = 0.9995,
    max_bad: str | int = "1%",
    force: bool = False,
    progress: bool = True,
    verbose: bool = False,
) -> dict:
    """Write PREFIX.model and PREFIX.json, whole or not at all, and return what PREFIX.json holds.

    vocab_size: exact number of pieces, special ones and 256 bytes included.
    character_coverage: share of the characters that get pieces of their own; the rest are spelled in bytes.
    verbose: show SentencePiece's own log.

    Raises ValueError: bad options, existing output, too many bad records, a vocabulary that the text cannot fill.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model-type {model_type}: choose one of {', '.join(MODEL_TYPES)}")
    if max_bytes < 1:
        raise ValueError(f"--max-bytes {max_bytes}: at least 1")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"--character-coverage {character_coverage}: a share in (0, 1], such as 0.9995")
    tally = Tally(max_bad)
    outputs = WholeFiles(f"{output_prefix}.model", f"{output_prefix}.json", force=force)
    started = time.monotonic()
    with outputs:
        chunks = sample(_chunks_of_corpus(corpus, tally, progress), max_bytes)
        sample_bytes = sum(map(len, chunks))
        if progress:
            print(f"training {model_type}: {vocab_size:,} pieces, {sample_bytes / 1e6:.1f} MB of text", file=sys.stderr)
        model = _train(chunks, vocab_size, model_type, character_coverage, verbose)
        with open(outputs.partial(outputs.targets[0]), "wb") as file:
            file.write(model)
        tokenizer = SentencePieceTokenizer(outputs.partial(outputs.targets[0]))
        provenance = {
            "source": corpus.summary(),
            "tokenizer": describe(tokenizer) | {
                "model": outputs.targets[0],
                "sha256": {f"{output_prefix}.model": hashlib.sha256(model).hexdigest()},
            },
        }
    return provenance
