"""slurm/explain.py on logs as ranks write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXPLAIN = Path(__file__).resolve().parents[2] / "slurm" / "explain.py"


def traceback(rank: int, error: str, file: str = "train.py") -> str:
    lines = ["Traceback (most recent call last):", f'  File "{file}", line 7, in step', "    go()", error]
    return "".join(f"{rank}: [rank{rank}]: {line}\n" for line in lines)


def stack(rank: int, function: str) -> str:
    lines = ["Thread 0x00007f (most recent call first):", '  File "threading.py", line 3 in wait', ""]
    lines += ["Current thread 0x00007e (most recent call first):", f'  File "work.py", line 9 in {function}']
    return "".join(f"{rank}: {line}\n" for line in [*lines, '  File "train.py", line 7 in step', ""])


@pytest.fixture
def explained(tmp_path: Path):
    """What it prints about a log of 8 ranks on 4 nodes."""

    def explain(log: str) -> str:
        file = tmp_path / "log"
        file.write_text(log)
        options = ["--ranks-per-node", "2", "--nodes", "node1,node2,node3,node4"]
        done = subprocess.run([sys.executable, EXPLAIN, file, *options], capture_output=True, text=True)
        assert (done.stderr, done.returncode) == ("", 0 if done.stdout.strip() else 1)
        return done.stdout

    return explain


CLOSED = "RuntimeError: Connection closed by peer [10.0.0.2]:1"
TIMED_OUT = "RuntimeError: Timed out waiting 1000ms for recv operation to complete"


def test_the_rank_that_raised_is_named_even_when_it_is_read_last(explained) -> None:
    text = explained("0: fine\n" + traceback(0, CLOSED) + traceback(3, "ValueError: bad sample") + stack(1, "wait"))
    assert text.startswith("Rank 3 on node2 failed first: ValueError: bad sample\n")
    assert 'File "train.py", line 7, in step' in text
    assert "work.py" not in text


def test_the_rank_that_hangs_is_the_one_that_is_like_no_other(explained) -> None:
    waiting = "".join(stack(rank, "all_reduce") for rank in (1, 2, 3, 4))
    text = explained(traceback(0, TIMED_OUT) + waiting + stack(5, "read_forever"))
    assert text.startswith("Rank 0 on node1 failed first: RuntimeError: Timed out")
    first = text.index('Rank 5 on node3 was here when the step was ended:\n  File "work.py", line 9 in read_forever')
    assert first < text.index("Rank 1 on node1, 2 on node2, 3 on node2, 4 on node3 was here")
    assert "threading.py" not in text, "only the main thread is shown"


def test_ranks_that_nccl_aborts_leave_stacks_and_no_traceback(explained) -> None:
    """Its watchdog ends them by SIGABRT, which Python's fault handler answers with the stacks."""
    aborted = "".join(f"{rank}: Fatal Python error: Aborted\n{rank}: \n" + stack(rank, "step") for rank in (0, 2, 3))
    text = explained(aborted + stack(1, "read_forever"))
    assert text.startswith(
        'Rank 1 on node1 was here when the step was ended:\n  File "work.py", line 9 in read_forever'
    )


def test_of_several_tracebacks_of_a_rank_the_last_counts(explained) -> None:
    text = explained(traceback(0, "KeyError: 'a'") + traceback(0, "ValueError: because of a"))
    assert text.startswith("Rank 0 on node1 failed first: ValueError: because of a")


def test_a_log_that_says_nothing_explains_nothing(explained) -> None:
    assert explained("0: pretrain_mtpd.py: error: --lr\n  not a label: 1\n").strip() == ""
