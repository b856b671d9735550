"""What stands around the user's words in a chat template."""

import pytest

from megatron_mtpd.data.tokenizers import HuggingFaceTokenizer
from megatron_mtpd.speculative.chat import user_turn
from megatron_mtpd.speculative.worker import NumberTokenizer
from tests.unit.speculative.toys import TEMPLATE, chat_tokenizer


def turn(tmp_path, template, **options):
    return user_turn(HuggingFaceTokenizer(chat_tokenizer(tmp_path, template, **options)))


def test_a_turn_is_what_the_template_writes_around_the_words(tmp_path):
    found = turn(tmp_path, TEMPLATE)
    assert found == ("<|start|> user ", " <|end|> <|start|> assistant ", 0)
    assert found.around("w7 w8") == "<|start|> user w7 w8 <|end|> <|start|> assistant "


def test_a_beginning_that_the_tokenizer_adds_is_not_there_twice(tmp_path):
    found = turn(tmp_path, "{{ bos_token }}" + TEMPLATE, adds_first=True)
    assert found.before == "<|start|> user "


def test_words_may_end_with_a_token_of_the_template_or_with_none_of_its_own(tmp_path):
    assert turn(tmp_path, "{{ '<|start|> user ' + messages[0]['content'] + ' <|start|> w9 ' }}").end == 1
    assert turn(tmp_path, "{{ '<|start|> user ' + messages[0]['content'] + ' w9 ' }}").end is None


@pytest.mark.parametrize(
    ("template", "message"), [(None, "no chat template"), ("{{ messages[0]['role'] }}", "does not repeat")]
)
def test_templates_that_are_of_no_use_are_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        turn(tmp_path, template)


def test_numbers_have_no_template():
    with pytest.raises(ValueError, match="needs a HuggingFaceTokenizer"):
        user_turn(NumberTokenizer(8))
