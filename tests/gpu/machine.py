"""What these tests run on, said once: a GPU, or in a dry run (MTPD_GPU_DRY_RUN=1) a CPU, whatever the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
DRY_RUN = os.environ.get("MTPD_GPU_DRY_RUN") == "1"
ON_GPU = not DRY_RUN and bool(torch.version.cuda) and torch.cuda.is_available()
HAS_TE = ON_GPU and find_spec("transformer_engine") is not None
GPUS = torch.cuda.device_count() if ON_GPU else 0
CAPABILITY = torch.cuda.get_device_capability() if ON_GPU else (0, 0)


def environment(**more: str) -> dict[str, str]:
    """Of every process that is started: this checkout in front of what PYTHONPATH already names; in a dry run no GPU,
    and a thread, because several run at a time."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    dry = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if DRY_RUN else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore", **dry, **more}


def python(*command: object, timeout: float = 600 if DRY_RUN else 240, **more: str) -> str:
    """Run this Python, from the checkout, with `more` environment variables: what it printed. Raises AssertionError
    where it fails, with the last line of that, then more of it."""
    words = [sys.executable, *map(str, command)]
    env = environment(**more)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        last = said.rpartition("\n")[2]
        raise AssertionError(f"status {done.returncode}, {last}\n{said[-4000:]}")
    return done.stdout


def tool(name: str, *arguments: object) -> str:
    """`python` with a command in tools/."""
    return python(ROOT / "tools" / name, *arguments)
