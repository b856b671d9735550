"""Small tokenizers of both kinds, made once from the standard library's sources."""

from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_mtpd.data.spm import train_tokenizer
from megatron_mtpd.data.stdlib_corpus import stdlib_corpus, stdlib_documents
from megatron_mtpd.data.tokenizers import Tokenizer, load_tokenizer


class Spec(NamedTuple):
    """What the two tokenizer flags say."""

    tokenizer_type: str
    tokenizer_model: str

    def load(self) -> Tokenizer:
        return load_tokenizer(*self)


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """0.4 MB of Python."""
    return [document.text for document in stdlib_documents(400_000)]


@pytest.fixture(scope="session")
def sentencepiece_spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tok"
    train_tokenizer(stdlib_corpus(400_000), str(prefix), vocab_size=800, progress=False)
    return Spec("SentencePieceTokenizer", f"{prefix}.model")


@pytest.fixture(scope="session")
def hugging_face_spec(tmp_path_factory: pytest.TempPathFactory, sources: list[str]) -> Spec:
    """Byte-level BPE, as GPT-2's, with a template that puts a token before each text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources[:5], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    folder = tmp_path_factory.mktemp("hugging_face")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(
        folder
    )
    return Spec("HuggingFaceTokenizer", str(folder))


@pytest.fixture(params=["sentencepiece_spec", "hugging_face_spec"])
def spec(request: pytest.FixtureRequest) -> Spec:
    return request.getfixturevalue(request.param)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """An output prefix in a folder of its own."""
    return str(tmp_path / "out" / "data")
