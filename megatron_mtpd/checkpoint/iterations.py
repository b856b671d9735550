"""Which checkpoints a training run has left, and which of them can be loaded.

A run saves into `ROOT/iter_0000100/`, `ROOT/iter_0000200/`, ... and then writes the number of the last one
into `ROOT/latest_checkpointed_iteration.txt`, the tracker, which the next run reads. `release` is an
iteration of its own: weights without a place in a run. A save that was cut short leaves a directory that no
tracker names: it is passed over, and `check_loadable` says so. A damaged checkpoint that the tracker does
name stops a run before anything is read: the error says which file, and which earlier checkpoint to load
instead. `fall_back` makes that one the run's latest, for jobs that nobody watches; it is done only where it was asked
for, because it decides how much work is lost.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_mtpd.checkpoint import fp8_state
from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.checkpoint.integrity import Problem, is_finished, verify
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError, read_metadata

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
Iteration = int | str
"""A number, or `release`."""

logger = logging.getLogger(__name__)


class DamagedCheckpoint(CheckpointError):
    """The checkpoint that a run would load is damaged. `good` is the newest good one before it, None if none is."""

    def __init__(self, message: str, good: Iteration | None) -> None:
        super().__init__(message)
        self.good = good


@dataclass(frozen=True)
class Saved:
    """A checkpoint in a run's directory. State: complete, incomplete (its save was cut short), or damaged."""

    iteration: Iteration
    directory: Path
    state: Literal["complete", "incomplete", "damaged"]
    problems: tuple[Problem, ...] = ()


def directory_of(root: Path, iteration: Iteration) -> Path:
    """Where Megatron keeps that iteration."""
    return root / (RELEASE if iteration == RELEASE else f"iter_{iteration:07d}")


def read_tracker(root: Path) -> Iteration | None:
    """The iteration that a run would load; None without a tracker. Raises CheckpointError for a damaged tracker."""
    path = root / TRACKER
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    if text == RELEASE:
        return RELEASE
    if text.isascii() and text.isdigit():
        return int(text)
    good = next((saved for saved in reversed(list_checkpoints(root)) if saved.state == "complete"), None)
    remedy = f"Write {good.iteration} into it, the newest complete one." if good else "No complete checkpoint is there."
    raise CheckpointError(f"{path} says {text!r}, which is no iteration: writing it was cut short. {remedy}")


def write_tracker(root: Path, iteration: Iteration) -> None:
    """Name the iteration that the next run loads; all of the file changes or nothing."""
    with written_whole(root / TRACKER) as file:
        file.write(str(iteration).encode())


def resolve(path: Path, iteration: int | None = None) -> tuple[Iteration | None, Path]:
    """Iteration and directory of the checkpoint that a path means.

    The path is that of a run (its tracker decides, or the iteration asked for) or of one checkpoint. Raises
    CheckpointError where there is none.
    """
    if (path / METADATA).exists() or (path / CONFIG).exists():
        if iteration is not None:
            raise CheckpointError(
                f"{path} is one checkpoint; to choose iteration {iteration} name the directory above it."
            )
        return None, path
    chosen = iteration if iteration is not None else read_tracker(path)
    if chosen is None:
        raise CheckpointError(f"{path} holds no checkpoint: neither {TRACKER} nor {METADATA} is there.")
    directory = directory_of(path, chosen)
    if not directory.is_dir():
        there = ", ".join(str(saved.iteration) for saved in list_checkpoints(path)) or "none"
        raise CheckpointError(f"{directory} does not exist. Iterations in {path}: {there}.")
    return chosen, directory


def list_checkpoints(root: Path) -> list[Saved]:
    """All checkpoints of a run, oldest first, `release` before all. States are those of a quick look."""
    return [_look(root, iteration) for iteration in _iterations(root)]


def _iterations(root: Path) -> list[Iteration]:
    found: list[Iteration] = []
    for name in os.listdir(root) if root.is_dir() else []:
        number = name.removeprefix("iter_")
        if name == RELEASE:
            found.append(RELEASE)
        elif name != number and number.isascii() and number.isdigit():
            found.append(int(number))
    return sorted(found, key=_age)


def _age(iteration: Iteration) -> int:
    return -1 if iteration == RELEASE else int(iteration)


def _look(root: Path, iteration: Iteration) -> Saved:
    directory = directory_of(root, iteration)
    problems = tuple(verify(directory, full=False))
    state = "complete" if not problems else "damaged" if is_finished(directory) else "incomplete"
    return Saved(iteration, directory, state, problems)


