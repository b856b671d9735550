import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_mtpd.data import preprocess as module
from megatron_mtpd.data.preprocess import preprocess, summary
from megatron_mtpd.data.text import Record, TextFiles

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path, sources: list[str]) -> TextFiles:
    """0.4 MB of JSON lines: enough for several batches of the size that `small_batches` sets."""
    path = tmp_path / "sources.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sources))
    return TextFiles([path])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 20_000)


def outputs(prefix: str) -> list[str]:
    """What is beside the prefix, partial files included."""
    folder = Path(prefix).parent
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def make(corpus: TextFiles, spec, prefix: str, **options) -> dict:
    return preprocess(corpus, spec.tokenizer_type, spec.tokenizer_model, prefix, progress=False, **options)


def documents(prefix: str) -> list[np.ndarray]:
    dataset = IndexedDataset(prefix)
    # a sequence a document, no document without one
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].copy() for i in range(len(dataset))]  # what it gives dies with its memory map


def test_megatron_reads_back_every_document(spec, corpus, sources, prefix):
    result = make(corpus, spec, prefix)
    tokenizer = spec.load()
    found = documents(prefix)
    assert len(found) == len(sources) == result["documents"]
    assert sum(map(len, found)) == result["tokens"]
    for ids, text in zip(found, sources, strict=True):
        assert ids[-1] == tokenizer.eod
        assert tokenizer.decode(ids[:-1].tolist()).removeprefix("<|begin|>") == text


def test_without_eod(sentencepiece_spec, corpus, sources, prefix):
    make(corpus, sentencepiece_spec, prefix, append_eod=False)
    assert [ids.tolist() for ids in documents(prefix)] == sentencepiece_spec.load().encode(sources)


def test_tokens_are_stored_as_narrow_as_megatron_would(sentencepiece_spec, corpus, prefix, monkeypatch):
    assert make(corpus, sentencepiece_spec, prefix)["dtype"] == "uint16"
    narrow = documents(prefix)
    large = sentencepiece_spec.load()
    large.vocab_size = 70_000
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: large)
    assert make(corpus, sentencepiece_spec, prefix + "2")["dtype"] == "int32"
    wide = documents(prefix + "2")
    assert (narrow[0].dtype, wide[0].dtype) == (np.uint16, np.int32)
    assert all((a == b).all() for a, b in zip(narrow, wide, strict=True))


@pytest.mark.usefixtures("small_batches")
def test_the_number_of_workers_changes_nothing(sentencepiece_spec, tmp_path, corpus, prefix):
    with open(corpus.files[0], "a") as file:
        file.write('{"text": 1}\n{}\n\n')
    corpus = TextFiles(corpus.files)
    one = make(corpus, sentencepiece_spec, prefix + "1", max_bad="10%")
    three = make(corpus, sentencepiece_spec, prefix + "3", max_bad="10%", workers=3)
    assert corpus.total_bytes > 10 * module.BATCH_BYTES
    for kind in (".bin", ".idx"):
        assert Path(f"{prefix}1{kind}").read_bytes() == Path(f"{prefix}3{kind}").read_bytes()
    differing = {key for key in one if one[key] != three[key]}
    assert differing <= {"seconds", "workers"}
    assert one["bad"] == {"missing key": 1, "text is not a string": 1} and one["empty"] == 1
    assert outputs(prefix) == [f"data{n}.{kind}" for n in (1, 3) for kind in ("bin", "idx", "json")]


