"""Saving checkpoints on the forked ranks of `gloo.run`, without leaving a process behind."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def saves_may_run() -> Iterator[None]:
    """Around Megatron's saves on a rank: its queue belongs to a process that it spawns, and that outlives the rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with multiprocessing.get_context("fork").Manager() as manager:
        filesystem_async._results_queue = manager.Queue()
        yield
        filesystem_async._results_queue = None