def check_loadable(root: Path, iteration: int | None = None, full: bool = True) -> Iteration | None:
    """The iteration that a run will load from `root`, once its files are known to be good; None if there is none.

    `iteration` is Megatron's `--ckpt-step`; without it the tracker decides. Later directories that cannot be loaded are
    named in a warning. Raises DamagedCheckpoint with the file, what is wrong, and the flag that loads the newest good
    one before it. Where torch.distributed is initialized this is collective: all ranks call it, share the reading
    of a `full` check, and raise or return together.
    """
    team = _Team()
    chosen = iteration if iteration is not None else read_tracker(root)
    if chosen is None:
        return None
    directory = directory_of(root, chosen)
    problems = team.verify(directory, full)
    if problems:
        earlier = [other for other in team.agree(_iterations(root)) if _age(other) < _age(chosen)]
        good = None
        while earlier and good is None:
            candidate = earlier.pop()
            good = None if team.verify(directory_of(root, candidate), full) else candidate
        raise DamagedCheckpoint(_message(root, directory, problems, good), good)
    if team.rank == 0 and chosen != RELEASE:
        for saved in (_look(root, later) for later in _iterations(root) if _age(later) > _age(chosen)):
            if saved.state != "complete":
                logger.warning("Passing over %s, which is %s: %s", saved.directory, saved.state, saved.problems[0])
    return chosen


def fall_back(root: Path, damaged: DamagedCheckpoint) -> Iteration:
    """Make the last good checkpoint the one that `root`'s run resumes from, with a warning; returns its iteration.

    The damaged one stays where it is until the run saves that iteration again. Raises `damaged` where there is no good
    one of the same run: `release` is a beginning, not a place in it. Collective, as `check_loadable`.
    """
    if damaged.good is None or damaged.good == RELEASE:
        raise damaged
    team = _Team()
    if team.rank == 0:
        write_tracker(root, damaged.good)
        logger.warning("%s Resuming from iteration %s.", str(damaged).partition(" The last good")[0], damaged.good)
    team.agree([])  # nobody reads the tracker before it is written
    return damaged.good


def _message(root: Path, directory: Path, problems: list[Problem], good: Iteration | None) -> str:
    more = f" {len(problems) - 1} more of its files are bad." if len(problems) > 1 else ""
    if good is None:
        remedy = "There is no good checkpoint before it."
    elif good == RELEASE:
        remedy = f"{directory_of(root, good)} is good: to load it, write {RELEASE} into {root / TRACKER}."
    else:
        remedy = f"The last good one before it is iteration {good}: load it with --ckpt-step {good}."
    path = directory / problems[0].file if directory.is_dir() else directory
    return f"Cannot load {path}: {problems[0].what}.{more} {remedy}"


def check_fp8_state(directory: Path) -> None:
    """Raises CheckpointError where the FP8 state of a checkpoint could run code (see `fp8_state`), on all ranks: they
    share the reading, as in `check_loadable`."""
    team, checkpoint = _Team(), read_metadata(directory)
    mine = fp8_state.problems(checkpoint, (team.rank, team.size))
    fp8_state.refuse(checkpoint, [problem for part in team.gathered(mine) for problem in part])


class _Team:
    """The ranks of torch.distributed where it is in use, else one."""

    def __init__(self) -> None:
        module: Any = sys.modules.get("torch.distributed")  # whoever uses it has imported it
        self._distributed = module if module and module.is_available() and module.is_initialized() else None
        self.rank, self.size = (module.get_rank(), module.get_world_size()) if self._distributed else (0, 1)

    def verify(self, directory: Path, full: bool) -> list[Problem]:
        """`integrity.verify`, each rank its share of the bytes; the same list on all ranks."""
        mine = verify(directory, full, share=(self.rank, self.size)) if full or self.rank == 0 else []
        found = {problem.file: problem for part in self.gathered(mine) for problem in part}
        return list(found.values())

    def agree(self, value: list[Iteration]) -> list[Iteration]:
        """Rank 0's value, so that all ranks take the same steps even where a file system shows them different
        names.
        """
        return next(iter(self.gathered(value)))

    def gathered(self, value: list[Any]) -> Iterable[list[Any]]:
        if self._distributed is None:
            return [value]
        everyone: list[Any] = [None] * self.size
        self._distributed.all_gather_object(everyone, value)
        return everyone
