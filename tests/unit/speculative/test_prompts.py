"""Prompts in the formats in which benchmarks are published."""

import gzip
import json

import pytest

from megatron_mtpd.speculative.prompts import Prompt, read_prompts, render

# One record of each, with the fields that its publisher uses (values shortened).
AGIEVAL = {
    "passage": "Ann is older than Bo.",
    "question": "Who is older?",
    "options": ["(A)Ann", "(B)Bo"],
    "label": "A",
}
SUPER_GPQA = {"uuid": "1", "question": "2 + 2?", "options": ["3", "4"], "answer": "4", "answer_letter": "B"}
GSM8K = {"question": "How many apples?", "answer": "#### 3"}
MATH = {"problem": "Compute $1+1$.", "level": "Level 1", "type": "Algebra", "solution": "2"}
NATURAL_QUESTIONS = {"question": "who wrote emma", "answer": ["Jane Austen"]}
TRIVIA_QA = {"Question": "Capital of Peru?", "QuestionId": "tc_1", "Answer": {"Value": "Lima"}}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "",
    "test": "",
}
SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."]}

CASES = [
    (AGIEVAL, "Ann is older than Bo.\nQuestion: Who is older?\n(A)Ann\n(B)Bo\nAnswer:"),
    (AGIEVAL | {"passage": None}, "Question: Who is older?\n(A)Ann\n(B)Bo\nAnswer:"),
    (AGIEVAL | {"passage": None, "options": None}, "Question: Who is older?\nAnswer:"),
    (SUPER_GPQA, "Question: 2 + 2?\n(A) 3\n(B) 4\nAnswer:"),
    (GSM8K, "Question: How many apples?\nAnswer:"),
    (MATH, "Problem: Compute $1+1$.\nAnswer:"),
    (NATURAL_QUESTIONS, "Question: who wrote emma\nAnswer:"),
    (TRIVIA_QA, "Question: Capital of Peru?\nAnswer:"),
    (HUMAN_EVAL, "def f():\n"),
    (SPEC_BENCH, "Write a poem."),
    ({"prompt": "as it is "}, "as it is "),
    ({"text": "as it is"}, "as it is"),
]


@pytest.mark.parametrize(("record", "prompt"), CASES)
def test_every_format_is_known_by_its_fields(record, prompt):
    assert render(record) == prompt


def test_files_of_every_kind(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(f"{json.dumps(GSM8K)}\n\n{json.dumps(GSM8K)}\n")
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(HUMAN_EVAL).encode()))
    (tmp_path / "trivia.json").write_text(json.dumps({"Data": [TRIVIA_QA], "Version": 1}))
    (tmp_path / "simple_qa.csv").write_text('metadata,problem,answer\n"{}","Who, and\nwhen?",x\n')
    (tmp_path / "mine.txt").write_text("one\n\n two\n")
    (tmp_path / "MATH" / "algebra").mkdir(parents=True)
    for name in ("2", "1"):
        (tmp_path / "MATH" / "algebra" / f"{name}.json").write_text(json.dumps(MATH | {"problem": name}))
    sources = ["gsm8k.jsonl", "HumanEval.jsonl.gz", "trivia.json", "simple_qa.csv", "mine.txt", "MATH"]
    found = read_prompts([*(str(tmp_path / s) for s in sources), f"again={tmp_path / 'mine.txt'}"])
    assert [(p.benchmark, p.text) for p in found] == [
        ("gsm8k", "Question: How many apples?\nAnswer:"),
        ("gsm8k", "Question: How many apples?\nAnswer:"),
        ("HumanEval", "def f():\n"),
        ("trivia", "Question: Capital of Peru?\nAnswer:"),
        ("simple_qa", "Problem: Who, and\nwhen?\nAnswer:"),
        ("mine", "one"),
        ("mine", " two"),
        ("MATH", "Problem: 1\nAnswer:"),
        ("MATH", "Problem: 2\nAnswer:"),
        ("again", "one"),
        ("again", " two"),
    ]


def test_what_the_model_wrote_is_prompt_and_answer(tmp_path):
    document = {"text": "for people", "tokens": [5, 6, 7], "prompt_tokens": 2, "ended": True}
    bad = [document | {"prompt_tokens": n} for n in (0, 4, "2")] + [document | {"tokens": t} for t in ("5 6", [5, 6.5])]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(one) for one in [document, *bad]))
    good, *others = read_prompts([str(tmp_path / "own.jsonl")])
    assert good == Prompt("own", "own.jsonl:1", "", "", (5, 6, 7), 2)
    assert [one.error for one in others] == [
        "ValueError: prompt_tokens is 0, of 3 tokens",
        "ValueError: prompt_tokens is 4, of 3 tokens",
        "ValueError: prompt_tokens is '2', of 3 tokens",
        "ValueError: tokens is not a list of token ids",
        "ValueError: tokens is not a list of token ids",
    ]


def test_a_bad_record_is_one_bad_prompt(tmp_path):
    lines = [json.dumps(GSM8K), "{not json", '{"a": 1}', "3", '{"prompt": " "}', '{"turns": []}', json.dumps(GSM8K)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    found = read_prompts([str(tmp_path / "some.jsonl")])
    assert [bool(p.error) for p in found] == [False, True, True, True, True, True, False]
    assert found[2] == Prompt("some", "some.jsonl:3", "", "ValueError: no known format has the fields a")


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_source_that_cannot_be_read_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"--prompts.*p\.jsonl"):
        read_prompts([str(tmp_path / "p.jsonl")])