def test_token_ids_are_taken_as_they_are(sentencepiece_spec, tmp_path, prefix):
    """Also where the tokenizer would cut their text otherwise: that is what they are for."""
    tokenizer = sentencepiece_spec.load()
    (whole,) = tokenizer.encode(["def function"])
    letters = [i for letter in "def" for i in tokenizer.encode([letter])[0]]
    assert tokenizer.encode([tokenizer.decode(letters)])[0] != letters
    path = tmp_path / "tokens.jsonl"
    records = [letters, "def function", [*letters, tokenizer.eod], [tokenizer.vocab_size], [-1], [True], []]
    path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    result = make(TextFiles([path]), sentencepiece_spec, prefix, max_bad=3)
    ended = [[*ids, tokenizer.eod] for ids in (letters, whole, letters)]
    assert [ids.tolist() for ids in documents(prefix)] == ended
    assert result["bad"] == {"token id outside the vocabulary": 2, "text is not a string": 1} and result["empty"] == 1
    with pytest.raises(ValueError, match="token id outside the vocabulary"):
        make(TextFiles([path]), sentencepiece_spec, prefix + "2", max_bad=2)


def test_provenance_is_beside_the_dataset(spec, corpus, sources, prefix):
    result = make(corpus, spec, prefix, max_bad=7)
    assert json.loads(Path(f"{prefix}.json").read_text()) == result
    tokenizer = spec.load()
    assert result["tokenizer"] == {
        "type": spec.tokenizer_type,
        "model": spec.tokenizer_model,
        "sha256": tokenizer.sha256(),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    assert result["source"] == corpus.summary()
    assert result["options"] == {"append_eod": True, "max_bad": "7"}
    assert result["text_bytes"] == sum(len(text.encode()) for text in sources)
    assert {"megatron-core", "sentencepiece"} <= set(result["versions"])
    assert f"{len(sources)} documents, {result['tokens']:,} tokens" in summary(result, prefix)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_records_leave_nothing(sentencepiece_spec, corpus, prefix, workers):
    with open(corpus.files[0], "a") as file:
        file.write("{\n" * 5)
    number = len(Path(corpus.files[0]).read_text().splitlines())
    with pytest.raises(ValueError, match=rf"too many bad records: 5 of[^$]*sources\.jsonl:{number - 4}: "):
        make(TextFiles(corpus.files), sentencepiece_spec, prefix, max_bad="1%", workers=workers)
    assert outputs(prefix) == []


def test_an_existing_dataset_is_refused_and_replaced_on_demand(sentencepiece_spec, corpus, tmp_path, prefix):
    make(corpus, sentencepiece_spec, prefix)
    before = {name: (Path(prefix).parent / name).read_bytes() for name in outputs(prefix)}
    with pytest.raises(ValueError, match=r"data\.bin.* exists; .*--force"):
        make(corpus, sentencepiece_spec, prefix)
    assert before == {name: (Path(prefix).parent / name).read_bytes() for name in outputs(prefix)}
    # Megatron would read its index of the old documents, whose key is the path, for the new ones
    cache = Path(prefix, "cache", "GPTDataset_indices")
    cache.mkdir(parents=True)
    (tmp_path / "one.txt").write_text("one")
    make(TextFiles([tmp_path / "one.txt"]), sentencepiece_spec, prefix, force=True)
    assert len(documents(prefix)) == 1
    assert not cache.exists()


def test_a_document_is_ended_once(hugging_face_spec, tmp_path, prefix, capsys):
    """A tokenizer's template may end texts itself; a text may spell the token, which is counted."""
    (tmp_path / "a.jsonl").write_text('{"text": "x<|end|>"}\n{"text": "x<|end|>y"}\n{"text": "x"}\n')
    result = make(TextFiles([tmp_path / "a.jsonl"]), hugging_face_spec, prefix)
    eod = result["tokenizer"]["eod"]
    assert [(ids == eod).tolist() for ids in documents(prefix)] == [
        [False, False, True],
        [False, False, True, False, True],
        [False, False, True],
    ]
    assert result["documents_with_eod_inside"] == 1
    assert "warning: 1 documents spell the end-of-document token" in summary(result, prefix)


def test_a_tokenizer_without_eod_is_refused(sentencepiece_spec, corpus, prefix, monkeypatch):
    tokenizer = sentencepiece_spec.load()
    tokenizer.eod = None
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: tokenizer)
    with pytest.raises(ValueError, match=r"--append-eod: .* or --no-append-eod"):
        make(corpus, sentencepiece_spec, prefix)
    make(corpus, sentencepiece_spec, prefix, append_eod=False)


