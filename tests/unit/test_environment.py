"""`make env` on machines that are not this one: stand-ins take the place of Python, pip and df.

`.ci/find-python` asks each candidate by running it, so a stand-in is a shell script that answers, refuses or
breaks; where a real answer is wanted, it passes the question on to the Python that runs this test.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / ".ci"
SELF = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
SHIM = "echo 'pyenv: python3.12: command not found' >&2; exit 127"
GENUINE = f'exec "{sys.executable}" "$@"'


def pretending(change: str) -> str:
    """A Python of which something is different: `-c CODE` runs after `change`."""
    return f"""exec "{sys.executable}" -c 'import sys; {change}; exec(sys.argv[1])' "$2" """


def claims(version: str) -> str:
    return f"echo usable {version} /stand-in/{version}"


OLD = pretending('sys.version_info = (3, 11, 7, "final", 0); sys.version = "3.11.7 (main)"')
WITHOUT_VENV = pretending('sys.modules["ensurepip"] = None')
FREE_THREADED = pretending('import sysconfig; sysconfig.get_config_var = "Py_GIL_DISABLED".__eq__')


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with the tools of a POSIX shell and no Python at all."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("awk", "cat", "find", "head", "sed", "sort", "tr"):
        (tools / name).symlink_to(shutil.which(name) or f"no {name} here")
    return {"PATH": str(tools), "HOME": str(tmp_path / "home")}


def run(command: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([command], env=env, capture_output=True, text=True, check=False)


def find_python(env: dict[str, str], *folders: Path, **more: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), env["PATH"]])
    return run(CI / "find-python", env | more | {"PATH": path})


def test_broken_candidates_are_passed_over(bare: dict[str, str], tmp_path: Path) -> None:
    """The first python3.12 is a shim that leads nowhere, the next ones cannot make an environment."""
    first = program(tmp_path / "a" / "python3.12", SHIM).parent
    second = program(tmp_path / "with space" / "python3.12", WITHOUT_VENV).parent
    program(second / "python3.13", "echo nonsense; exit 0")
    program(first / "python3", OLD)
    program(second / "python3", GENUINE)
    result = find_python(bare, first, second)
    assert (result.returncode, result.stdout) == (0, f"{SELF}\n")


def test_what_pyenv_holds_is_found_newest_first(bare: dict[str, str], tmp_path: Path) -> None:
    shims = program(tmp_path / "shims" / "python3.12", SHIM).parent
    for version in ("3.11.7", "3.12.9", "3.12.11", "3.13.2"):
        program(Path(bare["HOME"], ".pyenv", "versions", version, "bin", "python3"), claims(version))
    assert find_python(bare, shims).stdout == "/stand-in/3.12.11\n"


def test_a_pyenv_that_lies_elsewhere_is_asked_where(bare: dict[str, str], tmp_path: Path) -> None:
    program(tmp_path / "elsewhere" / "versions" / "3.12.1" / "bin" / "python3", claims("3.12"))
    bin_ = program(tmp_path / "bin" / "pyenv", f'[ "$1" = root ] && echo "{tmp_path}/elsewhere"').parent
    assert find_python(bare, bin_).stdout == "/stand-in/3.12\n"


def test_uv_is_asked_for_what_it_holds_only(bare: dict[str, str], tmp_path: Path) -> None:
    stored = program(tmp_path / "uv-store" / "python", claims("3.13"))
    asked = "$UV_PYTHON_PREFERENCE $UV_PYTHON_DOWNLOADS $*"
    answer = f'[ "{asked}" != "only-managed never python find --system 3.13" ] || echo "{stored}"'
    bin_ = program(tmp_path / "bin" / "uv", answer).parent
    assert find_python(bare, bin_).stdout == "/stand-in/3.13\n"


def test_3_12_comes_before_3_13_wherever_it_is(bare: dict[str, str], tmp_path: Path) -> None:
    bin_ = program(tmp_path / "bin" / "python3.13", claims("3.13")).parent
    assert find_python(bare, bin_).stdout == "/stand-in/3.13\n"
    program(bin_ / "python3", claims("3.12"))
    assert find_python(bare, bin_).stdout == "/stand-in/3.12\n"


def test_where_there_is_none_it_says_what_it_saw_and_what_to_do(bare: dict[str, str], tmp_path: Path) -> None:
    bin_ = program(tmp_path / "bin" / "python3", OLD).parent
    program(bin_ / "python3.12", WITHOUT_VENV)
    program(bin_ / "python3.13", FREE_THREADED)
    result = find_python(bare, bin_)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{bin_}/python3: it is Python 3.11.7" in result.stderr
    assert f"{bin_}/python3.12: it lacks the ensurepip module" in result.stderr
    assert f"{bin_}/python3.13: it is a free-threaded build" in result.stderr
    for advice in ("uv python install 3.12", "pyenv install 3.12", "apt-get install", "PYTHON=/path/to"):
        assert advice in result.stderr


def test_an_empty_machine_gets_the_advice_too(bare: dict[str, str]) -> None:
    result = find_python(bare)
    assert result.returncode == 1
    assert "nothing named python3" in result.stderr


@pytest.mark.parametrize(("body", "reason"), [(OLD, "it is Python 3.11.7"), (SHIM, "command not found")])
def test_an_explicit_choice_is_never_passed_over(bare: dict[str, str], tmp_path: Path, body: str, reason: str) -> None:
    chosen = program(tmp_path / "chosen", body)
    good = program(tmp_path / "bin" / "python3.12", claims("3.12")).parent
    result = find_python(bare, good, PYTHON=str(chosen))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"PYTHON={chosen} cannot be used: " in result.stderr
    assert reason in result.stderr


def test_an_explicit_choice_is_taken(bare: dict[str, str], tmp_path: Path) -> None:
    good = program(tmp_path / "bin" / "python3.12", claims("3.12")).parent
    assert find_python(bare, good, PYTHON=sys.executable).stdout == f"{SELF}\n"
    assert "no such program" in find_python(bare, good, PYTHON="/nowhere/python").stderr


class Checkout:
    """A checkout with the real scripts, in which a stand-in for Python notes what pip was asked to do."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        self.log = root / "pip.log"
        self.log.touch()
        self.bin = root / "bin"
        shutil.copytree(CI, self.root / ".ci")
        for name in ("pyproject.toml", "setup.py", "constraints.txt", "megatron_mtpd/__init__.py"):
            (self.root / name).parent.mkdir(exist_ok=True)
            (self.root / name).write_text(f"# {name}\n")
        stand_in = self.bin / "stand-in"
        self.python = program(self.bin / "python3.12", f'echo usable 3.12 "{stand_in}"')
        inside = program(
            root / "inside",
            f"""case "$*" in
                "-m pip --version") ;;
                "-m pip "*) echo "$*" >>"{self.log}"; [ ! -e "{root}/pip-does" ] || . "{root}/pip-does" ;;
                *ensurepip*) echo usable 3.12 "{stand_in}" ;;
                *sys.prefix*) pwd -P ;;
                *) echo Python 3.12.0 ;;
            esac""",
        )
        program(stand_in, f"""[ "$1" != -m ] || {{ mkdir -p "$3/bin" && cp "{inside}" "$3/bin/python"; }}""")
        self.disk(free_gb=100)

    def disk(self, free_gb: int) -> None:
        program(self.bin / "df", f"echo header; echo / 0 0 {free_gb * 1048576} 0% /")

    def pip_does(self, what: str) -> None:
        (self.root.parent / "pip-does").write_text(what + "\n")

    def make_env(self, **more: str) -> subprocess.CompletedProcess[str]:
        env = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        env |= {"PATH": f"{self.bin}{os.pathsep}{env['PATH']}"} | more
        return run(self.root / ".ci" / "make-env", env)

    @property
    def installs(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_env_is_made_once(checkout: Checkout) -> None:
    first = checkout.make_env()
    assert first.returncode == 0, first.stderr
    assert [line[:3] for line in first.stdout.splitlines() if line[1:3] == "/3"] == ["1/3", "2/3", "3/3"]
    assert "-c constraints.txt -e .[test,dev]" in checkout.log.read_text()
    second = checkout.make_env()
    assert (second.returncode, second.stdout, checkout.installs) == (0, "", 1)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "megatron_mtpd/__init__.py"])
