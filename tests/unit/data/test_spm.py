import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_mtpd.data.spm import CHUNK, cut, sample, train_tokenizer
from megatron_mtpd.data.stdlib_corpus import stdlib_corpus
from megatron_mtpd.data.text import TextFiles

TRICKY = [
    "",
    " ",
    "\n",
    "\t",
    "\r\n",
    "  a  ",
    "\n\n\n    x\n",
    "\t" * 7 + "y",
    "\x00",
    "é漢字🙂‍",
    "0123",
    "</s>",
    "<0x0A>",
]


@pytest.fixture(scope="module")
def processor(sentencepiece_spec) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=sentencepiece_spec.tokenizer_model)


def test_sources_come_back_exactly(processor, sources: list[str]):
    for text in TRICKY + sources:
        assert processor.Decode(processor.Encode(text)) == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581")))
def test_any_text_comes_back_exactly(processor, text: str):
    assert processor.Decode(processor.Encode(text)) == text


def test_sentencepieces_own_space_symbol_is_the_only_exception(processor):
    assert processor.Decode(processor.Encode("a\u2581b")) == "a b"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_both_kinds_lose_nothing_and_have_the_size_asked_for(tmp_path: Path, model_type: str, sources: list[str]):
    prefix = str(tmp_path / "tok")
    result = train_tokenizer(stdlib_corpus(150_000), prefix, vocab_size=500, model_type=model_type, progress=False)
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    assert processor.GetPieceSize() == result["options"]["vocab_size"] == 500
    for text in TRICKY + sources[:10]:
        assert processor.Decode(processor.Encode(text)) == text


def test_the_whitespace_of_code_is_cheap(processor):
    pieces = {processor.IdToPiece(i) for i in range(processor.GetPieceSize())}
    assert {"▁" * 4, "▁" * 8, "\n", "\n\n", ":\n", "\t", "\t" * 4} <= pieces
    assert processor.Encode("\t\t\t\t", out_type=str) == ["\t\t\t\t"]
    assert processor.Encode(" " * 8, out_type=str) == ["▁" * 8]


def test_special_pieces_never_come_from_text(processor):
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id()] == [0, 1, 2, 3]
    assert not set(processor.Encode("<unk><s></s><pad>")) & {0, 1, 2, 3}


def test_the_same_text_gives_the_same_bytes(tmp_path: Path, sources: list[str]):
    """In another process, from other files: one document a file in one case, all in one in the other."""
    for number, text in enumerate(sources[:20]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / f"{number}.txt") for number in range(20)]
    for name, order in (("a", files), ("b", files[::-1])):
        code = (
            "from megatron_mtpd.data.spm import train_tokenizer\n"
            "from megatron_mtpd.data.text import TextFiles\n"
            f"train_tokenizer(TextFiles({order}), {str(tmp_path / name)!r}, vocab_size=400)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


@given(st.lists(st.binary(max_size=8), max_size=30), st.integers(1, 60), st.randoms())
def test_the_sample_is_the_longest_beginning_of_the_sorted_chunks(chunks, max_bytes, random):
    def key(chunk: bytes) -> bytes:
        return hashlib.blake2b(chunk, digest_size=8).digest()

    expected = sorted(chunks, key=key)
    while sum(map(len, expected)) > max_bytes:
        expected.pop()
    assert sample(chunks, max_bytes) == expected
    random.shuffle(chunks)
    assert sample(chunks, max_bytes) == expected


@given(st.text(st.sampled_from("a\n"), max_size=30), st.integers(1, 6))
def test_chunks_make_up_the_text(text: str, size: int):
    import megatron_mtpd.data.spm as spm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spm, "CHUNK", size)
        chunks = list(cut(text))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= size for chunk in chunks)


def test_chunks_end_before_line_ends(sources: list[str]):
    longest = max(sources, key=len)
    chunks = list(cut(longest))
    assert len(chunks) >= len(longest) / CHUNK > 2
    assert not any(chunk.endswith("\n") for chunk in chunks[:-1])


def test_a_sample_of_one_large_file(tmp_path: Path, sources: list[str]):
    (tmp_path / "all.txt").write_text("".join(sources), encoding="utf-8")
    result = train_tokenizer(
        TextFiles([tmp_path / "all.txt"]),
        str(tmp_path / "tok"),
        vocab_size=400,
        max_bytes=100_000,
        progress=False,
    )
    assert 90_000 < result["sample_bytes"] <= 100_000 < result["text_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "--vocab-size 100: .*smaller than required_chars"),
        ({"vocab_size": 100_000}, "--vocab-size 100000: .*too high"),
        ({"vocab_size": 400, "model_type": "word"}, "--model-type word: choose one of bpe, unigram"),
        ({"vocab_size": 400, "max_bytes": 0}, "--max-bytes 0"),
        ({"vocab_size": 400, "character_coverage": 1.5}, "--character-coverage 1.5"),
        ({"vocab_size": 400, "max_bad": "many"}, "--max-bad many"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(tmp_path: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(stdlib_corpus(60_000), str(tmp_path / "tok"), progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_tokenizer_is_refused(sentencepiece_spec):
    model = Path(sentencepiece_spec.tokenizer_model)
    before = model.read_bytes()
    with pytest.raises(ValueError, match=r"exists; .*--force"):
        train_tokenizer(stdlib_corpus(60_000), str(model.with_suffix("")), vocab_size=400, progress=False)
    assert model.read_bytes() == before