def test_ids_beyond_the_vocabulary_are_an_error(sentencepiece_spec, corpus, prefix, monkeypatch):
    tokenizer = sentencepiece_spec.load()
    tokenizer.vocab_size = 300
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: tokenizer)
    with pytest.raises(ValueError, match=r"sources\.jsonl:1: .* gave id \d+, its size is 300"):
        make(corpus, sentencepiece_spec, prefix)
    assert outputs(prefix) == []


def test_a_full_disk_leaves_nothing(sentencepiece_spec, corpus, prefix):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # Python ignores the signal: write() fails
    try:
        with pytest.raises(OSError, match="File too large"):
            make(corpus, sentencepiece_spec, prefix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outputs(prefix) == []


class Saboteur(TextFiles):
    """Does something to the run when half of the records are read."""

    def records(self) -> Iterator[Record]:
        records = list(super().records())
        yield from records[: len(records) // 2]
        self.sabotage()
        yield from records[len(records) // 2 :]

    def sabotage(self) -> None:
        raise NotImplementedError


@pytest.mark.usefixtures("small_batches")
def test_a_worker_that_dies_ends_the_run(sentencepiece_spec, corpus, prefix):
    others = psutil.Process().children()  # of tests before, which may live on

    class KillWorkers(Saboteur):
        def sabotage(self) -> None:
            for worker in psutil.Process().children():
                if worker not in others and "spawn_main" in " ".join(worker.cmdline()):
                    worker.kill()

    with pytest.raises(ChildProcessError, match="try fewer --workers"):
        make(KillWorkers(corpus.files), sentencepiece_spec, prefix, workers=2)
    assert outputs(prefix) == []


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_leaves_nothing(sentencepiece_spec, corpus, prefix, workers):
    class Interrupt(Saboteur):
        def sabotage(self) -> None:
            assert [name.split("-")[0] for name in outputs(prefix)] == ["data.bin.partial"]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        make(Interrupt(corpus.files), sentencepiece_spec, prefix, workers=workers)
    assert outputs(prefix) == []


def test_a_killed_run_leaves_nothing_that_loads_and_no_process(sentencepiece_spec, sources, tmp_path, prefix, capsys):
    (tmp_path / "large.txt").write_text("".join(sources) * 40, encoding="utf-8")  # some seconds of work
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(tmp_path / "large.txt")]
    command += ["--split", "line", "--output-prefix", prefix, "--workers", "2"]
    command += ["--tokenizer-type", sentencepiece_spec.tokenizer_type]
    command += ["--tokenizer-model", sentencepiece_spec.tokenizer_model]
    run = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": "."})
    partial = Path(prefix + ".bin")
    while not any(path.stat().st_size for path in partial.parent.glob("data.bin.partial-*")):
        assert run.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert not IndexedDataset.exists(prefix)
    assert [name.split("-")[0] for name in outputs(prefix)] == ["data.bin.partial"]
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    # the next run says what lies there, and succeeds
    (tmp_path / "one.txt").write_text("one")
    make(TextFiles([tmp_path / "one.txt"]), sentencepiece_spec, prefix)
    assert "data.bin.partial-" in capsys.readouterr().err
    assert len(documents(prefix)) == 1


def test_the_workers_flag_is_checked(sentencepiece_spec, corpus, prefix):
    with pytest.raises(ValueError, match="--workers 0: at least 1"):
        make(corpus, sentencepiece_spec, prefix, workers=0)


def test_two_files_made_from_the_same_text_are_the_same(sentencepiece_spec, corpus, prefix):
    for name in "ab":
        make(corpus, sentencepiece_spec, prefix + name)
    hashes = {
        hashlib.sha256(Path(f"{prefix}{name}.{kind}").read_bytes()).hexdigest()
        for name in "ab"
        for kind in ("bin", "idx")
    }
    assert len(hashes) == 2
