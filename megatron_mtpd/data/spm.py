"""Train a SentencePiece tokenizer that loses nothing: text that is encoded and decoded is the same text.

No normalisation, no added or removed spaces. Runs of spaces and line ends are learned as pieces, being much
of what code is made of; tabs, which SentencePiece's trainer cannot learn, are given as pieces; any other
character falls back to its UTF-8 bytes. The one exception is inherent in SentencePiece: its own space symbol,
U+2581, comes back as a space. Special pieces: <unk> 0, <s> 1, </s> 2, <pad> 3; Megatron takes </s> as end of
document. A digit is a piece by itself.

The same text and options give the same bytes, whatever the order of the files, the machine and its number of
cores. Of more than `max_bytes` of text a sample is taken: the text is cut at line ends into chunks of at most
4,000 characters, and those with the smallest BLAKE2b hash of their text are kept, as many as fit.

Absent on purpose: SentencePiece's word and char models, its normalisation rules, special pieces of one's own.
"""

import hashlib
import heapq
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator

from megatron_mtpd.data.accounting import Tally, report
from megatron_mtpd.data.progress import Progress
from megatron_mtpd.data.text import TextFiles, parsed
from megatron_mtpd.data.whole_files import WholeFiles
from megatron_mtpd.provenance import versions

MODEL_TYPES = ("bpe", "unigram")
CHUNK = 4000  # characters
TABS = ["\t" * n for n in (1, 2, 3, 4)]
THREADS = 16  # fixed, not the number of cores: SentencePiece's result depends on it


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

    vocab_size: exact number of pieces, the 4 special ones, 4 runs of tabs and 256 bytes included.
    character_coverage: share of the characters in the text that get pieces; the rest are spelled in bytes.
    verbose: show SentencePiece's own log, which is the only progress of a long unigram training.

    Raises ValueError: bad options, existing output, too many bad records, a vocabulary that the text cannot
    fill.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"--model-type {model_type}: choose one of {', '.join(MODEL_TYPES)}")
    if max_bytes < 1:
        raise ValueError(f"--max-bytes {max_bytes}: at least 1")
    if not 0 < character_coverage <= 1:
        raise ValueError(f"--character-coverage {character_coverage}: a share in (0, 1], such as 0.9995")
    tally = Tally(max_bad)
    model_path, json_path = f"{output_prefix}.model", f"{output_prefix}.json"
    with WholeFiles(json_path, model_path, force=force) as outputs:
        started = time.monotonic()
        chunks = sample(_chunks_of_corpus(corpus, tally, progress), max_bytes)
        sample_bytes = sum(map(len, chunks))
        if progress:
            print(f"training {vocab_size:,} {model_type} pieces on {sample_bytes / 1e6:.1f} MB", file=sys.stderr)
        model = _train(chunks, vocab_size, model_type, character_coverage, verbose)
        with open(outputs.partial(model_path), "wb") as file:
            file.write(model)
        provenance = {
            "source": corpus.summary(),
            **tally.as_dict(),
            "sample_bytes": sample_bytes,
            "options": {
                "model_type": model_type,
                "vocab_size": vocab_size,
                "max_bytes": max_bytes,
                "character_coverage": character_coverage,
            },
            "sha256": hashlib.sha256(model).hexdigest(),
            "seconds": round(time.monotonic() - started, 3),
            "versions": versions(),
        }
        with open(outputs.partial(json_path), "w", encoding="utf-8") as file:
            json.dump(provenance, file, indent=2)
            file.write("\n")
    return provenance


def summary(provenance: dict, output_prefix: str) -> str:
    """What `train_tokenizer` returned, for a person."""
    p = provenance
    options = p["options"]
    lines = [
        report(p),
        f"{options['vocab_size']:,} {options['model_type']} pieces from {p['sample_bytes'] / 1e6:.1f} MB of "
        f"{p['text_bytes'] / 1e6:.1f} MB of text, {p['documents']:,} documents, in {p['seconds']:.1f} s",
        f"wrote {output_prefix}.model and {output_prefix}.json",
    ]
    return "\n".join(filter(None, lines))


def sample(chunks: Iterable[bytes], max_bytes: int) -> list[bytes]:
    """The chunks with the smallest hashes that together fit in `max_bytes`, in the order of their hashes.

    Exactly the longest such beginning of the sorted list, in one pass, and never more in memory than fits.
    """
    kept: list[tuple[int, bytes]] = []  # a heap, largest hash first
    total = 0
    smallest_dropped = 2**64
    for chunk in chunks:
        key = int.from_bytes(hashlib.blake2b(chunk, digest_size=8).digest())
        if key >= smallest_dropped:
            continue
        heapq.heappush(kept, (-key, chunk))
        total += len(chunk)
        while total > max_bytes:
            key, dropped = heapq.heappop(kept)
            smallest_dropped = -key
            total -= len(dropped)
    return [chunk for _, chunk in sorted(kept, key=lambda item: -item[0])]


def cut(text: str) -> Iterator[str]:
    """Cut a text into chunks of at most CHUNK characters, before a run of line ends where there is one.

    Before, because SentencePiece's trainer drops the line ends that end its input, and they are to be
    learned.
    """
    start = 0
    while start < len(text):
        end = start + CHUNK
        if end < len(text):
            newline = text.rfind("\n", start + 1, end)
            while newline > start + 1 and text[newline - 1] == "\n":
                newline -= 1
            end = newline if newline > start else end
        yield text[start:end]
        start = end


def _chunks_of_corpus(corpus: TextFiles, tally: Tally, progress: bool) -> Iterator[bytes]:
    bar = Progress("reading", corpus.total_bytes, enabled=progress)
    for record, text in parsed(corpus.records(), tally):
        for chunk in cut(text):
            yield chunk.encode()
        bar.update(record.position, tally.documents, tally.text_bytes)
    bar.close()
    tally.finish()


def _train(chunks: list[bytes], vocab_size: int, model_type: str, coverage: float, verbose: bool) -> bytes:
    """The serialised model. It holds no path: the bytes depend on text and options alone."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=TABS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=4 * CHUNK,  # bytes, not characters
            num_threads=THREADS,
            minloglevel=0 if verbose else 2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"--vocab-size {vocab_size}: SentencePiece cannot train on this text: {reason}") from error
    return model.getvalue()
