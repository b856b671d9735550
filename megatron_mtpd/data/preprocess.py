"""Tokenize text in parallel worker processes into Megatron's indexed dataset: PREFIX.bin, PREFIX.idx.

The contract: the dataset holds the documents in the order of the input, whatever the number of workers; it
appears whole or not at all (`whole_files`); what was skipped is counted (`accounting`); and PREFIX.json says
what it was made from. A list of token ids in the place of a text is taken as it is. One process reads and
writes; workers decode, parse and tokenize batches of records, at most a few batches ahead, so memory stays
flat. Each document is one sequence, ended by the end-of-document token.

Absent on purpose: sentence splitting, several keys a document, packing and splitting (Megatron does both in
training).
"""

import glob
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np

from megatron_mtpd.data.accounting import EMPTY, BadRecord, Tally, report
from megatron_mtpd.data.progress import Progress
from megatron_mtpd.data.text import Record, TextFiles, parse_text_or_tokens
from megatron_mtpd.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mtpd.data.whole_files import WholeFiles
from megatron_mtpd.provenance import versions

BATCH_BYTES = 256 * 2**10  # large enough to hide the cost of sending it, small enough for even work
BATCHES_AHEAD = 4  # for each worker


class Encoded(NamedTuple):
    """A batch as tokens: `tokens` [sum(lengths)] of all documents, one after the other."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    eod_inside: int  # documents whose text already held the end-of-document token
    bad: list[tuple[str, BadRecord]]
    position: int


def preprocess(
    corpus: TextFiles,
    tokenizer_type: str,
    tokenizer_model: str,
    output_prefix: str,
    *,
    append_eod: bool = True,
    workers: int = 1,
    max_bad: str | int = "1%",
    force: bool = False,
    progress: bool = True,
) -> dict:
    """Write PREFIX.bin, PREFIX.json and PREFIX.idx, and return what PREFIX.json holds.

    append_eod: end every document with the tokenizer's end-of-document token (not twice, where its template
        does so).
    workers: processes that tokenize; 1 does all in this one. With more, a script that calls this needs the
        usual `if __name__ == "__main__":`.
    max_bad: see `accounting.Tally`. force: replace an existing dataset.

    Raises ValueError for bad options, existing output, damaged or too many bad records, OSError of the disk
    or of a worker that died (ChildProcessError); then nothing was written. Tokens are uint16 where the
    vocabulary allows, as Megatron chooses, else int32.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1")
    tally = Tally(max_bad)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    eod = tokenizer.eod if append_eod else None
    if append_eod and eod is None:
        raise ValueError(
            f"--append-eod: {tokenizer_model} has no end-of-document token; "
            "choose another tokenizer, or --no-append-eod"
        )
    bin_path, json_path, idx_path = (f"{output_prefix}.{kind}" for kind in ("bin", "json", "idx"))
    outputs = WholeFiles(bin_path, json_path, idx_path, force=force)
    for path in outputs.leftovers():
        print(f"note: {path} is of an interrupted run, or of one still running; delete it", file=sys.stderr)
    indexed = _indexed_dataset()
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    started, tokens, eod_inside = time.monotonic(), 0, 0
    bar = Progress("preprocess", corpus.total_bytes, enabled=progress)
    with outputs, _encoder(tokenizer, eod, dtype, workers) as encode:
        builder = indexed.IndexedDatasetBuilder(outputs.partial(bin_path), dtype=dtype)
        with closing(builder.data_file), closing(bar):
            for encoded in encode(_batches(corpus.records())):
                _add(builder, encoded)
                tally.good(len(encoded.lengths), encoded.text_bytes)
                for where, bad in encoded.bad:
                    tally.bad(where, bad)
                tokens += len(encoded.tokens)
                eod_inside += encoded.eod_inside
                bar.update(encoded.position, tally.documents, tally.text_bytes)
            tally.finish()
            builder.finalize(outputs.partial(idx_path))
        provenance = {
            "source": corpus.summary(),
            "tokenizer": {
                "type": tokenizer.type,
                "model": tokenizer.model,
                "sha256": tokenizer.sha256(),
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
            },
            "options": {"append_eod": append_eod, "max_bad": tally.max_bad},
            **tally.as_dict(),
            "tokens": tokens,
            "dtype": np.dtype(dtype).name,
            "documents_with_eod_inside": eod_inside,
            "seconds": round(time.monotonic() - started, 3),
            "workers": workers,
            "versions": versions(),
        }
        with open(outputs.partial(json_path), "w", encoding="utf-8") as file:
            json.dump(provenance, file, indent=2)
            file.write("\n")
        if force:  # Megatron's index of the old documents would be read for the new ones: its key is the path
            for cache in glob.glob(os.path.join(glob.escape(output_prefix), "cache", "*_indices")):
                shutil.rmtree(cache, ignore_errors=True)
    return provenance


