"""slurm/entry.sh without a cluster: settings, configurations, the command that a dry run shows."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("pretrain_mtpd", "loop_extend", "benchmark_acceptance")


def run(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Bash, in the checkout, with no other setting than those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MTPD_", "SLURM_"))}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True)


def dry_run(script: str = "pretrain_mtpd", flags: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    settings = {"MTPD_DRY_RUN": "1", "MTPD_MODEL": "dense-2b", "MTPD_PYTHON": "python3", **env}
    return run(f"bash slurm/{script}.sh {flags}", **settings)


def commands(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The commands that were shown, as words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stderr.splitlines() if line.startswith("$ ")]


def value(words: list[str], flag: str) -> str:
    """The last value of a flag: the one that counts."""
    return words[len(words) - words[::-1].index(flag)]


def test_dry_run_shows_what_would_run_and_runs_nothing(tmp_path: Path) -> None:
    done = dry_run(flags="--lr 1e-5 --data-path '/a b/c'", MTPD_RUN_DIR=str(tmp_path / "run"))
    preflight, training = commands(done)
    assert "tools/preflight.py" in " ".join(preflight)
    assert training[:4] == ["srun", "--nodes=1", "--ntasks=8", "--ntasks-per-node=8"]
    assert value(training, "--num-layers") == "28" and value(training, "--lr") == "1e-5"
    assert value(training, "--data-path") == "/a b/c"
    assert value(training, "--save") == str(tmp_path / "run" / "checkpoints")
    assert "--load" not in training, "there is nothing to resume"
    assert list(tmp_path.iterdir()) == []


def test_a_run_resumes_what_it_saved(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("7")
    training = commands(dry_run(MTPD_RUN_DIR=str(tmp_path), MTPD_LOAD="/elsewhere"))[-1]
    assert value(training, "--load") == str(checkpoints)


@pytest.mark.parametrize(
    ("nodes", "layout"), [(1, 1), (3, 1), (4, 4), (31, 4), (32, 32), (255, 32), (256, 256), (1000, 256)]
)
def test_the_layout_follows_the_nodes(nodes: int, layout: int) -> None:
    done = dry_run(SLURM_NNODES=str(nodes))
    assert f"layout for {layout} or more nodes" in done.stdout
    assert f"--ntasks={nodes * 8}" in commands(done)[-1]


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({"SLURM_GPUS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, 4),
        ({"SLURM_GPUS_PER_NODE": "4", "MTPD_RANKS_PER_NODE": "3"}, 3),
    ],
)
def test_the_ranks_follow_the_gpus(env: dict[str, str], ranks: int) -> None:
    assert f"--ntasks-per-node={ranks}" in commands(dry_run(**env))[-1]


def test_a_container(tmp_path: Path) -> None:
    container = {"MTPD_CONTAINER": "image.sqsh", "MTPD_CONTAINER_MOUNTS": "/data:/data"}
    training = commands(dry_run(MTPD_RUN_DIR=str(tmp_path), **container))[-1]
    assert "--container-image=image.sqsh" in training
    mounts = next(word for word in training if word.startswith("--container-mounts="))
    assert f"{tmp_path}:{tmp_path}" in mounts and mounts.endswith(",/data:/data")
    assert training.index("python3") > training.index(mounts)


def test_words_of_the_site_go_to_srun_and_before_python() -> None:
    training = commands(dry_run(MTPD_SRUN_ARGS="--mpi=pmix --quiet", MTPD_WRAPPER="apptainer exec --nv a.sif"))[-1]
    start = training.index("--mpi=pmix")
    assert training[start : start + 7] == ["--mpi=pmix", "--quiet", "apptainer", "exec", "--nv", "a.sif", "python3"]


def test_extension_and_benchmark() -> None:
    env = {"MTPD_LOAD": "runs/a/checkpoints", "MTPD_HEADS": "16"}
    *_, extension, training = commands(dry_run("loop_extend", "--train-iters 5", **env))
    assert value(extension, "--num-heads") == "16" and value(extension, "--load") == "runs/a/checkpoints"
    assert value(training, "--mtp-num-layers") == "16" and value(training, "--mtpd-train") == "new-heads"
    assert value(training, "--load") == value(extension, "--save")
    assert value(training, "--train-iters") == "5"

    benchmark = commands(dry_run("benchmark_acceptance", "--prompts a.jsonl", **env))[-1]
    assert value(benchmark, "--load") == "runs/a/checkpoints" and value(benchmark, "--prompts") == "a.jsonl"


@pytest.mark.parametrize(
    ("script", "flags", "env", "message"),
    [
        ("pretrain_mtpd", "", {"MTPD_MODEL": ""}, "MTPD_MODEL is not set"),
        ("pretrain_mtpd", "", {"MTPD_MODEL": "dense-3b"}, "MTPD_MODEL=dense-3b: there is no"),
        ("pretrain_mtpd", "", {"MTPD_LAYOUT": "0"}, "no layout for 0 nodes"),
        ("pretrain_mtpd", "", {"MTPD_RUNDIR": "x"}, "MTPD_RUNDIR is not a setting"),
        ("pretrain_mtpd", "", {"SLURM_GPUS_PER_NODE": "0"}, "0 ranks a node"),
        ("pretrain_mtpd", "--save x", {}, "--save: leave it out"),
        ("pretrain_mtpd", "--load=x", {}, "--load: leave it out"),
        ("pretrain_mtpd", "--ckpt-step 7", {}, "--ckpt-step: every start of the job would go back to it"),
        ("pretrain_mtpd", "", {"MTPD_DRY_RUN": "0"}, "submit it with sbatch"),
        ("pretrain_mtpd", "", {"MTPD_ROOT": "/nowhere"}, "submit from the checkout"),
        ("loop_extend", "", {"MTPD_HEADS": "4"}, "MTPD_LOAD is not set"),
        ("loop_extend", "", {"MTPD_LOAD": "x", "MTPD_HEADS": "four"}, "MTPD_HEADS=four"),
        ("benchmark_acceptance", "", {}, "MTPD_LOAD is not set"),
    ],
)
def test_mistakes_are_named(script: str, flags: str, env: dict[str, str], message: str) -> None:
    done = dry_run(script, flags, **env)
    assert done.returncode == 2
    assert message in done.stderr


def test_files_of_arguments(tmp_path: Path) -> None:
    """Words of patterns must not become names of files, nor comments flags."""
    file = tmp_path / "a.args"
    file.write_text("# don't read this\n--pattern '*-*-|*-/*-' --split \"90, 5,5\" # nor this\n\n--last\n")
    done = run(f"source slurm/entry.sh; arguments_of {file}")
    assert done.stdout.splitlines() == ["--pattern", "*-*-|*-/*-", "--split", "90, 5,5", "--last"]
    file.write_text("# nothing but this\n")
    assert run(f"source slurm/entry.sh; arguments_of {file}").stdout == ""


def test_a_port_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        port = run("source slurm/entry.sh; free_port", SLURM_JOB_ID="1", MTPD_MASTER_PORT=taken).stdout
    assert port.strip() != taken and 20000 <= int(port) < 30000
    ports = {run("source slurm/entry.sh; free_port", SLURM_JOB_ID=str(job)).stdout for job in (41, 42, 10043)}
    assert len(ports) == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_name_no_site_and_ask_for_what_requeueing_takes(script: str) -> None:
    text = (ROOT / "slurm" / f"{script}.sh").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not [option for option in options if option.startswith(("--account", "--partition", "--qos", "--time"))]
    assert {"--requeue", "--open-mode=append", "--exclusive", "--mem=0"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)
    assert f"--job-name={script}" in options


@pytest.mark.parametrize("name", ["entry", *SCRIPTS])
def test_bash_can_parse_it(name: str) -> None:
    assert run(f"bash -n slurm/{name}.sh").returncode == 0
