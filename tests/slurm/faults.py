"""tools/pretrain_mtpd.py with a mishap, for the jobs of these tests: FAULT=what:rank:iteration in the environment.

raise   the rank raises
hang    the rank stops in the middle of its forward pass; collectives time out after COLLECTIVES_WAIT seconds
pause   the rank waits, until the signal to save and exit comes or somebody ends it; the file PAUSED says that it does

Only the first start of a job has the mishap, unless the what ends in "!".
"""

import os
import sys
import time
from pathlib import Path

from megatron_mtpd.training import pretrain  # here, as in the tool: a spawned checkpoint writer imports this file

COLLECTIVES_WAIT = 60


def parse(argv):
    args = original_parse(argv)
    if what == "hang":
        args.distributed_timeout_minutes = COLLECTIVES_WAIT / 60
    return args


def forward_step(*args, **kwargs):
    from megatron.training import get_args

    if os.environ["RANK"] == rank and get_args().curr_iteration + 1 == int(iteration):
        {"raise": out_of_order, "hang": stuck, "pause": pause}[what]()
    return original_forward_step(*args, **kwargs)


def out_of_order():
    raise RuntimeError("This GPU is out of order.")


def stuck():
    time.sleep(1000)


def pause():
    from megatron.training import get_signal_handler

    Path(os.environ["PAUSED"]).touch()
    while not get_signal_handler()._signal_received:
        time.sleep(0.1)


if __name__ == "__main__":
    what, rank, iteration = os.environ["FAULT"].split(":")
    if what.endswith("!") or "SLURM_RESTART_COUNT" not in os.environ:
        what = what.removesuffix("!")
        original_parse, pretrain.parse = pretrain.parse, parse
        original_forward_step, pretrain.forward_step = pretrain.forward_step, forward_step
    pretrain.main(sys.argv[1:])