def summary(provenance: dict, output_prefix: str) -> str:
    """What `preprocess` returned, for a person."""
    p = provenance
    lines = [
        report(p),
        f"{p['documents']:,} documents, {p['tokens']:,} tokens, {p['text_bytes'] / 1e6:.1f} MB of text "
        f"({p['text_bytes'] / p['tokens']:.2f} bytes a token) in {p['seconds']:.1f} s",
        f"wrote {output_prefix}.bin, {output_prefix}.idx ({p['dtype']}) and {output_prefix}.json",
    ]
    if p["documents_with_eod_inside"]:
        lines.insert(1, f"warning: {p['documents_with_eod_inside']} documents spell the end-of-document token inside")
    return "\n".join(filter(None, lines))


def _indexed_dataset() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformer Engine and Apex, which have no part in this
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _add(builder: Any, encoded: Encoded) -> None:
    end = 0
    for length in encoded.lengths:
        builder.add_document(encoded.tokens[end : end + length], [length])
        end += length


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.raw) + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, eod: int | None, dtype: type, records: list[Record]) -> Encoded:
    found, places, bad = [], [], []
    for record in records:
        try:
            found.append(parse_text_or_tokens(record))
            places.append(record.where)
        except BadRecord as error:
            bad.append((record.where, error))
    documents, text_bytes, eod_inside = [], 0, 0
    encoded = iter(tokenizer.encode([text for text in found if isinstance(text, str)]))
    for text, where in zip(found, places, strict=True):
        ids = list(text) if isinstance(text, list) else next(encoded)
        if isinstance(text, list) and not 0 <= min(text) <= max(text) < tokenizer.vocab_size:
            bad.append((where, BadRecord("token id outside the vocabulary", f"{tokenizer.vocab_size} tokens")))
            continue
        if not ids:
            bad.append((where, BadRecord(EMPTY, "the tokenizer leaves nothing of it")))
            continue
        if max(ids) >= tokenizer.vocab_size:
            raise ValueError(f"{where}: {tokenizer.model} gave id {max(ids)}, its size is {tokenizer.vocab_size}")
        eod_inside += isinstance(text, str) and tokenizer.eod in ids[:-1]
        if eod is not None and ids[-1] != eod:
            ids.append(eod)
        documents.append(np.array(ids, dtype=dtype))
        text_bytes += len(text.encode()) if isinstance(text, str) else 0
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=dtype)
    return Encoded(tokens, [len(ids) for ids in documents], text_bytes, eod_inside, bad, records[-1].position)


Encoder = Callable[[Iterable[list[Record]]], Iterator[Encoded]]


@contextmanager
def _encoder(tokenizer: Tokenizer, eod: int | None, dtype: type, workers: int) -> Iterator[Encoder]:
    """A function from batches to encoded batches, in the same order, computed here or in worker processes."""
    if workers == 1:
        yield lambda batches: (_encode(tokenizer, eod, dtype, batch) for batch in batches)
        return
    # spawn: a forked copy of a process with torch's threads may hang
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.type, tokenizer.model, eod, dtype),
    )

    def encode(batches: Iterable[list[Record]]) -> Iterator[Encoded]:
        ahead: deque = deque()
        for batch in batches:
            ahead.append(pool.submit(_encode_in_worker, batch))
            if len(ahead) > BATCHES_AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    try:
        yield encode
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker process died, perhaps for want of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, int | None, type]


def _start_worker(tokenizer_type: str, tokenizer_model: str, eod: int | None, dtype: type) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, and the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _worker = (load_tokenizer(tokenizer_type, tokenizer_model), eod, dtype)


def _die_with_parent() -> None:
    """A worker waits on a pipe that it holds open itself: without this it would outlive a killed parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(records: list[Record]) -> Encoded:
    tokenizer, eod, dtype = _worker
    return _encode(tokenizer, eod, dtype, records)
