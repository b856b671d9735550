"""Where a number comes from: commit, versions, hardware, date and command, for everything that is published."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("megatron-mtpd", "torch", "megatron-core", "transformer-engine", "deepspeed"),
    *("sentencepiece", "tokenizers", "transformers"),
)


def provenance() -> dict[str, Any]:
    """`date` (UTC), `commit` (None outside a checkout, with a + when files differ from it), `command`, `versions`,
    `hardware`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **versions()},
        "hardware": _hardware(),
    }


def _commit() -> str | None:
    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "HEAD")
        return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:  # no git on this machine
        return None


def versions() -> dict[str, str]:
    """Installed version of each of PACKAGES that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    import torch

    hardware: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if torch.version.cuda and torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["gpus"] = torch.cuda.device_count()
    return hardware


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
