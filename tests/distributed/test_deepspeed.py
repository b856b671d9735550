"""`--engine deepspeed` against `--engine megatron`: the whole loop, in the same words, to the same numbers.

Every run is a call of the training command in forked gloo ranks; what is compared are its metrics of every iteration.
"""

import json
import runpy
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint

from megatron_mtpd import platform
from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.inspection import describe
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import CheckpointError, head_of, is_optimizer, read_metadata
from tests.distributed import gloo, training
from tests.distributed.training import ITERATIONS, SAVED, Metrics, second_half

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra megatron-mtpd[deepspeed]"),
]

TOOLS = Path(__file__).parents[2] / "tools"
CPU = {"device": "cpu"}


class Imports:
    """Unpickled, it has imported what every rank needs, DeepSpeed and tokenizers: half of the time of a short run."""

    def __reduce__(self):
        return import_once, ()


def import_once() -> None:
    platform.prepare_deepspeed()
    for module in ("megatron_mtpd.training.deepspeed_engine", "megatron.core.tokenizers.text"):
        import_module(module)


@pytest.fixture(scope="module", autouse=True)
def imports():
    """In the process that forks the ranks, once."""
    gloo.run(bool, 1, Imports())


def run(folder: Path, ranks: int, *flags: str, zero: dict | None = None, tied=False) -> Metrics:
    """Train, by DeepSpeed with that `zero_optimization`, or without one by Megatron: the metrics of each iteration."""
    engine = [] if tied else ["--untie-embeddings-and-output-weights"]
    if zero is not None:
        config = folder / "ds_config.json"
        config.write_text(json.dumps({"zero_optimization": zero}))
        engine += ["--engine", "deepspeed", "--deepspeed-config", str(config)]
    return training.run(folder, ranks, *flags, *engine)


@cache
def megatron(*flags: str) -> Metrics:
    """What two data-parallel ranks of Megatron's compute; tensor parallelism changes the order of sums alone."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), 2, *flags)


def check(found: Metrics, expected: Metrics, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for iteration, metrics in expected.items():
        assert found[iteration] == pytest.approx(metrics, rel=tolerance, abs=tolerance), iteration


@pytest.mark.parametrize("stage", [1, 3])
def test_the_metrics_are_those_of_megatron(tmp_path, stage):
    """fp32: the same sums in another order, of losses around 5 and their gradients, over four steps of Adam. Stage 2:
    `trained_in_fp32`."""
    check(run(tmp_path, 2, zero={"stage": stage}), megatron(), 1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tensor_parallelism_changes_nothing(tmp_path, stage):
    """But the order of sums in fp32, as above."""
    check(run(tmp_path, 4, "--tensor-model-parallel-size", "2", zero={"stage": stage}), megatron(), 1e-5)


def test_tied_embeddings(tmp_path):
    """At stage 3 the embedding's weight is gathered for the loss too, which does not run the embedding."""
    check(run(tmp_path, 1, zero={"stage": 3}, tied=True), run(tmp_path, 1, tied=True), 1e-5)


def save(folder: Path, *flags: str, zero: dict) -> tuple[Path, Metrics]:
    """A run of DeepSpeed's with its checkpoints: (their folder, the metrics)."""
    checkpoints = folder / "checkpoints"
    return checkpoints, run(folder, 2, "--save", str(checkpoints), *flags, zero=zero)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Stage 3 in bf16. Both engines round the gradients to bf16 (8 bits) before they add them in fp32, in another
    order."""
    checkpoints, metrics = save(tmp_path_factory.mktemp("trained"), "--bf16", zero={"stage": 3})
    check(metrics, megatron("--bf16"), 1e-3)
    return checkpoints, metrics


@pytest.fixture(scope="module")
def trained_in_fp32(tmp_path_factory):
    """Stage 2; the order of sums as above."""
    checkpoints, metrics = save(tmp_path_factory.mktemp("trained"), zero={"stage": 2})
    check(metrics, megatron(), 1e-5)
    return checkpoints, metrics


def resume(folder: Path, checkpoints: Path, *flags: str, zero: dict | None = None) -> Metrics:
    return run(folder, 2, "--load", str(checkpoints), "--ckpt-step", str(SAVED), *flags, zero=zero)


def test_a_run_continues_bit_for_bit(tmp_path, trained):
    """With the weights alone it would not: Adam's moments decide as well."""
    checkpoints, metrics = trained
    assert resume(tmp_path, checkpoints, "--bf16", zero={"stage": 3}) == second_half(metrics)


