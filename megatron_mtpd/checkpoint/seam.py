"""What Megatron calls while it saves and loads: three wrappers around functions of its own, and nothing of
Megatron in here.

Each takes what it replaces and returns the replacement, as the patch table of `megatron_mtpd.platform` wants
it. What they add:

- `saves_whole`: a save first removes what an earlier one left in its directory, and ends with a manifest,
  before the tracker names the iteration. Megatron writes over old files in place: killed half way, old and
  new bytes would look like one checkpoint, and a hard link of the old file (an extended checkpoint) would be
  written over with it.
- `replaces_trackers`: the tracker file changes at once. Megatron empties it, then writes it: killed or out of
  space between the two, the run could not resume, from any of its checkpoints.
- `loads_checked`: every byte is checked before anything is loaded, by all ranks together; what Megatron cannot load
  is refused with the way out, and where that was asked for, a run whose last checkpoint is damaged goes on from the one
  before.

What Megatron does by itself, and needs no help with: a write that fails (a full disk) raises on all ranks and
leaves the tracker alone; data files, then `.metadata`, are on disk before `metadata.json` makes a directory a
checkpoint.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint import fp8_state
from megatron_mtpd.checkpoint.common_state import LEGACY_FILE, read_common_state
from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.checkpoint.integrity import MANIFEST, write_manifest
from megatron_mtpd.checkpoint.iterations import (
    RELEASE,
    TRACKER,
    DamagedCheckpoint,
    Iteration,
    check_fp8_state,
    check_loadable,
    directory_of,
    fall_back,
)
from megatron_mtpd.checkpoint.metadata import CONFIG, METADATA, CheckpointError, is_optimizer, read_metadata


def saves_whole(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `megatron.core.dist_checkpointing.save(sharded_state_dict, checkpoint_dir, ...)`. Collective, as
    it is.

    Returns what the original returns: None, or for `--async-save` a request whose last finalize function so
    far then writes the manifest. Object storage (`msc://`) is left to Megatron.
    """

    @functools.wraps(original)
    def save(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if "://" in str(checkpoint_dir):
            return original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        import torch

        directory = Path(checkpoint_dir)
        if torch.distributed.get_rank() == 0:
            _clear(directory)
        torch.distributed.barrier()  # no rank writes before the old files are gone

        def finish() -> None:
            if torch.distributed.get_rank() == 0:
                write_manifest(directory)

        with _explained(directory):
            request = original(sharded_state_dict, checkpoint_dir, *args, **kwargs)
            if request is None:
                finish()
                return None
        request.finalize_fns[:] = [_explained(directory)(step) for step in [*request.finalize_fns, finish]]
        return request

    return save


def _clear(directory: Path) -> None:
    """Remove an earlier checkpoint from a directory, first of all what makes it look like one."""
    for name in (CONFIG, METADATA, MANIFEST, LEGACY_FILE):
        (directory / name).unlink(missing_ok=True)
    for data in [*directory.glob("*.distcp"), *directory.glob("*.tmp"), *directory.glob("*.partial")]:
        data.unlink()


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Say what an error in a save means; Megatron's own message names neither the directory nor the cause."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        free = shutil.disk_usage(directory).free
        error.add_note(
            f"The save into {directory} failed; its file system has {free / 1e9:,.3f} GB free. The checkpoints before "
            "it are untouched: a run that is started again resumes from the last of them."
        )
        raise


def replaces_trackers(original: Any) -> Any:
    """Wrap `megatron.training.checkpointing.maybe_msc`, through which it opens files."""
    return _Storage(original)


class _Storage:
    """Megatron's access to storage, but for writing trackers."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        if os.path.basename(path) == TRACKER and mode == "w" and "://" not in str(path):
            return _text_written_whole(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


@contextmanager
def _text_written_whole(path: Path) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    with written_whole(path) as file:
        file.write(text.getvalue().encode())


def loads_checked(
    original: Callable[..., Any], get_args: Callable[[], Any], full: Callable[[Any], bool] = lambda args: True
) -> Callable[..., Any]:
    """Wrap `megatron.training.training.load_checkpoint(..., load_arg="load")`. Collective, as it is.

    `get_args` is Megatron's; `full` says, of its arguments, whether to read every byte or only look at sizes.
    Raises CheckpointError on all ranks before anything is loaded.
    """

    @functools.wraps(original)
    def load_checkpoint(*positional: Any, load_arg: str = "load", **kwargs: Any) -> Any:
        args = get_args()
        root = getattr(args, load_arg)
        if root is None or not os.path.exists(os.path.join(root, TRACKER)):
            root = getattr(args, "pretrained_checkpoint", None) or root  # as Megatron chooses
        if root is not None and "://" not in str(root) and args.ckpt_format == "torch_dist":
            iteration = _loadable(Path(root), args, full(args))
            own = root == getattr(args, load_arg)
            if own and iteration not in (None, RELEASE):  # others are loaded without optimizer
                _check_experts(directory_of(Path(root), iteration), args)
            if iteration is not None and getattr(args, "fp8", None) and args.fp8_recipe == "delayed":
                _trust_fp8_state(directory_of(Path(root), iteration))
        return original(*positional, load_arg=load_arg, **kwargs)

    return load_checkpoint


def _loadable(root: Path, args: Any, full: bool) -> Iteration | None:
    """The iteration that will be loaded. Raises CheckpointError where that cannot be."""
    step = getattr(args, "ckpt_step", None)
    try:
        return check_loadable(root, step, full)
    except DamagedCheckpoint as damaged:
        # Only a run's own checkpoints, which it is free to write over.
        own = args.save is not None and os.path.realpath(args.save) == os.path.realpath(root)
        if step or not own or not getattr(args, "resume_from_last_good", False):
            raise
        return fall_back(root, damaged)


def _trust_fp8_state(directory: Path) -> None:
    """Tell Transformer Engine that it may load the scales and amax histories of a checkpoint, once they have been read.
    Raises CheckpointError where they could run code and the user has not said so already."""
    if os.environ.get(fp8_state.ALLOW) != "1":
        check_fp8_state(directory)
        os.environ[fp8_state.ALLOW] = "1"


def _check_experts(directory: Path, args: Any) -> None:
    """Megatron 0.19 keeps the state of experts that are spread over ranks in an optimizer of its own, and loads it into
    such a one only. Raises CheckpointError where it would fail half way, without a word about the reason.
    """
    now = getattr(args, "expert_model_parallel_size", 1)
    if not getattr(args, "num_experts", None) or args.no_load_optim or args.finetune:
        return
    metadata = read_metadata(directory)
    saved = read_common_state(metadata).args.get("expert_model_parallel_size") or 1
    if (saved > 1) != (now > 1) and any(is_optimizer(key) for key in metadata.tensors):
        raise CheckpointError(
            f"--expert-model-parallel-size is {now}, and the optimizer state in {directory} was saved with {saved}: "
            "Megatron loads it from 1 to 1, or from more than 1 to more than 1. Load the weights alone "
            "(--no-load-optim), or change the size."
        )
