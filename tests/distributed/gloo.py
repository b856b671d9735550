"""`run`: a plain function on N gloo ranks of this machine, from a test.

    def sum_of_ranks(offset):                            # at module level: it travels by name
        x = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(x)
        return x.item()

    def test_sum():
        assert run(sum_of_ranks, 2, 10) == [21.0, 21.0]  # one result a rank

Contract: each call has fresh processes of one thread each, with `torch.distributed` initialised; nothing
that a rank does is seen by another test. An exception in a rank, its death or the time limit ends all ranks
and raises `RankError`, with the traceback of the first rank that failed, or of where each one hangs.
Arguments and results are pickled. A bare `assert` in a rank shows no values: return what is to be compared,
or use `torch.testing.assert_close`.

How: importing torch takes seconds, so one clean process imports the test modules and forks the ranks.
Therefore a module with such functions must do no work at its import: threads do not survive a fork.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

IMPORTS_MAY_TAKE = 180.0  # seconds, of torch, Megatron and the test module on a busy machine


class RankError(AssertionError):
    """A rank raised, died or was too late. The message holds its traceback."""


def run(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """`[function(*args, **kwargs) on rank 0, on rank 1, ...]`, within `timeout` seconds, imports not counted.

    Raises RankError as said above, TypeError for what cannot be pickled.
    """
    try:
        request = pickle.dumps((function, args, kwargs, ranks, timeout))
    except (pickle.PicklingError, AttributeError) as error:
        raise TypeError(f"{function!r} or its arguments cannot be sent to the ranks: {error}") from error
    try:
        server = _start_server()
        server.send_bytes(request)
        if not server.poll(timeout + IMPORTS_MAY_TAKE):
            raise RankError(f"{function.__module__} was not imported within {IMPORTS_MAY_TAKE:.0f} s.")
        error, results = pickle.loads(server.recv_bytes())
    except (EOFError, OSError):
        _stop_server()
        raise RankError("The process that forks the ranks died; its output is above.") from None
    except BaseException:  # also Ctrl-C: its late answer must not be taken for that of the next test
        _stop_server()
        raise
    if error:
        raise RankError(error)
    return results


_server: tuple[BaseProcess, Connection] | None = None


def _start_server() -> Connection:
    global _server
    if _server is not None and not _server[0].is_alive():
        _stop_server()  # it ended between two calls: whatever ended it is not this call's
    if _server is None:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,))
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is loaded
            process.start()
        theirs.close()
        _server = process, ours
    return _server[1]


@atexit.register
def _stop_server() -> None:
    global _server
    if _server is not None:
        (process, connection), _server = _server, None
        connection.close()
        process.kill()
        process.join()


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            answer = _fork_ranks(*pickle.loads(request))  # loading imports the function's module
        except Exception:
            answer = traceback.format_exc(), None
        connection.send_bytes(pickle.dumps(answer))


def _fork_ranks(function: Callable, args: tuple, kwargs: dict, ranks: int, timeout: float) -> tuple[str, Any]:
    """Wait for all ranks or for the first failure, and leave none alive: (error, results)."""
    processes: list[BaseProcess] = []
    pending: dict[Connection, int] = {}
    results: list[Any] = [None] * ranks
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                ours, theirs = multiprocessing.Pipe(duplex=False)
                job = (theirs, folder, rank, ranks, timeout, function, args, kwargs)
                processes.append(multiprocessing.get_context("fork").Process(target=_rank, args=job))
                processes[-1].start()
                theirs.close()
                pending[ours] = rank
            deadline = time.monotonic() + timeout
            while pending:
                ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
                if not ready:
                    stacks = "".join(_stack(folder, rank, processes[rank]) for rank in pending.values())
                    return (
                        f"{len(pending)} of {ranks} ranks did not end within {timeout:.0f} s.\n{stacks}",
                        None,
                    )
                for connection in ready:
                    rank = pending.pop(connection)  # type: ignore[arg-type]  # no sockets or handles were given
                    try:
                        error, results[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    except EOFError:
                        processes[rank].join()
                        return _deaths(processes), None
                    if error:
                        return f"{_deaths(processes)}rank {rank} of {ranks} raised:\n{error}", None
            return "", results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _deaths(processes: list[BaseProcess]) -> str:
    """Of ranks that ended, where each should wait to be killed: the cause of what the other ranks raise."""
    deaths = ""
    ended = wait([process.sentinel for process in processes], 0.5)
    for rank, process in enumerate(processes):
        if process.sentinel in ended:
            process.join()
            deaths += f"rank {rank} of {len(processes)} died, exit code {process.exitcode}.\n"
    return deaths


def _stack(folder: str, rank: int, process: BaseProcess) -> str:
    os.kill(process.pid or 0, signal.SIGUSR1)
    time.sleep(0.1)  # the handler is C code: it writes at once, whatever the rank waits for
    return f"rank {rank} is here:\n{Path(folder, f'stack{rank}').read_text()}"


def _rank(answer: Connection, folder: str, rank: int, ranks: int, timeout: float, function, args, kwargs) -> None:
    parent = os.getppid()
    with open(f"{folder}/stack{rank}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
        if "lo" in dict(socket.if_nameindex()).values():
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host name up: slow where it works
        try:
            store, limit = dist.FileStore(f"{folder}/store", ranks), timedelta(seconds=timeout + 10)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
            result = pickle.dumps(("", function(*args, **kwargs)))
        except BaseException:
            result = pickle.dumps((traceback.format_exc(), None))
        answer.send_bytes(result)
        # Stay until killed: a closed socket would make other ranks fail, and hide who failed first.
        while os.getppid() == parent:
            time.sleep(1.0)
