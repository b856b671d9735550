"""What a step takes beside time: peak memory, and bytes given to collectives. For the benchmarks."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Memory:
    """Peak memory beyond what is taken when this is made: allocated on a GPU, resident on a CPU."""

    def __init__(self) -> None:
        if has_gpu():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the time before
            self.before = peak_resident_bytes()

    def peak_extra_bytes(self) -> int:
        """So far."""
        return (torch.cuda.max_memory_allocated() if has_gpu() else peak_resident_bytes()) - self.before


def peak_resident_bytes() -> int:
    """Of this process. Not getrusage's, which begins with the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class Allocations:
    """Within the block, the bytes that torch allocates on the CPU and has not freed. `peak`, afterwards: their most.

    As torch.cuda.max_memory_allocated counts, without what libraries keep for themselves. Every allocation is recorded:
    for some steps of a small model.
    """

    peak = 0

    def __enter__(self) -> Self:
        self._profiler = torch.autograd.profiler.profile(profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._profiler.__exit__(*exception)
        recorded: Any = self._profiler.kineto_results  # Any: nbytes is not in torch's stub of an event
        if recorded is not None:
            changes = (event.nbytes() for event in recorded.events() if event.name() == "[memory]")
            self.peak = max(accumulate(changes, initial=0))


class CountBytes(TorchDispatchMode):
    """Counts the bytes that this rank gives to collectives while the mode is on."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.bytes += _largest_bytes(args)
        return func(*args, **(kwargs or {}))


def _largest_bytes(arguments: Any) -> int:
    """Of a collective's tensors: the input of a scatter, the output of a gather."""
    if isinstance(arguments, Tensor):
        return arguments.nbytes
    if isinstance(arguments, list):
        return sum(_largest_bytes(x) for x in arguments)
    return max((_largest_bytes(x) for x in arguments), default=0) if isinstance(arguments, tuple) else 0


def has_gpu() -> bool:
    return bool(torch.version.cuda) and torch.cuda.device_count() > 0 and torch.cuda.is_available()
