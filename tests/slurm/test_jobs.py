"""The job scripts on a real Slurm: they train, resume, give up when they should, and say why.

The jobs are submitted before the first test, first of all those that will wait (for a time limit, for a dead node to be
noticed, for a collective to time out), so that others have the processors meanwhile.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_mtpd.checkpoint.integrity import MANIFEST, verify
from tests.slurm.conftest import NODES, PATIENCE, Job, Submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def weights(job: Job, iteration: int = 20) -> dict:
    """Every tensor of a checkpoint: weights, master weights, moments."""
    state: dict = {}
    directory = job.run / "checkpoints" / f"iter_{iteration:07d}"
    assert (directory / MANIFEST).exists() and verify(directory) == []
    reader = FileSystemReader(directory)
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


# --- jobs, in the order of their submission ------------------------------------------------------------------------

SHARED = (f"--nodelist=node{NODES}", "--oversubscribe", "--mem=1G")
"""Several jobs at once on the last node; without these, a job has its nodes for itself."""
TWO_RANKS = ("--gpus-per-node=2", "--ntasks-per-node=2")


@pytest.fixture(scope="session")
def hung(submit: Submit) -> Job:
    """Two ranks on one node, the second of which stops before anything is saved."""
    return submit("hung", *SHARED, *TWO_RANKS, FAULT="hang:1:3")


@pytest.fixture(scope="session")
def raised(submit: Submit) -> Job:
    """Two ranks on the node of `hung`, the second of which raises, once, when there is a checkpoint."""
    return submit("raised", *SHARED, *TWO_RANKS, FAULT="raise:1:13")


@pytest.fixture(scope="session")
def unlucky(submit: Submit) -> Job:
    """Loses its last node in its first start, at iteration 13."""
    return submit("unlucky", "--nodes=4", FAULT="pause:3:13")


def lose_a_node(unlucky: Job) -> None:
    unlucky.cluster.wait_until(unlucky.paused.exists, PATIENCE)
    unlucky.cluster.power("off", unlucky.nodes[-1])


@pytest.fixture(scope="session")
def limited(submit: Submit) -> Job:
    """Comes near its time limit in its first start, at iteration 13. It has a data worker, and a process that saves."""
    flags = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore", "--num-workers", "1")
    return submit("limited", "--nodes=2", "--time=60", "--signal=B:USR1@120", flags=flags, FAULT="pause:1:13")


def set_the_limit(limited: Job) -> None:
    """To three minutes more at most. Given at submission, a slow machine would meet it while the ranks still start."""
    limited.cluster.wait_until(limited.paused.exists, PATIENCE)
    minutes = int(limited.show("RunTime").split(":")[1]) + 3
    limited.cluster.run("scontrol", "update", f"JobId={limited.number}", f"TimeLimit={minutes}")


@pytest.fixture(scope="session")
def two_nodes(submit: Submit) -> Job:
    """Undisturbed."""
    return submit("two-nodes", "--nodes=2", MTPD_PREFLIGHT="1")


@pytest.fixture(scope="session")
def extended(submit: Submit, two_nodes: Job) -> Job:
    """Starts after `two_nodes`, from its checkpoint."""
    start = {"MTPD_LOAD": str(two_nodes.run / "checkpoints"), "MTPD_HEADS": "4"}
    after = f"--dependency=afterok:{two_nodes.number}"
    return submit("extended", after, script="loop_extend", flags=("--train-iters", "3"), **start)


@pytest.fixture(scope="session")
def measured(submit: Submit, extended: Job) -> Job:
    """Starts after `extended`, with its checkpoint."""
    prompts = submit.folder / "prompts.jsonl"  # the toy's tokens are numbers
    prompts.write_text("".join(json.dumps({"prompt": f"{n} {n + 1} {n + 2}"}) + "\n" for n in range(6)))
    flags = ("--prompts", prompts, "--num-heads", 4, "--max-new-tokens", 4, "--ignore-eod")
    after, start = f"--dependency=afterok:{extended.number}", {"MTPD_LOAD": str(extended.run / "checkpoints")}
    return submit("measured", "--nodes=2", after, script="benchmark_acceptance", flags=flags, **start)


@pytest.fixture(scope="session")
def four_nodes(submit: Submit) -> Job:
    """Undisturbed."""
    return submit("four-nodes", "--nodes=4")


@pytest.fixture(scope="session")
def wrong_option(submit: Submit) -> Job:
    """Has a flag with a value that cannot be."""
    return submit("wrong-option", *SHARED, flags=("--mtpd-top-n", "-5"))


@pytest.fixture(scope="session")
def not_shared(submit: Submit) -> Job:
    """Is to write where every node has a disk of its own."""
    local = submit.cluster.folder / "local"
    return submit("not-shared", "--nodes=2", MTPD_PREFLIGHT="1", MTPD_RUN_DIR=str(local))


@pytest.fixture(scope="session")
def stopped(submit: Submit) -> Job:
    """Waits to be stopped, and may not start again."""
    return submit("stopped", *SHARED, "--time=30", FAULT="pause:0:3", MTPD_MAX_RESTARTS="0")


@pytest.fixture(scope="session")
def cancelled(submit: Submit) -> Job:
    """Waits to be cancelled."""
    return submit("cancelled", *SHARED, FAULT="pause:0:3")


@pytest.fixture(scope="session", autouse=True)
def started(request: pytest.FixtureRequest) -> None:
    """Those of the jobs that the tests of this session look at."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}

    def start(*names: str) -> dict[str, Job]:
        return {name: request.getfixturevalue(name) for name in names if name in wanted}

    waiting = start("hung", "raised", "unlucky", "limited")
    if "unlucky" in waiting:
        lose_a_node(waiting["unlucky"])
    if "limited" in waiting:
        set_the_limit(waiting["limited"])
    start("two_nodes", "extended", "measured", "wrong_option", "not_shared", "stopped", "cancelled", "four_nodes")


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
    job = submit("no-folder", *SHARED, f"--output={submit.folder}/no-folder/logs/%j.out")
    assert job.ended() == "FAILED"
    assert job.show("ExitCode") == "0:53"


