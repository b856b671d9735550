"""Text that a toy writes itself does not depend on how many ranks share the work, or on where it was interrupted."""

import pytest

from megatron_mtpd.speculative import self_generated
from megatron_mtpd.speculative.self_generated import Options
from tests.distributed.checkpoints import save_checkpoint
from tests.distributed.gloo import RankError, run
from tests.unit.speculative.toys import chat_tokenizer

pytestmark = pytest.mark.distributed


def write(options, save=False, stop_after=None):
    if save:
        save_checkpoint(str(options.load))
    if stop_after is not None:
        original = self_generated.generate

        def generate(*args):
            for number, done in enumerate(original(*args)):
                if number == stop_after:
                    raise MemoryError("out of memory")
                yield done

        self_generated.generate = generate
    return self_generated.run(options)


def test_ranks_share_the_work(tmp_path):
    """Draws are from fp32 sums over other batches: one would have to fall within the last bits of a probability."""

    def options(output, tensor_parallel=1):
        return Options(
            load=tmp_path / "checkpoint",
            output=tmp_path / output,
            questions=12,
            max_new_tokens=12,
            batch_size=4,
            tensor_parallel=tensor_parallel,
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=chat_tokenizer(tmp_path / "tokenizer"),
        )

    (alone,) = run(write, 1, options("one"), save=True)
    together = run(write, 2, options("two"))
    assert together[1] is None and together[0]["documents"] == alone["documents"] > 0
    with pytest.raises(RankError, match="out of memory"):
        run(write, 2, options("three"), stop_after=2)
    assert not (tmp_path / "three" / "generated.jsonl").exists()
    run(write, 1, options("three"))
    run(write, 4, options("four", tensor_parallel=2))
    found = {(tmp_path / name / "generated.jsonl").read_bytes() for name in ("one", "two", "three", "four")}
    assert len(found) == 1
    for name in ("two", "four"):  # the second rank of a tensor-parallel group writes nothing
        files = (tmp_path / name / "results").glob("rank*.jsonl")
        assert sum(file.stat().st_size > 0 for file in files) == 2
