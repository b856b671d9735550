"""One small interface over SentencePiece and Hugging Face tokenizers, for bulk encoding.

The contract is agreement with training: for the same `--tokenizer-type` and `--tokenizer-model`, with
Megatron's other tokenizer flags at their defaults, the ids, the vocabulary size and the end-of-document id
are those that `megatron.core.tokenizers` gives (a test compares them). Ours encodes lists of texts at once,
in one thread, and starts without torch and Megatron, which worker processes would otherwise each spend
seconds on.

Absent on purpose: Megatron's other tokenizer types, its legacy SentencePiece mode, chat templates, added
tokens.
"""

import difflib
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What preprocessing and generation need."""

    type: str
    model: str
    vocab_size: int  # unpadded
    eod: int | None  # end of document; None: the tokenizer has no such token

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        ...

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each file that defines the tokenizer, by file name; empty for a name on the Hub."""
        ...


class SentencePieceTokenizer:
    """A .model file; the end of a document is its end-of-sentence piece, as for Megatron."""

    type = "SentencePieceTokenizer"

    def __init__(self, model: str) -> None:
        import sentencepiece

        if not os.path.isfile(model):
            raise ValueError(f"--tokenizer-model {model}: no such file; tools/train_tokenizer.py makes one")
        self.model = model
        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromFile(model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"--tokenizer-model {model}: not a SentencePiece model ({error})") from error
        self.vocab_size = int(self._processor.GetPieceSize())
        eos = int(self._processor.eos_id())
        self.eod = eos if eos >= 0 else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.Encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.Decode([int(i) for i in ids])

    def sha256(self) -> dict[str, str]:
        return {os.path.basename(self.model): _sha256(self.model)}


class HuggingFaceTokenizer:
    """A folder with a tokenizer, or its name on the Hub; special tokens of its template are added, as
    Megatron does.

    A special token that is spelled out in a text becomes that token: `preprocess` counts the texts with an
    end-of-document token inside.
    """

    type = "HuggingFaceTokenizer"

    def __init__(self, model: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as error:
            raise ValueError(
                "--tokenizer-type HuggingFaceTokenizer needs transformers: pip install transformers"
            ) from error
        if os.path.isfile(model) or (not os.path.isdir(model) and model.count("/") > 1):
            raise ValueError(
                f"--tokenizer-model {model}: no such folder; "
                "give the folder that holds tokenizer.json, or a name on the Hub"
            )
        self.model = model
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        except Exception as error:  # whatever is wrong with the files, transformers has many words for it
            what = "" if os.path.isdir(model) else "no such folder, and as a name on the Hub "
            raise ValueError(f"--tokenizer-model {model}: {what}transformers cannot load it: {error}") from error
        self.vocab_size = len(self._tokenizer)
        eos = self._tokenizer.eos_token_id
        self.eod = eos if eos is not None else self._tokenizer.sep_token_id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: documents longer than the context of some model are no reason to warn
        return self._tokenizer(list(texts), verbose=False, return_attention_mask=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def sha256(self) -> dict[str, str]:
        if not os.path.isdir(self.model):
            return {}
        defining = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece")
        names = sorted(name for name in os.listdir(self.model) if name.startswith(defining))
        return {name: _sha256(os.path.join(self.model, name)) for name in names}


TOKENIZER_TYPES: dict[str, type] = {t.type: t for t in (SentencePieceTokenizer, HuggingFaceTokenizer)}


def load_tokenizer(tokenizer_type: str, tokenizer_model: str) -> Tokenizer:
    """Load a tokenizer by Megatron's names. Raises ValueError: unknown type, missing or damaged model."""
    if tokenizer_type not in TOKENIZER_TYPES:
        close = difflib.get_close_matches(tokenizer_type, TOKENIZER_TYPES, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"choose {' or '.join(TOKENIZER_TYPES)}"
        raise ValueError(f"--tokenizer-type {tokenizer_type}: unknown; {hint}")
    return TOKENIZER_TYPES[tokenizer_type](tokenizer_model)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
