"""A chat template as text around what the user says.

An instruct model has learned its template whole: given the part before the user's words it writes a question of its
own, given the part behind them it answers (Magpie, arXiv 2406.08464).

Deliberately absent: several turns, tools, and a system prompt other than the template's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_mtpd.data.tokenizers import HuggingFaceTokenizer, Tokenizer

_WORDS = "WHAT-THE-USER-SAYS"


class UserTurn(NamedTuple):
    """What stands before and behind the user's words; behind them, up to where the answer begins."""

    before: str
    behind: str
    end: int | None = None
    """The token that ends the user's words, where the template has one for that; else they end as a document does."""

    def around(self, words: str) -> str:
        """The prompt that asks for an answer to `words`."""
        return self.before + words + self.behind


def user_turn(tokenizer: Tokenizer) -> UserTurn:
    """The first user turn of a tokenizer's chat template. Raises ValueError where there is no template to be used."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"A chat template needs a HuggingFaceTokenizer; {tokenizer.model} is a {tokenizer.type}.")
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(tokenizer.model)
    if not theirs.chat_template:
        raise ValueError(f"{tokenizer.model} has no chat template: it is not of an instruct model. Give --prompts.")
    said = [{"role": "user", "content": _WORDS}]
    text = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    if theirs.bos_token and tokenizer.encode([""])[0] == [theirs.bos_token_id]:
        text = text.removeprefix(theirs.bos_token)  # the tokenizer adds it to every text
    if text.count(_WORDS) != 1:
        raise ValueError(f"{tokenizer.model}: its chat template does not repeat what the user says once and as it is.")
    before, behind = text.split(_WORDS)
    first = (theirs.encode(behind.lstrip(), add_special_tokens=False) or [None])[0]
    return UserTurn(before, behind, first if first in theirs.added_tokens_decoder else None)
