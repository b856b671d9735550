"""Write the checkpoint that a plan of `looping` describes, and show what it will be.

Three ways, told apart by what happens to the old bytes. By default the data files get a second name (a hard
link): the new checkpoint costs a new `.metadata` and the new arguments, nothing else. Where that is not
possible, or not wanted (`copy`), those files are copied whole. With `materialize` every entry gets bytes of
its own, in new files that hold nothing else: for tools that expect that, and to be rid of the optimizer state
in the old files.

The result appears whole or not at all: it is built in a directory beside it, whose tracker is written last. A
linked file is one file with two names: whoever writes over it in place changes both checkpoints. Megatron does when it
saves an iteration again, and `seam` keeps it from doing so; copy where other programs write to the old checkpoint.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal

from megatron_mtpd.checkpoint.common_state import LEGACY_FILE, read_common_state
from megatron_mtpd.checkpoint.files import Progress, assembled, can_link, copied, readable, sync
from megatron_mtpd.checkpoint.integrity import verify, write_manifest
from megatron_mtpd.checkpoint.iterations import RELEASE, directory_of, write_tracker
from megatron_mtpd.checkpoint.looping import Plan, changed
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError, is_optimizer, read_metadata

Mode = Literal["link", "copy", "materialize"]

_NEW_FILE = "__extended_{}.distcp"
_FILE_SIZE = 4 << 30
_COMPARED = 1 << 30  # bytes of tensors in memory at a time


def extend(plan: Plan, save: Path, mode: Mode = "link", force: bool = False, verified: bool = False) -> Mode:
    """Write the planned checkpoint as the latest of `save`; returns how its data got there.

    `save` must not exist, or be empty, unless `force`: then it is replaced as a whole, once the new one is on
    disk. `verified` reads every tensor of both checkpoints through torch and compares them before the result
    appears. Raises ValueError before anything is written, OSError when the disk is full, CheckpointError when
    the comparison fails; the result does not exist then.
    """
    _refuse_overlap(plan.source.directory, save)
    with assembled(save, replace=force) as root:
        directory = directory_of(root, plan.iteration)
        directory.mkdir()
        if mode == "link" and not can_link(plan.source.directory / next(iter(plan.source.files())), directory):
            mode = "copy"
        total, new = _bytes_to_write(plan, mode), sum(len(x) for _, x in plan.entries if isinstance(x, bytes))
        free = shutil.disk_usage(root).free
        if total + new > free:
            raise ValueError(
                f"--save {save} needs {(total + new) / 1e9:,.1f} GB, and its file system has {free / 1e9:,.1f} GB."
            )
        with Progress("extend", total) as progress:
            if mode == "materialize":
                storage_data = _materialize(plan, directory, progress)
            else:
                storage_data = _share(plan, directory, mode, progress)
        _write(directory / METADATA, plan.metadata(storage_data))
        if (plan.source.directory / LEGACY_FILE).exists():
            _write(directory / LEGACY_FILE, plan.common_state())
        _write(directory / CONFIG, (plan.source.directory / CONFIG).read_bytes())
        write_manifest(directory)
        if verified:
            compare(plan, directory)
        write_tracker(root, plan.iteration)
    return mode


def _refuse_overlap(source: Path, save: Path) -> None:
    source, save = source.resolve(), save.resolve()
    if save in (source, source.parent) or save in source.parents or source in save.parents:
        raise ValueError(f"--save {save} would replace the checkpoint that is read, {source}. Name another directory.")


def _bytes_to_write(plan: Plan, mode: Mode) -> int:
    if mode == "link":
        return 0
    infos = [info for _, info in plan.entries if not isinstance(info, bytes)]
    if mode == "materialize":
        return sum(info.length for info in infos)
    return sum((plan.source.directory / name).stat().st_size for name in {info.relative_path for info in infos})


def _share(plan: Plan, directory: Path, mode: Mode, progress: Callable[[int], object]) -> dict[Any, Any]:
    """Give the new checkpoint the old files that it needs, and write the new bytes into a file of their own."""
    storage_data, files = {}, set()
    with _Files(plan, directory) as new:
        for index, place in plan.entries:
            if isinstance(place, bytes):
                place = new.write(place)
            else:
                files.add(place.relative_path)
            storage_data[index] = place
    for name in sorted(files):
        source = (plan.source.directory / name).resolve()
        if mode == "link":
            (directory / name).hardlink_to(source)
            continue
        with source.open("rb") as reader, (directory / name).open("xb") as writer:
            copied(reader, writer, source.stat().st_size, progress)
        sync(directory / name)
    return storage_data


def _materialize(plan: Plan, directory: Path, progress: Callable[[int], object]) -> dict[Any, Any]:
    """Write every entry's bytes anew, in the order they have in the old files."""
    entries = list(plan.entries)
    storage_data: dict[Any, Any] = dict.fromkeys(index for index, _ in entries)  # the order of the old table
    entries.sort(
        key=lambda entry: ("", 0) if isinstance(entry[1], bytes) else (entry[1].relative_path, entry[1].offset)
    )
    with _Files(plan, directory) as new, ExitStack() as stack:
        name, reader = None, None
        for index, place in entries:
            if isinstance(place, bytes):
                storage_data[index] = new.write(place)
                continue
            if place.relative_path != name:
                stack.close()
                name = place.relative_path
                reader = stack.enter_context((plan.source.directory / name).open("rb"))
            assert reader is not None
            reader.seek(place.offset)
            storage_data[index] = new.write(reader, place, progress)
    return storage_data


