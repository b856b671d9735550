"""What the package says of itself holds together: version, requirements, pinned versions, make's commands."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_mtpd

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt."""
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def requirements(*extras: str) -> list[Requirement]:
    """The requirements of the package and of these extras, extras that name other extras followed."""
    found = [Requirement(text) for text in PROJECT["dependencies"]] if not extras else []
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            is_self = requirement.name == PROJECT["name"]
            found += requirements(*sorted(requirement.extras)) if is_self else [requirement]
    return found


def code_of(page: Path) -> list[str]:
    """The fenced blocks, indented blocks and `inline` code of a Markdown page."""
    text = page.read_text()
    return re.findall(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", text, re.MULTILINE | re.DOTALL)


def test_version_has_one_source() -> None:
    assert importlib.metadata.version("megatron-mtpd") == megatron_mtpd.__version__
    assert "version" not in PROJECT


def test_importing_the_package_is_free() -> None:
    code = "import sys, megatron_mtpd; sys.exit(bool({'torch', 'megatron', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_apex_is_asked_for_nowhere() -> None:
    """The package of that name on PyPI is not NVIDIA's."""
    asked = {r.name.lower() for r in requirements() + requirements(*PROJECT["optional-dependencies"])}
    assert "torch" in asked
    assert "apex" not in asked | pins().keys()


def test_constraints_are_plain_pins() -> None:
    """Names and versions only: no address, path, option or hash that would hold on one machine alone."""
    assert "://" not in CONSTRAINTS
    for line in CONSTRAINTS.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][0-9A-Za-z.]*", line), line


@pytest.mark.parametrize("requirement", requirements() + requirements("test", "dev"), ids=str)
def test_constraints_pin_every_direct_requirement_within_its_range(requirement: Requirement) -> None:
    assert requirement.url is None
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_what_must_not_move_has_a_range_with_an_end() -> None:
    bounded = {r.name for r in requirements() if any(s.operator == "<" for s in r.specifier)}
    assert bounded == {"torch", "megatron-core"}


def test_find_python_takes_the_versions_that_the_package_declares() -> None:
    classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    script = (ROOT / ".ci" / "find-python").read_text()
    assert re.search(r"in \((\(3, \d+\)(, )?)+\)", script)
    assert classifiers == [f"3.{minor}" for minor in re.findall(r"\(3, (\d+)\)", script)]


@pytest.mark.parametrize("target", ["help", "env", "quickstart", "test", "lint", "format", "typecheck", "clean"])
def test_makefile_has_the_target_and_lists_it(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
    listed = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^make {target} +\w", listed, re.MULTILINE)


def test_every_make_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", "\n".join(code_of(ROOT / "README.md"))))
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "test"} <= commands
    assert commands <= targets


def test_only_the_package_is_installed() -> None:
    """Neither tests nor tools may land in site-packages beside other projects' folders of these names."""
    files = importlib.metadata.distribution("megatron-mtpd").read_text("top_level.txt")
    assert (files or "").split() == ["megatron_mtpd"]