def test_a_run_continues_bit_for_bit_at_stage_2(tmp_path, trained_in_fp32):
    checkpoints, metrics = trained_in_fp32
    assert resume(tmp_path, checkpoints, zero={"stage": 2}) == second_half(metrics)


def test_a_run_continues_bit_for_bit_at_stage_1(tmp_path):
    """In bf16 DeepSpeed has another optimizer for it, and for it alone. Tolerance to Megatron as in `trained`."""
    checkpoints, metrics = save(tmp_path, "--bf16", zero={"stage": 1})
    check(metrics, megatron("--bf16"), 1e-3)
    assert resume(tmp_path, checkpoints, "--bf16", zero={"stage": 1}) == second_half(metrics)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_optimizer_on_the_cpu(tmp_path, stage):
    """It changes the order of sums in fp32, as above, and the run continues bit for bit."""
    zero = {"stage": stage, "offload_optimizer": CPU}
    checkpoints, metrics = save(tmp_path, zero=zero)
    check(metrics, megatron(), 1e-5)
    assert resume(tmp_path, checkpoints, zero=zero) == second_half(metrics)


def test_it_continues_in_another_layout_and_stage(tmp_path, trained):
    checkpoints, metrics = trained
    found = resume(tmp_path, checkpoints, "--bf16", "--tensor-model-parallel-size", "2", zero={"stage": 1})
    check(found, second_half(metrics), 1e-3)


def test_it_continues_with_megatron(tmp_path, trained):
    checkpoints, metrics = trained
    check(resume(tmp_path, checkpoints, "--bf16", "--use-distributed-optimizer"), second_half(metrics), 1e-3)


def test_new_heads_on_a_frozen_trunk_with_offload(tmp_path, trained):
    """The heads are doubled; DeepSpeed trains the new ones as Megatron does, and each continues from the other."""
    extended, ours, megatrons = (tmp_path / name for name in ("extended", "ours", "megatrons"))
    extend(make_plan(trained[0], 4), extended)
    new_heads = ["--bf16", "--mtp-num-layers", "4", "--mtpd-train", "new-heads", "--mtpd-old-heads", "2"]
    start = ["--load", str(extended), *new_heads]
    zero = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    found = run(tmp_path, 2, *start, "--save", str(ours), zero=zero)
    expected = run(tmp_path, 2, *start, "--save", str(megatrons), "--use-distributed-optimizer")
    check(found, expected, 1e-3)
    assert resume(tmp_path, ours, *new_heads, zero=zero) == second_half(found)
    check(resume(tmp_path, megatrons, *new_heads, zero=zero), second_half(expected), 1e-3)


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Of the model in the last checkpoint, whole."""
    metadata = read_metadata(resolve(root)[1])
    stored = {key: tensor for key, tensor in metadata.tensors.items() if not is_optimizer(key)}
    tensors = {key: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)) for key, tensor in stored.items()}
    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(metadata.directory), no_dist=True)
    return tensors


def test_heads_on_a_frozen_trunk_in_another_layout_with_offload(tmp_path, trained_in_fp32):
    """Two ranks' checkpoint, in pieces of tensor-parallel shards on the CPU: fp32, the order of sums as above."""
    source, saved = trained_in_fp32[0], tmp_path / "checkpoints"
    start = ["--load", str(source), "--finetune", "--mtpd-train", "heads"]
    zero = {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    found = run(tmp_path, 4, *start, "--save", str(saved), "--tensor-model-parallel-size", "2", zero=zero)
    check(found, run(tmp_path, 1, *start), 1e-5)
    before, after = weights(source), weights(saved)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))}
    assert changed == {key for key in before if head_of(key) is not None}, "all of the heads, no byte of the trunk"


