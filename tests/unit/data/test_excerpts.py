import re

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_mtpd.data.excerpts import draw, parse_blend


def write(prefix, documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.uint16), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def two(tmp_path):
    """One dataset of long documents, which count up from 1000 x their number, and one of short ones of a 1 each."""
    long = [[1000 * number + i for i in range(300)] for number in range(1, 6)]
    return [(3.0, write(tmp_path / "long", long)), (1.0, write(tmp_path / "short", [[1] * 10] * 50))]


def test_proportions_lengths_and_places(two):
    found = draw(two, 4000, 64, seed=1)
    assert sum(map(len, found)) == 4000 and max(map(len, found)) == 64
    assert sum(len(text) for text in found if text[0] == 1) == 1000
    long = [text for text in found if text[0] != 1]
    assert all(text == list(range(text[0], text[0] + len(text))) for text in long), "within one document"
    assert {text[0] // 1000 for text in long} == {1, 2, 3, 4, 5}
    assert len({text[0] for text in long}) > 30, "from anywhere in it"
    first = found[: len(found) // 2]
    assert 0.2 < sum(text[0] == 1 for text in first) / len(first) < 0.95, "mixed"


def test_the_seed_decides(two):
    assert draw(two, 500, 64, seed=(1, 0)) == draw(two, 500, 64, seed=(1, 0)) != draw(two, 500, 64, seed=(1, 1))


def test_blends(two):
    (_, long), (_, short) = two
    assert parse_blend([str(long), str(short)]) == [(1.0, long), (1.0, short)]
    assert parse_blend(["3", str(long), "0.5", str(short)]) == [(3.0, long), (0.5, short)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere.idx does not exist or is empty; give what preprocess_data.py wrote"),
        (["1", "{long}", "{short}"], "give prefixes alone, or a weight before each"),
        (["1", "{long}", "-2", "{short}"], "-2 is no weight"),
        (["1", "{long}", "two", "{short}"], "two is no weight"),
    ],
)
def test_refused_blends(two, words, message):
    names = {"long": two[0][1], "short": two[1][1]}
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_blend([word.format(**names) for word in words])


def test_a_dataset_without_tokens(tmp_path):
    with pytest.raises(ValueError, match=r"empty\.bin does not exist or is empty"):
        parse_blend([str(write(tmp_path / "empty", []))])
