"""One rank of a Slurm step: `srun ... python slurm/rank.py TOOL ARGUMENTS...` runs a Python tool in this process.

It tells torch which rank this is, by the names of Slurm's that Megatron and torch agree on, and sees to signals:

- USR1 (save and exit) reaches this process alone. Slurm may send it to every process of a step, and the helpers that
  ranks start (checkpoint writers, data workers) would die of it. A blocked signal is inherited as blocked, so it is
  blocked everywhere but in one thread of this process. It is ignored until the tool has a handler, and from its end on.
- TERM (the step is ended, because another rank failed or for good) prints the stack of every thread, then kills. The
  stack of a rank that hangs is the only trace it leaves.

Deliberately absent: starting processes (srun does that) and choosing the address (slurm/entry.sh does that).
"""

import faulthandler
import os
import runpy
import signal
import sys
import threading


def receive(sig: signal.Signals) -> None:
    """Stay awake for one signal that all other threads, and processes that they start, have blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {sig})
    threading.Event().wait()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    threading.Thread(target=receive, args=(signal.SIGUSR1,), daemon=True, name="signals").start()
    faulthandler.register(signal.SIGTERM, chain=True)

    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["MTPD_RANKS_PER_NODE"]
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as if Python had been given the tool
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:  # Python would restore what the signal does by default: kill
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