def test_env_follows_what_it_was_made_from(checkout: Checkout, name: str) -> None:
    checkout.make_env()
    keepsake = checkout.root / ".venv" / "keepsake"
    keepsake.touch()
    (checkout.root / name).write_text("# changed\n")
    assert checkout.make_env().returncode == 0
    assert checkout.installs == 2
    assert keepsake.exists(), "an update in place is enough"
    assert checkout.make_env().stdout == ""


def test_env_made_by_hand_is_kept_and_completed(checkout: Checkout) -> None:
    subprocess.run([checkout.bin / "stand-in", "-m", "venv", checkout.root / ".venv"], check=True)
    keepsake = checkout.root / ".venv" / "keepsake"
    keepsake.touch()
    assert checkout.make_env().returncode == 0
    assert (checkout.installs, keepsake.exists()) == (1, True)
    assert checkout.make_env().stdout == ""


def test_env_that_was_killed_half_way_is_made_anew(checkout: Checkout) -> None:
    checkout.pip_does("touch .venv/half-copied; kill -9 $PPID $$")
    assert checkout.make_env().returncode < 0
    checkout.pip_does("")
    again = checkout.make_env()
    assert "interrupted" in again.stdout
    assert not (checkout.root / ".venv" / "half-copied").exists()
    assert checkout.make_env().stdout == ""
    assert [path.name for path in checkout.root.glob(".venv*")] == [".venv"]


