import bz2
import gzip
import importlib.util
import json
import lzma
from pathlib import Path

import pytest

from megatron_mtpd.data import compression, text
from megatron_mtpd.data.accounting import EMPTY, Tally
from megatron_mtpd.data.text import Document, TextFiles

COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


def texts(*inputs: Path, **options) -> list[str]:
    return [document.text for document in TextFiles(inputs, **options).documents()]


def read_leniently(*inputs: Path, **options) -> tuple[list[Document], Tally]:
    tally = Tally("100%")
    return list(TextFiles(inputs, **options).documents(tally)), tally


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reads_what_was_compressed(tmp_path: Path, suffix: str):
    lines = [json.dumps({"text": f"añb\n {i}"}) + "\n" for i in range(2000)]
    path = tmp_path / f"shard.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("".join(lines).encode()))
    assert texts(path) == [f"añb\n {i}" for i in range(2000)]


def test_zst_is_read_where_python_can_and_refused_with_the_remedy_where_not(tmp_path: Path):
    path = tmp_path / "a.txt.zst"
    zstd = compression._zstd()
    if zstd is not None:
        path.write_bytes(zstd.compress(b"text"))
        assert texts(path) == ["text"]
    else:
        assert importlib.util.find_spec("compression") is None  # Python < 3.14
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"a\.txt\.zst: no decoder .*pip install backports\.zstd"):
            TextFiles([path])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "not compressed"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, suffix: str, damage: str):
    data = COMPRESS[suffix]("".join(f"line {i}\n" for i in range(5000)).encode())
    middle = len(data) // 2
    data = {
        "truncated": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "not compressed": b"plain text",
    }[damage]
    (tmp_path / f"a.txt{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.txt{suffix}: damaged"):
        texts(tmp_path / f"a.txt{suffix}", split="line")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ["one\r\ntwo\n\n \nthree\n four"]),
        ("line", ["one", "two", "three", " four"]),
        ("blank-line", ["one\r\ntwo", "three\n four"]),
    ],
)
def test_split_of_plain_text(tmp_path: Path, split: str, expected: list[str]):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n four")
    assert texts(tmp_path / "a.txt", split=split) == expected


def test_places_are_file_and_first_line(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("\none\ntwo\n\nthree\n")
    paragraphs, _ = read_leniently(path, split="blank-line")
    assert [where for _, where in paragraphs] == [f"{path}:2", f"{path}:5"]
    lines, tally = read_leniently(path, split="line")
    assert [where for _, where in lines] == [f"{path}:2", f"{path}:3", f"{path}:5"]
    assert tally.examples[EMPTY] == [f"{path}:1", f"{path}:4"]
    assert [where for _, where in read_leniently(path)[0]] == [str(path)]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path):
    for name in ("b.py", "a/z.py", "a/b.md", ".git/x.py", ".hidden.py", "c.jsonl", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "c.jsonl"}\n' if name == "c.jsonl" else name)
    (tmp_path / "d.py.gz").write_bytes(gzip.compress(b"d.py.gz"))
    assert texts(tmp_path) == ["a/b.md", "a/z.py", "b.py", "c.jsonl", "d.py.gz", "notes.txt"]
    assert texts(tmp_path, suffixes=["py", ".md"]) == ["a/b.md", "a/z.py", "b.py", "d.py.gz"]


def test_inputs_keep_the_order_in_which_they_are_given(tmp_path: Path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "b", tmp_path / "a") == ["b", "a"]


def test_every_bad_record_is_counted_with_its_reason_and_place(tmp_path: Path):
    lines = {
        b'{"text": "good"}': None,
        b'{"text": "bad': "invalid JSON",
        b'["text"]': "not a JSON object",
        b'{"content": "x"}': "missing key",
        b'{"text": 3}': "text is not a string",
        b'{"text": [3]}': "text is not a string",  # token ids are for preprocess alone
        b'{"text": "\\ud800"}': "lone surrogate",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": ""}': EMPTY,
        b'{"text": " \\n"}': EMPTY,
        b"": EMPTY,
        b"[" * 100_000: "invalid JSON",  # deeper than Python can recurse
    }
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, tally = read_leniently(path)
    assert documents == [("good", f"{path}:1")]
    assert tally.records == len(lines)
    assert (tally.bad_records, tally.empty) == (8, 3)
    assert tally.reasons["invalid JSON"] == 2
    for number, reason in enumerate(lines.values(), 1):
        if reason is not None:
            assert any(example.startswith(f"{path}:{number}") for example in tally.examples[reason])


def test_a_text_file_that_is_not_utf8_is_one_bad_record(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "b.txt").write_text("é", encoding="utf-8")
    documents, tally = read_leniently(tmp_path)
    assert [text for text, _ in documents] == ["é"]
    assert tally.examples["invalid UTF-8"] == [f"{tmp_path / 'a.txt'}: byte 0xe9 at offset 0"]


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"content": "x"}\n')
    assert texts(tmp_path / "a.json", format="jsonl", json_key="content") == ["x"]


def test_positions_rise_to_the_size_of_all_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\nb\n" * 10_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"c\nd\n" * 10_000))
    corpus = TextFiles([tmp_path], split="line")
    positions = [record.position for record in corpus.records()]
    assert positions == sorted(positions)
    assert positions[-1] == corpus.total_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_mistakes_are_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        TextFiles([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="empty: the folder holds no file; check"):
        TextFiles([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"holds no file ending in \.rs"):
        TextFiles([tmp_path], suffixes=["rs"])
    with pytest.raises(ValueError, match="listed twice"):
        TextFiles([tmp_path / "a.txt", tmp_path], suffixes=["txt"])
    with pytest.raises(ValueError, match=r"a\.json: .* say --format jsonl or --format text"):
        TextFiles([tmp_path / "a.json"])
    with pytest.raises(ValueError, match="--split words: choose one of file, blank-line, line"):
        TextFiles([tmp_path / "a.txt"], split="words")
    monkeypatch.setattr(text, "LARGEST_DOCUMENT", 99)
    with pytest.raises(ValueError, match=r"as one document would not fit .* --split blank-line"):
        TextFiles([tmp_path / "a.txt"])
    TextFiles([tmp_path / "a.txt"], split="line")


def test_the_listing_in_the_summary_changes_with_the_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    before = TextFiles([tmp_path]).summary()
    assert (before["files"], before["bytes_on_disk"], before["inputs"]) == (1, 1, [str(tmp_path)])
    assert TextFiles([tmp_path]).summary() == before
    (tmp_path / "b.txt").write_text("y")
    assert TextFiles([tmp_path]).summary()["listing_sha256"] != before["listing_sha256"]