class _Files:
    """New data files: appends what it is given, and says where it went."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._directory, self._file = directory, None
        self._template = next(iter(plan.source.raw.storage_data.values()))
        taken = plan.source.files()  # an extended checkpoint can be extended again
        self._names = (name for name in map(_NEW_FILE.format, itertools.count()) if name not in taken)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def write(
        self, data: bytes | IO[bytes], place: Any = None, progress: Callable[[int], object] = lambda count: None
    ) -> Any:
        """Append bytes, or those that an open file has at `place`; returns their place."""
        if self._file is None or self._file.tell() >= _FILE_SIZE:
            self._close()
            self._file = (self._directory / next(self._names)).open("xb")
        offset = self._file.tell()
        if isinstance(data, bytes):
            self._file.write(data)
        else:
            copied(data, self._file, place.length, progress)
        return changed(
            place or self._template,
            relative_path=Path(self._file.name).name,
            offset=offset,
            length=self._file.tell() - offset,
            **({} if place else {"transform_descriptors": None}),
        )

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            sync(Path(self._file.name))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def compare(plan: Plan, directory: Path) -> None:
    """Load every tensor of the model from both checkpoints, through torch, and compare them bit by bit.

    Raises CheckpointError naming the first tensor that differs from its source, or the file that is damaged.
    """
    problems = verify(directory)
    if problems:
        raise CheckpointError(f"{directory} is damaged: {problems[0]}")
    import torch

    new = read_metadata(directory)
    pairs = [(copy, key) for key in plan.source.tensors for copy, _ in plan.keys(key) if not is_optimizer(key)]
    with Progress("compare", sum(new.tensors[copy].nbytes for copy, _ in pairs)) as progress:
        for batch in _batches(pairs, lambda pair: new.tensors[pair[0]].nbytes):
            copies = _load(new, [copy for copy, _ in batch])
            originals = _load(plan.source, list(dict.fromkeys(key for _, key in batch)))
            for copy, key in batch:
                if not torch.equal(_bits(copies[copy]), _bits(originals[key])):
                    raise CheckpointError(f"{directory}: {copy} is not the source's {key}.")
                progress(new.tensors[copy].nbytes)


def _batches(items: list[Any], weight: Callable[[Any], int]) -> Iterator[list[Any]]:
    batch, filled = [], 0
    for item in items:
        if batch and filled + weight(item) > _COMPARED:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += weight(item)
    if batch:
        yield batch


def _load(metadata: Any, keys: list[str]) -> dict[str, Any]:
    import torch
    from torch.distributed import checkpoint

    tensors = {
        key: torch.empty(metadata.tensors[key].shape, dtype=getattr(torch, metadata.tensors[key].dtype)) for key in keys
    }
    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(metadata.directory), no_dist=True)
    return tensors


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.reshape(-1).view(torch.uint8)  # not-a-number is equal to itself


def summary(plan: Plan, mode: Mode = "link") -> str:
    """The plan for people to read: heads and their sources, patterns, tensors, bytes, optimizer, iteration."""
    source = plan.source
    model = [key for key in source.tensors if not is_optimizer(key)]
    copies = [copy for key in model for copy, _ in plan.keys(key)]
    files = {info.relative_path for _, info in plan.entries if not isinstance(info, bytes)}
    held = sum((source.directory / name).stat().st_size for name in files)
    pattern = read_common_state(source).args.get("hybrid_layer_pattern")
    data = {
        "link": f"{len(files)} files, {readable(held)}: hard links, nothing is copied",
        "copy": f"{len(files)} files, {readable(held)}: copied",
        "materialize": f"{readable(_bytes_to_write(plan, mode))}: every tensor written anew",
    }
    kept = "kept; new heads start with their source's master weights and zero moments"
    rows = [
        ("checkpoint", source.directory),
        ("heads", f"{source.num_heads} -> {len(plan.sources)}"),
        ("made of heads", " ".join(str(old + 1) for old in plan.sources)),
        *([("layer pattern", pattern), ("", f"-> {plan.layer_pattern(pattern)}")] if pattern else []),
        ("tensors", f"{len(model)} -> {len(copies)}, and no tensor is read" if mode == "link" else len(copies)),
        ("data", data[mode]),
        ("optimizer", kept if plan.keep_optimizer else "dropped: training starts with a fresh one"),
        (
            "stored as",
            "release: weights, at iteration 0" if plan.iteration == RELEASE else f"iteration {plan.iteration}",
        ),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)
