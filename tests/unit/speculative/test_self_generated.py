"""Text that a toy writes itself: what is in it, and that neither batches nor interruptions change it."""

import functools
import json

import pytest

from megatron_mtpd.data.preprocess import preprocess
from megatron_mtpd.data.text import TextFiles
from megatron_mtpd.speculative import self_generated
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.sampling import Sampling
from megatron_mtpd.speculative.self_generated import DOCUMENTS, Options, run
from tests.distributed.checkpoints import HEADS, save_checkpoint
from tests.unit.speculative.toys import TEMPLATE, chat_tokenizer, plain

SIZE, QUESTIONS, END = 12, 24, 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [94, 5]]
BEFORE, BEHIND = [1, 2], [0, 1, 3]
"""Ids of the template around the user's words."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory, one_process):
    """Folder of a checkpoint and a chat tokenizer, and its model. Its most frequent token ends a document."""
    path = tmp_path_factory.mktemp("toy")
    return path, save_checkpoint(str(path / "checkpoint")).eval()


@pytest.fixture
def options(toy, tmp_path):
    folder, _ = toy
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": words(ids)}) for ids in PROMPTS))

    def make(output="out", **changes):
        values = {
            "load": folder / "checkpoint",
            "output": tmp_path / output,
            "max_new_tokens": SIZE,
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": chat_tokenizer(tmp_path / "tokenizer"),
        }
        return Options(**values | changes)

    return make


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def documents(options):
    return [json.loads(line) for line in (options.output / "generated.jsonl").read_text().splitlines()]


def until_end(tokens):
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


@pytest.mark.parametrize("num_heads", [0, HEADS])
def test_greedy_continuations_are_those_of_whole_passes(toy, options, tmp_path, num_heads):
    chosen = options(prompts=[str(tmp_path / "prompts.jsonl")], num_heads=num_heads, sampling=Sampling())
    found = run(chosen)
    expected = [until_end(plain(toy[1], ids, SIZE)) for ids in PROMPTS]
    assert [d["tokens"] for d in documents(chosen)] == [p + e for p, e in zip(PROMPTS, expected, strict=True)]
    assert [d["prompt_tokens"] for d in documents(chosen)] == list(map(len, PROMPTS))
    assert [d["ended"] for d in documents(chosen)] == [END in e for e in expected]
    assert found["generated_tokens"] == sum(map(len, expected))


def test_questions_and_answers_are_the_model_s_own(toy, options):
    chosen = options(questions=QUESTIONS)
    found = run(chosen)
    whole = documents(chosen)
    assert found["documents"] == len(whole) > 3 and found["documents"] + found["left_out"] == QUESTIONS
    for document in whole:
        tokens = document["tokens"]
        assert tokens[: len(BEFORE)] == BEFORE and document["prompt_tokens"] == len(BEFORE)
        end = tokens.index(END)
        assert 1 <= end - len(BEFORE) < SIZE and tokens[end : end + len(BEHIND)] == BEHIND
        answer = tokens[end + len(BEHIND) :]
        assert answer and (answer[-1] == END) == document["ended"] and (document["ended"] or len(answer) == SIZE)
        assert document["text"].split()[:2] == ["<|start|>", "user"]
    assert len({tuple(d["tokens"]) for d in whole}) == len(whole)

    # The answer is what the model gives to the whole of it, with the document's own random numbers.
    number = next(line["prompt"] for line in lines(chosen) if line.get("tokens") == whole[0]["tokens"])
    start = whole[0]["tokens"][: whole[0]["tokens"].index(END) + len(BEHIND)]
    decoder = Decoder(toy[1], 0, 1, 64, 95, chosen.sampling)
    (answer,) = generate(decoder, [Request(2 * number + 1, start, SIZE)], END, chosen.seed)
    assert start + answer.tokens == whole[0]["tokens"]


def lines(options):
    """What was written of documents as soon as it was there."""
    (path,) = (options.output / "results").glob("rank*.jsonl")
    parts = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
    return [line for line in parts if line["run"] == DOCUMENTS]


def test_the_batch_size_changes_nothing(options, tmp_path):
    """Sums of other batches round otherwise; a draw would have to fall within the last bits of a probability."""
    both = {"prompts": [str(tmp_path / "prompts.jsonl")], "samples": 2, "questions": QUESTIONS, "chat": True}
    one, many = options("one", batch_size=1, **both), options("many", batch_size=16, **both)
    run(one)
    run(many)
    assert (one.output / "generated.jsonl").read_bytes() == (many.output / "generated.jsonl").read_bytes()
    first, second, *_ = documents(one)
    asked = [*BEFORE, *PROMPTS[0], *BEHIND]
    assert first["tokens"][: len(asked)] == second["tokens"][: len(asked)] == asked
    assert first["tokens"] != second["tokens"]


@pytest.mark.parametrize("stop_after", [2, QUESTIONS + 2])
def test_a_rerun_does_what_is_left(options, monkeypatch, stop_after):
    """Killed among the questions, and among the answers, in the middle of a line."""
    whole, chosen = options("whole", questions=QUESTIONS), options("killed", questions=QUESTIONS, batch_size=2)
    run(whole)
    made: list[int] = []

    def counted(*args, limit):
        for done in generate(*args):
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(done.key)
            yield done

    monkeypatch.setattr(self_generated, "generate", functools.partial(counted, limit=stop_after))
    with pytest.raises(KeyboardInterrupt):
        run(chosen)
    assert len(made) == stop_after and not (chosen.output / "generated.jsonl").exists()
    (part,) = (chosen.output / "results").glob("rank*.jsonl")
    part.write_bytes(part.read_bytes()[:-5])  # the last result was not written to its end
    lost = made.pop()
    monkeypatch.setattr(self_generated, "generate", functools.partial(counted, limit=None))
    run(chosen)
    answers = sum("error" not in line for line in lines(whole))
    assert lost in made[stop_after - 1 :] and len(set(made)) == len(made) == QUESTIONS + answers
    assert (chosen.output / "generated.jsonl").read_bytes() == (whole.output / "generated.jsonl").read_bytes()


def test_a_question_may_end_otherwise_than_a_document(options, tmp_path):
    """As in templates that put the answer's beginning right behind the user's words."""
    template = "{{ '<|start|> user ' + messages[0]['content'] + ' <|start|> assistant ' }}"
    other = chat_tokenizer(tmp_path / "other", template)
    chosen = options(questions=4 * QUESTIONS, tokenizer_model=other)
    run(chosen)
    for document in documents(chosen):
        question = document["tokens"][len(BEFORE) :]
        assert question[question.index(1) :][:2] == [1, 3] and question.index(1) > 0


def test_nothing_usable_is_no_success(options, tmp_path):
    template = "{{ '<|start|> user ' + messages[0]['content'] + ' <|start|> assistant ' }}"
    never = options(questions=2, max_new_tokens=1, tokenizer_model=chat_tokenizer(tmp_path / "other", template))
    with pytest.raises(ValueError, match="Not one of 2 documents has text: the question"):
        run(never)
    assert not (never.output / "generated.jsonl").exists()


def test_fewer_questions_are_the_first_of_them(options):
    run(options(questions=QUESTIONS))
    whole = documents(options(questions=QUESTIONS))
    run(options(questions=QUESTIONS // 2))
    half = documents(options(questions=QUESTIONS // 2))
    assert half == whole[: len(half)] and 0 < len(half) < len(whole)


def test_more_questions_leave_the_first_as_they_are(options):
    run(options(questions=3))
    first = documents(options(questions=3))
    run(options(questions=QUESTIONS))
    assert documents(options(questions=QUESTIONS))[: len(first)] == first


def test_training_sees_the_tokens(options, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    chosen = options(questions=QUESTIONS)
    run(chosen)
    corpus = TextFiles([chosen.output / "generated.jsonl"], json_key="tokens")
    preprocess(corpus, chosen.tokenizer_type, chosen.tokenizer_model, str(tmp_path / "data"), progress=False)
    dataset = IndexedDataset(str(tmp_path / "data"))
    expected = [d["tokens"] if d["ended"] else [*d["tokens"], END] for d in documents(chosen)]
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected


def test_bad_prompts_cost_nothing_else(options, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "w5"}}\n{{}}\n{{"prompt": "{words([5] * 60)}"}}\n')
    found = run(options(prompts=[str(tmp_path / "prompts.jsonl")]))
    assert (found["documents"], found["left_out"]) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give --prompts, or --questions"),
        ({"questions": 5, "sampling": Sampling()}, "--temperature 0 writes one text again and again"),
        ({"questions": -1}, "--questions is -1: give at least 0"),
        ({"questions": 1, "max_new_tokens": 0}, "--max-new-tokens is 0: give at least 1"),
        ({"questions": 1, "max_new_tokens": 40}, "--max-new-tokens 40 leaves no room for prompts in the 64 tokens"),
        ({"questions": 1, "num_heads": HEADS + 1}, rf"--num-heads {HEADS + 1}: the model has {HEADS} heads"),
        ({"questions": 1, "tokenizer_type": "NullTokenizer"}, "needs a HuggingFaceTokenizer"),
        ({"prompts": ["nowhere.jsonl"]}, "nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(options, changes, message):
    with pytest.raises(ValueError, match=message):
        run(options(**changes))
    assert not options(questions=1).output.exists()


def test_other_settings_are_refused(options, tmp_path):
    run(options(questions=1))
    with pytest.raises(ValueError, match=r"results of other settings \(temperature\)"):
        run(options(questions=1, sampling=Sampling(temperature=0.5)))
    with pytest.raises(ValueError, match=r"results of other settings \(turn\)"):
        run(options(questions=1, tokenizer_model=chat_tokenizer(tmp_path / "x", TEMPLATE.replace("start", "end"))))
