"""The example of looped extension: its stages on this machine, and the jobs that it submits on a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtpd.checkpoint.inspection import describe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "looped_extension"


@pytest.mark.e2e
@pytest.mark.slow
def test_stages_are_made_once_and_measured(tmp_path):
    command = [sys.executable, EXAMPLE / "run.py", "--steps", "2", "--new-steps", "2", "--heads", "1", "2"]
    command += ["--prompts", "2", "--data", tmp_path / "data", "--output", tmp_path / "out"]

    def run(*more):
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=600, check=False)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "looped_extension.json").read_text())["stages"]
    assert [(row["stage"], row["heads"]) for row in rows] == [("1-heads", 1), ("2-heads-extended", 2), ("2-heads", 2)]
    assert all(row["complete"] and 1 <= row["tokens_per_step"] <= 1 + row["heads"] for row in rows)
    assert all(len(row["cumulative_acceptance_rate"]) == row["heads"] for row in rows)
    assert len({row["main_loss"] for row in rows}) == 1, "the main head is frozen after the first stage"
    assert (tmp_path / "out" / "looped_extension.png").stat().st_size > 10_000
    assert "MTP-D 2-heads" in done.stdout

    stages = [tmp_path / "out" / "mtpd" / row["stage"] / "checkpoints" for row in rows]
    assert [describe(stage)["iteration"] for stage in stages] == [2, 0, 2]
    assert [describe(stage)["arguments"]["mtpd_old_heads"] for stage in stages] == [0, 1, 1]
    assert describe(stages[1])["aliases"] == {2: 1}
    assert describe(stages[2])["aliases"] == {}, "trained: a copy no more"

    written = {file: file.stat().st_mtime_ns for stage in stages for file in stage.rglob("*") if file.is_file()}
    again = run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert written == {file: file.stat().st_mtime_ns for file in written}
    assert "$ python" not in again.stdout, "nothing is run again"
    other = run("--seed", "5")
    assert other.returncode == 1
    assert "was made with other options" in other.stderr


SBATCH = """#!/usr/bin/env bash
number=$(($(cat "$JOBS" 2>/dev/null | wc -l) + 1))
echo "MTPD_LOAD=${MTPD_LOAD:-} MTPD_HEADS=${MTPD_HEADS:-} MTPD_RUN_DIR=${MTPD_RUN_DIR:-} $*" >>"$JOBS"
echo "$number;cluster"
"""


def submit(tmp_path, **environment):
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOBS": str(tmp_path / "jobs"), "RUNS": str(tmp_path / "runs")}
    command = ["bash", EXAMPLE / "submit.sh", "--data-path", "/data/corpus"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MTPD_")}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=kept | paths | environment, check=False
    )


@pytest.mark.e2e
def test_jobs_wait_for_the_checkpoints_that_they_read(tmp_path):
    done = submit(tmp_path, MTPD_MODEL="dense-2b", PROMPTS="a.jsonl b.jsonl", SBATCH="--nodes=4 -A me")
    assert done.returncode == 0, done.stderr
    jobs = (tmp_path / "jobs").read_text().splitlines()
    writer = {}  # checkpoints: the job that writes them
    for number, job in enumerate(jobs, 1):
        settings = dict(word.split("=", 1) for word in job.split()[:3])
        assert "--nodes=4 -A me slurm/" in job
        if load := settings["MTPD_LOAD"]:
            assert f"--dependency=afterok:{writer[load]} " in job
        else:
            assert "--dependency" not in job
        if run := settings["MTPD_RUN_DIR"]:
            writer |= {f"{run}/checkpoints": number, f"{run}/extended": number}
            assert "--data-path /data/corpus" in job
        else:
            assert "--prompts a.jsonl b.jsonl --num-heads 4" in job
    scripts = [next(word for word in job.split() if word.startswith("slurm/")) for job in jobs]
    names = {"slurm/pretrain_mtpd.sh": 1, "slurm/loop_extend.sh": 2, "slurm/benchmark_acceptance.sh": 5}
    assert {script: scripts.count(script) for script in scripts} == names
    assert all((ROOT / script).exists() for script in scripts)
    runs = tmp_path / "runs"
    last = f"MTPD_LOAD={runs}/16-heads/checkpoints MTPD_HEADS= MTPD_RUN_DIR="
    assert jobs[-1].startswith(last)
    assert "--num-heads 4 16" in jobs[-1]


@pytest.mark.e2e
@pytest.mark.parametrize(("missing", "message"), [("MTPD_MODEL", "MTPD_MODEL is not set"), ("PROMPTS", "PROMPTS is")])
def test_what_is_missing_is_said_before_anything_is_submitted(tmp_path, missing, message):
    settings = {"MTPD_MODEL": "dense-2b", "PROMPTS": "a.jsonl"}
    del settings[missing]
    done = submit(tmp_path, **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "jobs").exists()
