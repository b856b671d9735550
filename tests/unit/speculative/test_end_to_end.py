"""The comparison with transformers' generate: the same tokens, and ratios prompt by prompt."""

import json
from pathlib import Path

import pytest

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.speculative.end_to_end import PLAIN, TRANSFORMERS, Options, _rows, _Way, compare, table
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape
from tests.unit.speculative.toys import chat_tokenizer


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "ours", toy_shape(2))
    export_hf(tmp_path / "ours", tmp_path / "out")
    chat_tokenizer(tmp_path / "out")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{n} w{n + 3}"}) + "\n" for n in range(4)))
    return tmp_path


def options(exported: Path, **others) -> Options:
    values = {"load": exported / "ours", "hf": exported / "out", "prompts": [str(exported / "prompts.jsonl")]}
    return Options(**{**values, "num_heads": (1, 2), "new_tokens": 12, **others})


def test_every_way_gives_the_tokens_of_transformers(exported: Path, one_process: None) -> None:
    assert compare(options(exported, new_tokens=2))["new_tokens"] == 2, "less than what warms up"
    found = compare(options(exported, draft_vocab_size=(40,), limit=3))
    names = [row["decoding"] for row in found["rows"]]
    heads = ["ours, 1 head", "ours, 2 heads"]
    assert names == [TRANSFORMERS, PLAIN, *heads, *(f"{name}, drafts of 40 ids" for name in heads)]
    assert found["prompts"] == 3 and found["dtype"] == "fp32"
    for row in found["rows"]:
        assert row["outputs_equal_to_transformers"] == 3, row["decoding"]
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["tokens_per_second"] == pytest.approx(3 * 12 / sum(row["seconds"]))
        assert (row["tokens_per_step"] == 1) == (row["num_heads"] in (None, 0)), "toys' heads are right now and then"
    assert all(f"| {name} |" in table(found) for name in names)


def test_ratios_are_of_the_same_prompt_and_their_median_counts() -> None:
    def way(seconds, tokens, steps):
        return _Way(lambda prompt, number: ([], 0), 0, tokens, seconds, steps)

    ways = {
        TRANSFORMERS: way([2.0, 4.0, 3.0], [[1], [2], [3]], 12),
        PLAIN: way([1.0, 4.0, 1.0], [[1], [2], [4]], 6),
    }
    theirs, ours = _rows(ways, new_tokens=5)
    assert (theirs["over_transformers"], theirs["over_plain"]) == (1, 0.5)
    assert ours["over_transformers"] == 2 and ours["over_transformers_range"] == [1, 3]
    assert ours["tokens_per_second"] == pytest.approx(15 / 6) and ours["tokens_per_step"] == 2
    assert ours["outputs_equal_to_transformers"] == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"new_tokens": 1}, "--new-tokens is 1: give at least 2"),
        ({"limit": 0}, "--limit is 0"),
        ({"num_heads": (1, 0)}, "--num-heads 0"),
        ({"hf": Path("nowhere")}, "nowhere"),
    ],
)
def test_values_that_cannot_work_are_refused(exported: Path, wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(exported, **wrong)


def test_what_is_refused_later_is_refused_before_anything_is_timed(exported: Path, one_process: None) -> None:
    with pytest.raises(ValueError, match="--draft-vocab-size 100000"):
        compare(options(exported, draft_vocab_size=(100_000,)))
    with pytest.raises(ValueError, match="--num-heads 3"):
        compare(options(exported, num_heads=(3,)))
    (exported / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty"):
        compare(options(exported, prompts=[str(exported / "empty.txt")]))
