"""Training runs, and what users do with their checkpoints, as jobs that several tests can share.

Start-up takes most of a job's time, which a GPU does not notice: several run at once. A test says with
`@pytest.mark.runs(name, ...)` which it asks for; the first of them starts all that the selected tests ask for, those
first that wait for no other, and `runs[name]` waits for one. Nothing is timed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.commands import DENSE, EXPERTS, LATENT, LOCAL, Training, small, train
from tests.gpu.machine import DRY_RUN, HAS_TE, ON_GPU, tool

STARTED = 2 if DRY_RUN else 30
ITERATIONS, SAVED, RESUMED_UNTIL = (6, 2, 4) if DRY_RUN else (60, 30, 40)
FEW, FEW_SAVED = (4, 2) if DRY_RUN else (30, 20)
AT_ONCE = 5 if ON_GPU else 2
# Compiling Megatron's elementwise functions takes longer than these runs; the reference has them compiled, as users do.
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}
SLOWLY = ["--lr", "5e-4"]

CURRENT = "--fp8-format hybrid --fp8-recipe tensorwise"
FP8 = {
    "FP8 delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 16 --fp8-amax-compute-algo max",
    "FP8 current": CURRENT,
    "FP8 current, first and last layers in bf16": f"{CURRENT} --first-last-layers-bf16",
    "FP8 current, FP8 parameters": f"{CURRENT} --fp8-param-gather --use-distributed-optimizer",
    "FP8 blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "MXFP8": "--fp8-format e4m3 --fp8-recipe mxfp8",
}


def fp8(name: str) -> list[str]:
    """The flags of a recipe; none where there is no FP8, and bf16 has to stand in for it (`shown` says so)."""
    return FP8[name].split() if HAS_TE else []


def shown(name: str) -> str:
    """What a run is to be called in a report."""
    return name if HAS_TE or name not in FP8 else f"bf16 in the place of {name}"


@dataclass(frozen=True)
class Job:
    """`do(folder, runs)` makes the result, in an empty folder, from those of the jobs that it needs."""

    do: Callable[[Path, Runs], Any]
    needs: tuple[str, ...] = ()


class Runs:
    """Results by name, of jobs that run in threads."""

    def __init__(self, folder: Path, wanted: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._results: dict[str, Future] = {}
        for name in sorted(dict.fromkeys(_with_needs(wanted)), key=_depth):
            path = folder / str(len(self._results))
            path.mkdir()
            self._results[name] = self._pool.submit(JOBS[name].do, path, self)
        _started.extend(self._results.values())

    def __getitem__(self, name: str) -> Any:
        """The result of a job. Raises what it raised."""
        return self._results[name].result()

    def close(self) -> None:
        """Start nothing more, and wait for what runs."""
        self._pool.shutdown(cancel_futures=True)


def _with_needs(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield from (*_with_needs(JOBS[name].needs), name)


def _depth(name: str) -> int:
    return 1 + max(map(_depth, JOBS[name].needs), default=0)


_started: list[Future] = []


def wait_for_all() -> None:
    """Until no job runs."""
    wait(_started)


# The jobs ------------------------------------------------------------------------------------------------------------


def from_scratch(flags: list[str], iterations: int, save_interval: int) -> Job:
    return Job(lambda folder, runs: train(folder, flags, iterations, save_interval, **NOT_COMPILED))


def trains(
    flags: list[str],
    iterations: int = ITERATIONS,
    save_interval: int | None = None,
    ranks: int = 1,
    variables: Mapping[str, str] = NOT_COMPILED,
) -> Job:
    """From the weights that `start` leaves: the first iterations from random ones would magnify any difference."""

    def do(folder: Path, runs: Runs) -> Training:
        weights = ["--load", runs["start"].checkpoints, "--finetune"]
        return train(folder, [*flags, *SLOWLY, *weights], iterations, save_interval, ranks, **variables)

    return Job(do, ("start",))


def goes_on(source: str, flags: list[str], saved: int, iterations: int, until: int) -> Job:
    """From a run's checkpoint in the middle, until an iteration."""

    def do(folder: Path, runs: Runs) -> Training:
        load = ["--load", runs[source].checkpoints, "--ckpt-step", saved, "--exit-interval", until]
        return train(folder, [*flags, *load], iterations, **NOT_COMPILED)

    return Job(do, (source,))


