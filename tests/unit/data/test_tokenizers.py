import hashlib
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mtpd.data.tokenizers import load_tokenizer

TEXTS = [
    "def f(x):\n\n\treturn  x  # naïve\n",
    "   leading and trailing   ",
    "\t\t\t\t\t\r\n",
    "漢字 🙂‍↔️ \x00",
    "</s><s><unk><|end|> [MASK]",
    "x",
]


def megatron_tokenizer(tokenizer_type: str, tokenizer_model: str):
    """What `megatron.training` builds from the two flags, its other tokenizer flags at their defaults."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    config = TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model)
    return build_tokenizer(Namespace(**(vars(config) | {"pad_vocab_size": False})))


def test_training_sees_the_same_tokens(spec, sources: list[str]):
    ours, theirs = spec.load(), megatron_tokenizer(*spec)
    texts = TEXTS + sources[:10]
    assert ours.encode(texts) == [theirs.tokenize(text) for text in texts]
    assert ours.vocab_size == theirs.vocab_size
    assert ours.eod == theirs.eod is not None


def test_ids_stay_in_the_vocabulary(spec, sources: list[str]):
    tokenizer = spec.load()
    assert max(map(max, tokenizer.encode(TEXTS + sources))) < tokenizer.vocab_size
    assert tokenizer.encode([]) == []


def test_text_comes_back(spec, sources: list[str]):
    tokenizer = spec.load()
    for text, ids in zip(sources, tokenizer.encode(sources), strict=True):
        assert tokenizer.decode(ids).removeprefix("<|begin|>") == text


def test_the_files_are_identified(spec):
    tokenizer = spec.load()
    hashes = tokenizer.sha256()
    folder = Path(spec.tokenizer_model)
    folder = folder if folder.is_dir() else folder.parent
    assert {"tok.model"} == set(hashes) or {"tokenizer.json", "tokenizer_config.json"} == set(hashes)
    for name, value in hashes.items():
        assert value == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="SentencepieceTokeniser: unknown; did you mean SentencePieceTokenizer"):
        load_tokenizer("SentencepieceTokeniser", "x")
    with pytest.raises(ValueError, match="unknown; choose SentencePieceTokenizer or HuggingFaceTokenizer"):
        load_tokenizer("tiktoken", "x")
    with pytest.raises(ValueError, match=r"nowhere\.model: no such file; tools/train_tokenizer\.py"):
        load_tokenizer("SentencePieceTokenizer", str(tmp_path / "nowhere.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer("SentencePieceTokenizer", str(tmp_path / "bad.model"))
    with pytest.raises(ValueError, match="nowhere: no such folder; give the folder that holds"):
        load_tokenizer("HuggingFaceTokenizer", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="transformers cannot load it"):
        load_tokenizer("HuggingFaceTokenizer", str(tmp_path))
