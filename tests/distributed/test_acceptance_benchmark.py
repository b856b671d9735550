"""The acceptance benchmark over ranks: its counts, its files, and what happens when a rank or a prompt fails."""

import json
from pathlib import Path

import pytest

from megatron_mtpd.speculative import benchmark, loading, report, worker
from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.results import read_lines
from megatron_mtpd.speculative.sampling import Sampling
from tests.distributed.checkpoints import HEADS, ITERATION, save_checkpoint
from tests.distributed.gloo import run
from tests.unit.speculative.toys import VOCABULARY, plain, prompts, speculative

pytestmark = pytest.mark.distributed

SIZE, TEXTS = 10, [text for text in prompts(12, seed=9) if max(text) < 95]
FIELDS = {
    *("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos", "acceptance_rate"),
    *("cumulative_acceptance_rate", "acceptance_length", "tokens_per_second", "tokens_per_second_autoregressive"),
    *("speedup_vs_autoregressive", "speedup_vs_one_head"),
    *("acceptance_rate_interval", "cumulative_acceptance_rate_interval"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint and two files of prompts; one record of the second is bad."""
    path = tmp_path_factory.mktemp("acceptance")
    run(save, 1, str(path / "checkpoint"))
    lines = [json.dumps({"prompt": " ".join(map(str, text))}) for text in TEXTS]
    (path / "first.jsonl").write_text("\n".join(lines[:5]))
    (path / "second.jsonl").write_text("\n".join([*lines[5:7], '{"prompt": "no number"}', *lines[7:]]))
    return path


def save(directory):
    save_checkpoint(directory)


def options(folder, output, **changes):
    values = {
        "load": folder / "checkpoint",
        "prompts": [str(folder / "first.jsonl"), f"other={folder / 'second.jsonl'}"],
        "output": output,
        "num_heads": [HEADS],
        "batch_size": 4,
        "max_new_tokens": SIZE,
    }
    return worker.Options(**values | changes)


def measure(chosen, fails_on=None):
    """`benchmark.run`; the replica `fails_on` dies of an exception after its third result."""
    if fails_on is not None:
        original = worker.generate

        def generate(decoder, requests, *args):
            for number, generation in enumerate(original(decoder, requests, *args)):
                if fails_on == worker.dist.get_rank() and number == 2 and decoder.num_heads:
                    raise MemoryError("the replica is out of memory")
                yield generation

        worker.generate = generate
    try:
        return benchmark.run(chosen)
    except SystemExit as end:
        return f"exit {end.code}"


def reference(directory, among=VOCABULARY):
    """Counts of each text by whole passes, without caches or batches."""
    loading.start_distributed()
    model = loading.load(Path(directory)).model
    model.output_layer.weight.data[95:] = 0  # padding of the vocabulary: never the largest in the toy
    result = [speculative(model, text, SIZE, HEADS, among) for text in TEXTS]
    assert [tokens for tokens, _ in result] == [plain(model, text, SIZE) for text in TEXTS]
    return result


def counts(summary, name=None):
    (row,) = [row for row in summary["runs"] if row["num_heads"] == HEADS]
    row = row["benchmarks"][name] if name else row
    return row["num_drafts"], row["num_accepted_tokens_per_pos"]


@pytest.fixture(scope="module")
def truth(folder):
    return total(folder)


def total(folder, *among):
    (result,) = run(reference, 1, str(folder / "checkpoint"), *among)
    return sum((counts for _, counts in result), Acceptance.of_heads(HEADS))


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(1, 1), (4, 1), (4, 2)])
def test_counts_are_those_of_the_reference_on_any_layout(folder, truth, tmp_path, ranks, tensor_parallel):
    chosen = options(folder, tmp_path, tensor_parallel=tensor_parallel)
    summary = run(measure, ranks, chosen)[0]
    assert summary["complete"]
    assert counts(summary) == (truth.num_drafts, truth.num_accepted_tokens_per_pos)
    by_name = [counts(summary, name) for name in ("first", "other")]
    assert sum(drafts for drafts, _ in by_name) == truth.num_drafts
    assert [row["num_heads"] for row in summary["runs"]] == [0, 1, HEADS]
    assert all(row.get("outputs_equal_to_plain", "12 of 12") == "12 of 12" for row in summary["runs"])


def test_heads_draft_among_as_few_ids_as_asked(folder, truth, tmp_path):
    few = total(folder, 40)
    (summary,) = run(measure, 1, options(folder, tmp_path, draft_vocab_size=40))
    assert counts(summary) == (few.num_drafts, few.num_accepted_tokens_per_pos)
    assert few.num_accepted_tokens < truth.num_accepted_tokens
    assert "drafts of the first 40 ids" in (tmp_path / "acceptance.html").read_text()


def test_answers_of_the_model_are_measured_at_every_token(folder, truth, tmp_path):
    """And decoded again, from what was given of each."""
    run(measure, 1, options(folder, tmp_path / "plain", num_heads=[0]))
    written = {line["prompt"]: line.get("tokens") for line in read_lines(tmp_path / "plain") if line["run"] == 0}
    answers = [tokens for _, tokens in sorted(written.items()) if tokens]
    documents = [
        {"tokens": [*text, *answer], "prompt_tokens": len(text)} for text, answer in zip(TEXTS, answers, strict=True)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (summary,) = run(measure, 1, options(folder, tmp_path / "out", prompts=[str(tmp_path / "own.jsonl")]))
    assert counts(summary) == (truth.num_drafts, truth.num_accepted_tokens_per_pos)
    forced = summary["teacher_forced"]
    assert forced["main_loss_tokens"] == SIZE * len(TEXTS)
    assert forced["num_drafts"] == (SIZE - 1) * len(TEXTS), "the last token has no draft"


def test_files_and_fields(folder, tmp_path):
    (summary,) = run(measure, 1, options(folder, tmp_path))
    assert json.loads((tmp_path / "acceptance.json").read_text()) == json.loads(json.dumps(summary))
    for row in summary["runs"]:
        for values in (row, *row["benchmarks"].values()):
            assert values.keys() >= FIELDS
            assert values["tokens_per_second"] > 0 and values["speedup_vs_autoregressive"] > 0
    speeds = {row["num_heads"]: row["tokens_per_second"] for row in summary["runs"]}
    last = summary["runs"][-1]
    assert last["speedup_vs_autoregressive"] == pytest.approx(speeds[HEADS] / speeds[0])
    assert last["speedup_vs_one_head"] == pytest.approx(speeds[HEADS] / speeds[1])
    for rate, (low, high) in zip(last["acceptance_rate"], last["acceptance_rate_interval"], strict=True):
        assert low <= rate <= high
    assert summary["teacher_forced"]["main_loss"] > 0
    assert summary["failed_prompts"] == [
        {"prompt": "second.jsonl:3", "error": "ValueError: invalid literal for int() with base 10: 'no'"}
    ]
    assert {"commit", "versions", "hardware", "checkpoint", "command", "date"} <= summary["provenance"].keys()
    by_num_heads = summary["step_cost"]["by_num_heads"]
    assert [row["num_heads"] for row in by_num_heads] == [0, 1, 2, HEADS]
    assert [row["measured"] is None for row in by_num_heads] == [False, False, True, False]
    for row in by_num_heads:
        for values in (row["predicted"], row["measured"] or row["predicted"]):
            seconds = values["draft_seconds_per_step"] + values["verify_seconds_per_step"]
            assert values["tokens_per_second"] == pytest.approx(values["tokens_per_step"] / seconds)
            assert 1 <= values["tokens_per_step"] <= 1 + row["num_heads"]
    fastest = max((row for row in by_num_heads if row["measured"]), key=lambda r: r["measured"]["tokens_per_second"])
    assert summary["step_cost"]["best_num_heads_measured"] == fastest["num_heads"]
    assert summary["settings"]["iteration"] == ITERATION
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in (tmp_path / "acceptance.html").read_text()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert "main head's loss" in report.table(summary) and " 3 " in report.table(summary)


def test_a_rank_that_fails_costs_its_share_and_a_rerun_completes_it(folder, truth, tmp_path):
    chosen = options(folder, tmp_path)
    first, second = run(measure, 2, chosen, fails_on=1)
    assert second == "exit 1"
    assert not first["complete"] and 0 < first["num_missing"] < 2 * 13
    before = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.jsonl")}
    (again,) = run(measure, 1, chosen)  # on another layout
    assert again["complete"]
    assert counts(again) == (truth.num_drafts, truth.num_accepted_tokens_per_pos)
    assert all(path.read_bytes().startswith(data) for path, data in before.items()), "no result is measured twice"
    lines = [json.loads(x) for p in before for x in p.read_bytes().splitlines() if x]
    assert len({(x["run"], x["prompt"]) for x in lines}) == len(lines)


def test_a_half_written_line_is_measured_again(folder, truth, tmp_path):
    chosen = options(folder, tmp_path)
    run(measure, 1, chosen)
    (path,) = (tmp_path / "results").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-40])
    (again,) = run(measure, 1, chosen)
    assert again["complete"] and counts(again) == (truth.num_drafts, truth.num_accepted_tokens_per_pos)


def test_every_checkpoint_of_a_run_is_measured_and_a_rerun_measures_none_again(folder, tmp_path):
    for iteration in (1, 20):
        run(save, 1, str(tmp_path / "run" / f"iter_{iteration:07d}"))
    (tmp_path / "run" / "iter_0000030").mkdir()  # its save was cut short
    chosen = options(folder, tmp_path / "out", load=tmp_path / "run", every_checkpoint=True, teacher_forced_only=True)
    (found,) = run(measure, 1, chosen)
    assert json.loads(json.dumps(found)) == json.loads((tmp_path / "out" / "checkpoints.json").read_text())
    assert found["complete"]
    folders = [Path(one["settings"]["checkpoint"]).name for one in found["checkpoints"]]
    assert folders == ["iter_0000001", "iter_0000020"]
    alone = run(measure, 1, options(folder, tmp_path / "alone", teacher_forced_only=True))[0]
    assert [one["teacher_forced"] for one in found["checkpoints"]] == [alone["teacher_forced"]] * 2  # the same weights
    assert report.checkpoints_table(found).count(f"{alone['teacher_forced']['main_loss']:.4f}") == 2
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/results/*.jsonl")}
    assert len(before) == 2
    run(measure, 1, chosen)
    assert all(path.read_bytes() == data for path, data in before.items())


def refused(chosen):
    try:
        benchmark.run(chosen)
    except ValueError as error:
        return str(error)


def test_results_of_other_settings_are_not_mixed(folder, tmp_path):
    run(measure, 1, options(folder, tmp_path, teacher_forced_only=True))
    (message,) = run(refused, 1, options(folder, tmp_path, sampling=Sampling(temperature=1.0)))
    assert "other settings (temperature)" in message
    (message,) = run(refused, 1, options(folder, tmp_path, num_heads=[9]))
    assert "--num-heads 9" in message
    (message,) = run(refused, 1, options(folder, tmp_path, every_checkpoint=True))
    assert "--every-checkpoint needs the folder of a run" in message


def test_a_refused_command_writes_nothing(folder, tmp_path):
    (message,) = run(refused, 1, options(folder, tmp_path / "new", max_new_tokens=64))
    assert "--max-new-tokens 64 leaves no room" in message
    (message,) = run(refused, 1, options(folder, tmp_path / "new", draft_vocab_size=97))
    assert "--draft-vocab-size 97: the vocabulary has" in message
    (message,) = run(refused, 1, options(folder, tmp_path / "new", min_confidence=2.0))
    assert "--min-confidence is 2.0" in message
    assert not (tmp_path / "new").exists()


def test_sampled_runs_do_not_depend_on_the_layout(folder, tmp_path):
    sampling = Sampling(temperature=1.0, sampled_drafts=True)
    one = run(measure, 1, options(folder, tmp_path / "one", sampling=sampling))[0]
    two = run(measure, 2, options(folder, tmp_path / "two", sampling=sampling))[0]
    assert counts(one) == counts(two)