def new_heads(folder: Path, runs: Runs) -> tuple[Path, Training]:
    """Looped extension from two heads to four, and training of the new ones: the extended checkpoint, and the run."""
    extended = folder / "extended"
    tool("loop_extend.py", "--load", runs["FP8 delayed"].checkpoints, "--save", extended, "--num-heads", 4, "--verify")
    flags = small(DENSE.replace("--mtp-num-layers 2", "--mtp-num-layers 4")) + fp8("FP8 delayed")
    flags += ["--load", extended, "--mtpd-train", "new-heads"]
    return extended, train(folder, flags, FEW, FEW, **NOT_COMPILED)


def exported(source: str) -> Job:
    """The folder that transformers and serving engines read."""

    def do(folder: Path, runs: Runs) -> Path:
        tool("convert_hf.py", "export", "--load", runs[source].checkpoints, "--save", folder / "served")
        return folder / "served"

    return Job(do, (source,))


def drafts(folder: Path, runs: Runs) -> dict[str, Any]:
    """What tools/benchmark_acceptance.py finds with the reference's heads, in fp32."""
    prompts, output = folder / "prompts.jsonl", folder / "acceptance"
    texts = [" ".join(str(number) for number in range(first, first + 8)) for first in range(5, 245, 30)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["--load", runs["bf16"].checkpoints, "--prompts", prompts, "--output", output, "--dtype", "fp32"]
    tool("benchmark_acceptance.py", *words, "--num-heads", 1, 2, "--max-new-tokens", 16, "--batch-size", 4)
    return json.loads((output / "acceptance.json").read_text())


def zero3_with_offload(folder: Path, runs: Runs) -> Training:
    config = folder / "ds_config.json"
    cpu = {"device": "cpu"}
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}}))
    flags = [*small(), *ONE_NORM, "--engine", "deepspeed", "--deepspeed-config", str(config)]
    return trains(flags, FEW).do(folder, runs)


EXPORTED = ("FP8 delayed", "FP8 current, FP8 parameters")
ONE_NORM = ["--no-mtpd-clip-apart"]
TE_MIXTURE = ["--moe-grouped-gemm", "--moe-permute-fusion"] if HAS_TE else []
CONTEXT = [*small(), "--global-batch-size", "2" if DRY_RUN else "8"]
JOBS = {
    "start": from_scratch([*small(), "--no-save-optim"], STARTED, STARTED),
    "bf16": trains([*small(), "--no-save-optim"], save_interval=ITERATIONS, variables={}),
    "local layers": trains([*small(), *LOCAL]),
    "eager loss": trains([*small(), "--mtpd-loss", "eager"]),
    **{name: trains([*small(), *fp8(name)]) for name in FP8},
    "FP8 delayed": trains([*small(), *fp8("FP8 delayed")], save_interval=SAVED),
    "FP8 current, FP8 parameters": trains(
        [*small(), *fp8("FP8 current, FP8 parameters"), "--no-save-optim"], save_interval=ITERATIONS
    ),
    "resumed": goes_on("FP8 delayed", [*small(), *fp8("FP8 delayed"), *SLOWLY], SAVED, ITERATIONS, RESUMED_UNTIL),
    "new heads": Job(new_heads, ("FP8 delayed",)),
    **{f"{name}, exported": exported(name) for name in EXPORTED},
    "drafts": Job(drafts, ("bf16",)),
    "experts": from_scratch([*small(EXPERTS), *TE_MIXTURE], FEW, FEW_SAVED),
    "experts, local": goes_on("experts", [*small(EXPERTS), *LOCAL], FEW_SAVED, FEW, FEW),
    "latent attention": from_scratch([*small(LATENT), *TE_MIXTURE], FEW, FEW_SAVED),
    "latent attention, local": goes_on("latent attention", [*small(LATENT), *LOCAL], FEW_SAVED, FEW, FEW),
    "one gradient norm": trains([*small(), *ONE_NORM], FEW),
    "ZeRO-3 with offload": Job(zero3_with_offload, ("start",)),
    **{
        f"{loss} loss on {ranks}": trains(
            [*CONTEXT, "--mtpd-loss", loss, "--context-parallel-size", str(ranks)], FEW, ranks=ranks
        )
        for loss in ("fused", "eager")
        for ranks in (1, 2)
    },
}
