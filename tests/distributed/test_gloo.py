"""The helper itself: results, failures in every form, and nothing left behind."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import gloo
from tests.distributed.gloo import RankError, run

pytestmark = pytest.mark.distributed


def collect(x, scale=1):
    total = x + dist.get_rank()
    dist.all_reduce(total)
    return total * scale, dist.get_world_size(), torch.get_num_threads(), os.environ["RANK"], os.getpid()


def fail_on_last(value):
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError(value)
    dist.barrier()  # never completed


def die_on_first():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def hang_on_first():
    if dist.get_rank() == 0:
        time.sleep(1000)


def unpicklable():
    return lambda: None


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_results_come_back_by_rank(ranks):
    results = run(collect, ranks, torch.tensor([1.0, 2.0]), scale=10)
    expected = 10 * (ranks * torch.tensor([1.0, 2.0]) + sum(range(ranks)))
    for rank, (total, size, threads, env_rank, _pid) in enumerate(results):
        assert torch.equal(total, expected)
        assert (size, threads, env_rank) == (ranks, 1, str(rank))
    pids = {pid for *_, pid in results}
    assert len(pids) == ranks and not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_the_traceback_of_the_rank_that_raised():
    with pytest.raises(RankError, match=r"(?s)rank 3 of 4 raised:.*in fail_on_last\n.*KeyError: 'the reason'"):
        run(fail_on_last, 4, "the reason")


def test_a_dead_rank():
    with pytest.raises(RankError, match="rank 0 of 2 died, exit code 7"):
        run(die_on_first, 2)


def test_a_hanging_rank_ends_at_the_time_limit_and_shows_where_it_is():
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)1 of 2 ranks did not end within 1 s.*rank 0 is here.*in hang_on_first"):
        run(hang_on_first, 2, timeout=1.0)
    assert time.monotonic() - start < 15  # the limit, plus what a busy machine takes to notice


def test_what_cannot_travel_is_named():
    with pytest.raises(TypeError, match="lambda"):
        run(lambda: None, 2)
    with pytest.raises(RankError, match=r"(?s)rank . of 2 raised.*unpicklable"):
        run(unpicklable, 2)


def test_a_new_server_after_its_death():
    run(collect, 1, torch.zeros(1))
    assert gloo._server is not None
    gloo._server[0].kill()
    with pytest.raises(RankError, match="died"):
        run(collect, 2, torch.zeros(1))
    assert len(run(collect, 2, torch.zeros(1))) == 2