def test_a_wrong_option_fails_at_once(wrong_option: Job) -> None:
    assert wrong_option.ended() == "FAILED"
    assert "pretrain_mtpd.py: error: --mtpd-top-n is -5" in wrong_option.output
    assert wrong_option.show("Restarts") == "0" and wrong_option.show("ExitCode") != "0:0"


def test_a_run_folder_that_is_not_shared_fails_at_once(not_shared: Job) -> None:
    """The preflight sees it, before anything is trained."""
    assert not_shared.ended() == "FAILED"
    _, second = not_shared.nodes
    problem = f"rank 1 on {second} does not see the files of ranks 0: the folder is not shared"
    assert problem in not_shared.output
    assert "error: the preflight failed" in not_shared.output
    assert "pretrain_mtpd.py" not in not_shared.output
    assert (not_shared.show("Restarts"), not_shared.show("ExitCode")) == ("0", "2:0")


def test_a_wrong_setting_fails_at_once(submit: Submit) -> None:
    job = submit("wrong-setting", *SHARED, MTPD_RUNDIR="/tmp")
    assert job.ended() == "FAILED"
    assert "MTPD_RUNDIR is not a setting" in job.output
    assert job.show("ExitCode") == "2:0"


def test_stopping_and_the_cap_on_restarts(stopped: Job, submit: Submit) -> None:
    """USR2 by hand saves. While the job runs, no other may use its folder."""
    stopped.cluster.wait_until(stopped.paused.exists, PATIENCE)

    second = submit("second", *SHARED, MTPD_RUN_DIR=str(stopped.run))
    assert second.ended() == "FAILED"
    assert f"job {stopped.number} is running in MTPD_RUN_DIR" in second.output

    stopped.cluster.run("scancel", "--signal=USR2", "--batch", stopped.number)
    assert stopped.ended() == "COMPLETED"
    assert "the ranks get USR1 in 0 s" in stopped.output
    assert "not requeued, because MTPD_MAX_RESTARTS=0" in stopped.output
    assert (stopped.run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_scancel_ends_a_job_for_good(cancelled: Job) -> None:
    cancelled.cluster.wait_until(cancelled.paused.exists, PATIENCE)
    cancelled.cluster.run("scancel", cancelled.number)
    assert cancelled.ended() == "CANCELLED"
    cancelled.cluster.wait_until(lambda: "ended by Slurm: scancel" in cancelled.output, PATIENCE)
    assert "requeued" not in cancelled.output
    assert (cancelled.state, cancelled.show("Restarts")) == ("CANCELLED", "0")


def test_a_chain_pretrain_extend_benchmark(two_nodes: Job, extended: Job, measured: Job) -> None:
    """Three jobs, each submitted before the one that it depends on has ended."""
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
    assert f"Rank 1 on node{NODES} failed first: RuntimeError: This GPU is out of order." in raised.output
    assert "this attempt went on to checkpoint 8; requeued" in raised.output
    assert raised.show("Restarts") == "1" and len(raised.logs()) == 2
    assert raised.first_iteration(1) == 9
    assert hung.logs(), "it was to run at the same time"
    assert two_nodes.ended() == "COMPLETED"
    assert_same(raised, two_nodes)


def test_a_rank_that_hangs(hung: Job) -> None:
    """Nothing was saved, so it is not tried again."""
    assert hung.ended() == "FAILED"
    assert f"Rank 0 on node{NODES} failed first" in hung.output and "Timed out" in hung.output
    assert f"Rank 1 on node{NODES} was here when the step was ended" in hung.output
    assert "in stuck" in hung.output
    assert hung.show("Restarts") == "0" and "requeued" not in hung.output


def test_a_time_limit(limited: Job, two_nodes: Job) -> None:
    """No step is lost: the ranks end the one that they are in, and save."""
    assert limited.ended() == "COMPLETED", limited.output
    assert "stopped before the time limit; requeued" in limited.output
    assert len(limited.logs()) == int(limited.show("Restarts")) + 1 >= 2
    assert limited.first_iteration(1) == 14
    saved = sorted((limited.run / "checkpoints").glob("iter_*"))
    assert {int(directory.name[5:]) for directory in saved} >= {8, 13, 16, 20}
    assert all((directory / MANIFEST).exists() and verify(directory) == [] for directory in saved)
    assert two_nodes.ended() == "COMPLETED"
    assert_same(limited, two_nodes)


def test_a_node_that_dies(unlucky: Job, four_nodes: Job) -> None:
    """Lost are the steps since the last save, which was after iteration 8."""
    assert unlucky.ended() == "COMPLETED", unlucky.output
    assert unlucky.show("Restarts") == "1" and len(unlucky.logs()) == 2
    assert unlucky.first_iteration(1) == 9
    assert four_nodes.ended() == "COMPLETED"
    assert_same(unlucky, four_nodes)