def test_env_survives_an_error_of_pip(checkout: Checkout) -> None:
    """No network, for example: nothing that was good is thrown away, and the next run goes on."""
    checkout.make_env()
    keepsake = checkout.root / ".venv" / "keepsake"
    keepsake.touch()
    (checkout.root / "constraints.txt").write_text("# new\n")
    checkout.pip_does("exit 1")
    failed = checkout.make_env()
    assert failed.returncode == 1
    assert "pip failed" in failed.stderr
    checkout.pip_does("")
    assert checkout.make_env().returncode == 0
    assert (checkout.installs, keepsake.exists()) == (3, True)


def test_env_that_does_not_run_is_made_anew(checkout: Checkout) -> None:
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    (checkout.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3.12")
    result = checkout.make_env()
    assert result.returncode == 0, result.stderr
    assert "does not work" in result.stdout


def test_env_that_was_moved_is_made_anew(checkout: Checkout) -> None:
    checkout.make_env()
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    assert "was moved" in checkout.make_env().stdout
    assert checkout.make_env().stdout == ""


def test_env_of_another_python_is_made_anew_on_request_only(checkout: Checkout) -> None:
    checkout.make_env()
    newer = shutil.copy(checkout.bin / "stand-in", checkout.bin / "newer-stand-in")
    other = program(checkout.bin / "other", f"echo usable 3.13 {newer}")
    assert "another Python" in checkout.make_env(PYTHON=str(other)).stdout
    assert checkout.make_env(PYTHON=str(checkout.python)).stdout == "", "the one that it is of"


def test_env_wants_disk_before_it_starts(checkout: Checkout) -> None:
    checkout.disk(free_gb=3)
    result = checkout.make_env()
    assert result.returncode == 1
    assert "7 GB" in result.stderr
    assert "finds 3 GB" in result.stderr
    assert not (checkout.root / ".venv").exists()
