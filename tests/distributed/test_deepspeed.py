"""`--engine deepspeed` against `--engine megatron`: the whole loop, in the same words, to the same numbers.

Every run is a call of the training command in forked gloo ranks; what is compared are its metrics of every iteration.
"""

import atexit
import json
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_mtpd import platform
from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.training import pretrain
from tests.distributed import gloo

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra megatron-mtpd[deepspeed]"),
]

ITERATIONS, SAVED = 4, 2
TOY = [
    *("--num-layers", "2", "--mtp-num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--group-query-attention", "--num-query-groups", "2", "--swiglu", "--normalization", "RMSNorm"),
    *("--disable-bias-linear", "--attention-dropout", "0"),
    *("--hidden-dropout", "0", "--seq-length", "16", "--max-position-embeddings", "16", "--mtpd-top-n", "20"),
    # 255 and the end of documents: padded to 256 whether one or two ranks share it
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255", "--num-workers", "0"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "3e-3", "--min-lr", "1e-4"),
    *("--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--clip-grad", "0.5", "--train-iters", str(ITERATIONS)),
    *("--eval-iters", "1", "--eval-interval", "2", "--log-interval", "1", "--no-mtpd-clip-apart"),
    *("--mtpd-distill-start", "0", "--mtpd-ce-output-share", "1", "--mtpd-kd-output-share", "1"),
    *("--save-interval", str(SAVED), "--use-cpu-initialization"),
]
CPU = {"device": "cpu"}
TIMINGS = ("time", "throughput")


def loop(flags: list[str], jsonl: str) -> None:
    """On a rank: the training command."""
    sys.argv[:] = ["pretrain_mtpd.py"]
    pretrain.main([*TOY, *flags, "--metrics-jsonl", jsonl])
    atexit._run_exitfuncs()  # writes the last record: the rank will be killed


def run(folder: Path, ranks: int, *flags: str, zero: dict | None = None, tied=False) -> dict[int, dict[str, float]]:
    """Train, by DeepSpeed with that `zero_optimization`, or without one by Megatron: the metrics of each iteration."""
    engine = [] if tied else ["--untie-embeddings-and-output-weights"]
    if zero is not None:
        config = folder / "ds_config.json"
        config.write_text(json.dumps({"zero_optimization": zero}))
        engine += ["--engine", "deepspeed", "--deepspeed-config", str(config)]
    with tempfile.NamedTemporaryFile("r", dir=folder, suffix=".jsonl") as jsonl:
        gloo.run(loop, ranks, [*flags, *engine], jsonl.name)
        records = [json.loads(line) for line in jsonl]
    return {record["iteration"]: {k: v for k, v in record.items() if _is_compared(k, v)} for record in records}


def _is_compared(name: str, value: float | None) -> bool:
    return value is not None and not any(word in name for word in TIMINGS)


@cache
def megatron(*flags: str) -> dict[int, dict[str, float]]:
    """What two data-parallel ranks of Megatron's compute; tensor parallelism changes the order of sums alone."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), 2, *flags)


def check(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for iteration, metrics in expected.items():
        assert found[iteration] == pytest.approx(metrics, rel=tolerance, abs=tolerance), iteration


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_metrics_are_those_of_megatron(tmp_path, stage):
    """fp32: the same sums in another order, of losses around 5 and their gradients, over four steps of Adam."""
    found = run(tmp_path, 2, zero={"stage": stage})
    check(found, megatron(), 1e-5)


def test_the_metrics_are_those_of_megatron_in_bf16(tmp_path):
    """Both round the gradients to bf16 (8 bits) before they add them in fp32, in another order. Stage 3: `trained`."""
    check(run(tmp_path, 2, "--bf16", zero={"stage": 1}), megatron("--bf16"), 1e-3)


def test_tensor_parallelism_changes_nothing(tmp_path):
    check(run(tmp_path, 4, "--tensor-model-parallel-size", "2", zero={"stage": 3}), megatron(), 1e-5)


def test_tied_embeddings(tmp_path):
    """At stage 3 the embedding's weight is gathered for the loss too, which does not run the embedding."""
    check(run(tmp_path, 1, zero={"stage": 3}, tied=True), run(tmp_path, 1, tied=True), 1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of DeepSpeed's with its checkpoints: (their folder, the metrics)."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = folder / "checkpoints"
    metrics = run(folder, 2, "--bf16", "--save", str(checkpoints), zero={"stage": 3})
    check(metrics, megatron("--bf16"), 1e-3)
    return checkpoints, metrics


def second_half(metrics: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {iteration: metrics[iteration] for iteration in range(SAVED + 1, ITERATIONS + 1)}


def resume(folder: Path, checkpoints: Path, *flags: str, zero: dict | None = None) -> dict[int, dict[str, float]]:
    return run(folder, 2, "--bf16", "--load", str(checkpoints), "--ckpt-step", str(SAVED), *flags, zero=zero)


def test_a_run_continues_bit_for_bit(tmp_path, trained):
    """With the weights alone it would not: Adam's moments decide as well."""
    checkpoints, metrics = trained
    assert resume(tmp_path, checkpoints, zero={"stage": 3}) == second_half(metrics)


def test_it_continues_in_another_layout_and_stage(tmp_path, trained):
    checkpoints, metrics = trained
    found = resume(tmp_path, checkpoints, "--tensor-model-parallel-size", "2", zero={"stage": 1})
    check(found, second_half(metrics), 1e-3)


def test_it_continues_with_megatron(tmp_path, trained):
    checkpoints, metrics = trained
    check(resume(tmp_path, checkpoints, "--use-distributed-optimizer"), second_half(metrics), 1e-3)


def test_new_heads_on_a_frozen_trunk_with_offload(tmp_path, trained):
    """The heads are doubled; DeepSpeed trains the new ones as Megatron does, and each continues from the other."""
    extended, ours, megatrons = (tmp_path / name for name in ("extended", "ours", "megatrons"))
    extend(make_plan(trained[0], 4), extended)
    new_heads = ["--mtp-num-layers", "4", "--mtpd-train", "new-heads", "--mtpd-old-heads", "2"]
    start = ["--bf16", "--load", str(extended), *new_heads]
    zero = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    found = run(tmp_path, 2, *start, "--save", str(ours), zero=zero)
    expected = run(tmp_path, 2, *start, "--save", str(megatrons), "--use-distributed-optimizer")
    check(found, expected, 1e-3)
    assert resume(tmp_path, ours, *new_heads, zero=zero) == second_half(found)
    check(resume(tmp_path, megatrons, *new_heads, zero=zero), second_half(expected), 1e-3)


def test_optimizer_state_in_another_layout_is_refused():
    platform.prepare_deepspeed()
    from megatron_mtpd.training.deepspeed_state import check_layout

    check_layout({"distrib_optim_sharding_type": "fully_reshardable"})
    for metadata in (None, {}, {"distrib_optim_sharding_type": "dp_reshardable"}):
        with pytest.raises(CheckpointError, match="--no-load-optim"):
            check_layout(metadata)
