"""The job scripts on a real Slurm: they train, resume, give up when they should, and say why.

Jobs that mostly wait (for a time limit, for a dead node to be noticed, for a collective to time out) are submitted
before the first test; other jobs run meanwhile.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.slurm.conftest import PATIENCE, Job, Submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def weights(job: Job, iteration: int = 20) -> dict:
    """Every tensor of a checkpoint: weights, master weights, moments."""
    state: dict = {}
    reader = FileSystemReader(job.run / "checkpoints" / f"iter_{iteration:07d}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same(job: Job, undisturbed: Job) -> None:
    """Bit by bit: on CPUs in fp32 a resumed run repeats what it would have done."""
    losses = undisturbed.losses()
    assert list(losses) == list(range(1, 21))
    assert job.losses() == losses
    expected, found = weights(undisturbed), weights(job)
    assert found.keys() == expected.keys() and len(found) > 30
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


# --- jobs that several tests look at, or that wait -----------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def start_the_long_ones(request: pytest.FixtureRequest) -> None:
    for name in ("hung", "raised", "limited", "unlucky"):
        if any(name in getattr(item, "fixturenames", ()) for item in request.session.items):
            request.getfixturevalue(name)


ON_ONE_NODE = ("--nodelist=node12", "--oversubscribe", "--mem=1G", "--gpus-per-node=2", "--ntasks-per-node=2")


@pytest.fixture(scope="session")
def hung(submit: Submit) -> Job:
    """Two ranks on one node, the second of which stops before anything is saved."""
    return submit("hung", *ON_ONE_NODE, FAULT="hang:1:3")


@pytest.fixture(scope="session")
def raised(submit: Submit) -> Job:
    """Two ranks on the node of `hung`, the second of which raises, once, when there is a checkpoint."""
    return submit("raised", *ON_ONE_NODE, FAULT="raise:1:13")


@pytest.fixture(scope="session")
def limited(submit: Submit) -> Job:
    """Reaches its time limit in its first start, at iteration 13. It saves by a process of its own."""
    saving = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
    return submit("limited", "--nodes=2", "--time=2", "--signal=B:USR1@90", flags=saving, FAULT="pause:1:13")


@pytest.fixture(scope="session")
def unlucky(submit: Submit) -> Job:
    """Loses its last node in its first start, at iteration 13."""
    job = submit("unlucky", "--nodes=4", FAULT="pause:3:13")
    job.cluster.wait_until(job.paused.exists, PATIENCE)
    job.cluster.power("off", job.nodes[-1])
    return job


@pytest.fixture(scope="session")
def two_nodes(submit: Submit) -> Job:
    """Undisturbed."""
    return submit("two-nodes", "--nodes=2", MTPD_PREFLIGHT="1")


@pytest.fixture(scope="session")
def four_nodes(submit: Submit) -> Job:
    """Undisturbed."""
    return submit("four-nodes", "--nodes=4")


# --- tests -----------------------------------------------------------------------------------------------------------


def test_two_nodes(two_nodes: Job) -> None:
    """Also: the folder for the logs did not exist when the job was submitted."""
    assert two_nodes.ended() == "COMPLETED", two_nodes.output
    assert "2 nodes x 1 ranks" in two_nodes.output
    assert "preflight: 2 ranks on 2 nodes" in two_nodes.output
    assert (two_nodes.show("Restarts"), two_nodes.show("ExitCode")) == ("0", "0:0")
    assert list(two_nodes.losses()) == list(range(1, 21))
    assert len(two_nodes.logs()) == 1


def test_an_output_folder_that_does_not_exist_ends_the_job_without_a_word(submit: Submit) -> None:
    """As the error table of slurm/README.md says."""
    job = submit("no-folder", f"--output={submit.folder}/no-folder/logs/%j.out")
    assert job.ended() == "FAILED"
    assert job.show("ExitCode") == "0:53"


def test_a_wrong_option_fails_at_once(submit: Submit) -> None:
    job = submit("wrong-option", flags=("--mtpd-top-n", "-5"))
    assert job.ended() == "FAILED"
    assert "pretrain_mtpd.py: error: --mtpd-top-n is -5" in job.output
    assert job.show("Restarts") == "0" and job.show("ExitCode") != "0:0"


def test_a_wrong_setting_fails_at_once(submit: Submit) -> None:
    job = submit("wrong-setting", MTPD_RUNDIR="/tmp")
    assert job.ended() == "FAILED"
    assert "MTPD_RUNDIR is not a setting" in job.output
    assert job.show("ExitCode") == "2:0"


def test_stopping_and_the_cap_on_restarts(submit: Submit) -> None:
    """USR1 by hand saves. While the job runs, no other may use its folder."""
    job = submit("stopped", FAULT="pause:0:3", MTPD_MAX_RESTARTS="0")
    job.cluster.wait_until(job.paused.exists, PATIENCE)

    second = submit("second", MTPD_RUN_DIR=str(job.run))
    assert second.ended() == "FAILED"
    assert f"job {job.number} is running in MTPD_RUN_DIR" in second.output

    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    assert job.ended() == "COMPLETED"
    assert "not requeued, because MTPD_MAX_RESTARTS=0" in job.output
    assert (job.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_scancel_ends_a_job_for_good(submit: Submit) -> None:
    job = submit("cancelled", FAULT="pause:0:3")
    job.cluster.wait_until(job.paused.exists, PATIENCE)
    job.cluster.run("scancel", job.number)
    job.cluster.wait_until(lambda: job.show("JobState") == "CANCELLED", PATIENCE)
    job.cluster.wait_until(lambda: "cancelled" in job.output, PATIENCE)
    assert "requeued" not in job.output
    assert (job.state, job.show("Restarts")) == ("CANCELLED", "0")


def test_a_chain_pretrain_extend_benchmark(submit: Submit, two_nodes: Job) -> None:
    """Three jobs, each submitted before the one that it depends on has ended."""
    start = {"MTPD_LOAD": str(two_nodes.run / "checkpoints"), "MTPD_HEADS": "4"}
    after = f"--dependency=afterok:{two_nodes.number}"
    extended = submit("extended", after, script="loop_extend", flags=("--train-iters", "3"), **start)

    prompts = submit.folder / "prompts.jsonl"  # the toy's tokens are numbers
    prompts.write_text("".join(json.dumps({"prompt": f"{n} {n + 1} {n + 2}"}) + "\n" for n in range(6)))
    flags = ("--prompts", prompts, "--num-heads", 4, "--max-new-tokens", 4, "--ignore-eod")
    after, start = f"--dependency=afterok:{extended.number}", {"MTPD_LOAD": str(extended.run / "checkpoints")}
    measured = submit("measured", "--nodes=2", after, script="benchmark_acceptance", flags=flags, **start)

    assert extended.ended() == "COMPLETED", extended.output
    assert two_nodes.state == "COMPLETED"
    losses = extended.losses()
    assert list(losses) == [1, 2, 3]
    assert all(f"cross_entropy/head_{k}" in losses[1] for k in (1, 2, 3, 4))

    assert measured.ended() == "COMPLETED", measured.output
    runs = json.loads((measured.run / "acceptance.json").read_text())["runs"]
    assert runs[-1]["num_heads"] == 4 and {run["num_prompts"] for run in runs} == {6}, "both ranks' prompts count"


def test_a_rank_that_raises(raised: Job, hung: Job, two_nodes: Job) -> None:
    """Its job goes on from the checkpoint. Until then there were two jobs on one node."""
    assert raised.ended() == "COMPLETED", raised.output
    assert "Rank 1 on node12 failed first: RuntimeError: This GPU is out of order." in raised.output
    assert "this attempt went on to checkpoint 8; requeued" in raised.output
    assert raised.show("Restarts") == "1" and len(raised.logs()) == 2
    assert hung.logs(), "it was to run at the same time"
    assert two_nodes.ended() == "COMPLETED"
    assert_same(raised, two_nodes)


def test_a_rank_that_hangs(hung: Job) -> None:
    """Nothing was saved, so it is not tried again."""
    assert hung.ended() == "FAILED"
    assert "Rank 0 on node12 failed first" in hung.output and "Timed out" in hung.output
    assert "Rank 1 on node12 was here when the step was ended" in hung.output
    assert "in stuck" in hung.output
    assert hung.show("Restarts") == "0" and "requeued" not in hung.output


def test_a_time_limit(limited: Job, two_nodes: Job) -> None:
    assert limited.ended() == "COMPLETED", limited.output
    assert "stopped before the time limit; requeued" in limited.output
    assert len(limited.logs()) == int(limited.show("Restarts")) + 1 >= 2
    assert two_nodes.ended() == "COMPLETED"
    assert_same(limited, two_nodes)


def test_a_node_that_dies(unlucky: Job, four_nodes: Job) -> None:
    assert unlucky.ended() == "COMPLETED", unlucky.output
    assert unlucky.show("Restarts") == "1" and len(unlucky.logs()) == 2
    assert four_nodes.ended() == "COMPLETED"
    assert_same(unlucky, four_nodes)