def test_gradients_that_are_not_finite_end_the_run_as_with_megatron(tmp_path):
    """A factor that the loss survives in fp32, and the sum of the gradients' squares does not; or each is skipped."""
    overflow = ["--mtp-loss-scaling-factor", "1e38"]
    with pytest.raises(gloo.RankError, match="--no-check-for-nan-in-loss-and-grad"):
        run(tmp_path, 1, *overflow, zero={"stage": 2})
    found = run(tmp_path, 1, *overflow, "--no-check-for-nan-in-loss-and-grad", zero={"stage": 2})
    assert max(found) == ITERATIONS and "lm loss" not in found[ITERATIONS], "Megatron's loop reports no skipped step"


def command(tool: str, *arguments: object) -> None:
    """On a rank: one of the commands in tools."""
    sys.argv[:] = [f"{tool}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{tool} ended with {end.code}") from end


def test_its_checkpoints_serve_every_command(tmp_path, trained):
    """Inspected, extended and trained on by DeepSpeed, benchmarked both ways, exported: all heads, the trunk as it
    was."""
    extended, grown, served = (tmp_path / name for name in ("extended", "grown", "served"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "1 2 3"}) + "\n")
    gloo.run(command, 1, "inspect_checkpoint", "--load", trained[0], "--verify")
    gloo.run(command, 1, "loop_extend", "--load", trained[0], "--save", extended, "--num-heads", 4, "--verify")
    heads = ["--mtp-num-layers", "4", "--mtpd-train", "new-heads"]  # how many are old is in the checkpoint
    run(tmp_path, 2, "--bf16", "--load", str(extended), "--save", str(grown), *heads, zero={"stage": 3})
    found = describe(grown)
    assert (found["heads"], found["aliases"], found["arguments"]["mtpd_old_heads"]) == (4, {}, 2)
    keys = read_metadata(resolve(grown)[1]).tensors
    assert {head_of(key) for key in keys if is_optimizer(key)} == {2, 3}, "nothing else is trained"

    benchmark = ("benchmark_acceptance", "--load", grown, "--prompts", prompts, "--max-new-tokens", 4, "--output")
    gloo.run(command, 1, *benchmark, tmp_path / "drafts")
    gloo.run(command, 1, *benchmark, tmp_path / "forced", "--teacher-forced")
    drafts, forced = (json.loads((tmp_path / name / "acceptance.json").read_text()) for name in ("drafts", "forced"))
    assert drafts["complete"] and drafts["runs"][-1]["num_heads"] == 4
    assert drafts["runs"][-1]["outputs_equal_to_plain"] == "1 of 1"
    assert forced["teacher_forced"] == drafts["teacher_forced"]

    for name, source in (("before", trained[0]), ("after", grown)):
        gloo.run(command, 1, "convert_hf", "export", "--load", source, "--save", served / name, "--vocab-size", 256)
    before, after = (load_file(served / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "trunk and old heads are frozen"
    assert len(after) > len(before), "new heads"


def test_optimizer_state_in_another_layout_is_refused():
    platform.prepare_deepspeed()
    from megatron_mtpd.training.deepspeed_state import check_layout

    check_layout({"distrib_optim_sharding_type": "fully_reshardable"})
    for metadata in (None, {}, {"distrib_optim_sharding_type": "dp_reshardable"}):
        with pytest.raises(CheckpointError, match="--no-load-optim"):
            check_layout(metadata)
