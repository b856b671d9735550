"""Training runs that are resumed, resharded and extended, in any order, give the weights of the shortest way there.

Every session is the real entry, from flags to checkpoint, on forked ranks. The shortest way takes one process, and
stops only where heads are added: so it is never resumed, and never resharded.
"""

import contextlib
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import head_of, is_optimizer, read_metadata
from megatron_mtpd.training import pretrain
from tests.distributed import gloo
from tests.distributed.saving import saves_may_run

pytestmark = pytest.mark.distributed

STEPS = 2  # of a session
FLAGS = """
--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
--attention-dropout 0 --hidden-dropout 0 --seq-length 8 --max-position-embeddings 8 --mtpd-top-n 100
--mock-data --tokenizer-type NullTokenizer --vocab-size 62 --make-vocab-size-divisible-by 32 --num-workers 0
--micro-batch-size 1 --global-batch-size 2 --train-iters 100 --lr 0.1 --lr-decay-style constant --adam-eps 0.1
--mtpd-distill-start 0 --use-distributed-optimizer
--eval-iters 0 --eval-interval 1000 --log-interval 100 --save-interval 1000
--use-cpu-initialization
"""
# Adam divides by the size of a gradient: with its own eps, rounding errors of tiny gradients would be whole steps.
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
}


@dataclass(frozen=True)
class State:
    """A checkpoint, and what the next session has to know of it."""

    root: Path
    heads: int = 1
    iteration: int = 0
    flags: tuple[str, ...] = ()


def session(argv: list[str]) -> None:
    """On a rank: train as the command line says."""
    torch._dynamo.config.disable = True  # compiling takes longer than all else
    with saves_may_run(), contextlib.suppress(SystemExit):  # --exit-interval ends so
        pretrain.main(argv)


def train(state: State, steps: int, layout: str, target: Path) -> State:
    ranks, parallel = LAYOUTS[layout]
    end = state.iteration + steps
    argv = [*FLAGS.split(), *parallel, *state.flags, "--mtp-num-layers", str(state.heads), "--exit-interval", str(end)]
    argv += ["--save", str(target), *(["--load", str(state.root)] if state.root.exists() else [])]
    gloo.run(session, ranks, argv, timeout=180.0)
    assert resolve(target)[0] == end
    return replace(state, root=target, iteration=end)


def grow(state: State, heads: int, keep: bool, only_new: bool, target: Path) -> State:
    extend(make_plan(state.root, heads, keep_optimizer=keep), target)
    flags = ("--mtpd-train", "new-heads") if only_new and heads > state.heads and not keep else ()
    return State(target, heads, state.iteration if keep else 0, flags)


def weights(state: State) -> dict[str, torch.Tensor]:
    metadata = read_metadata(resolve(state.root)[1])
    tensors = {
        key: torch.full(tensor.shape, math.nan) for key, tensor in metadata.tensors.items() if not is_optimizer(key)
    }
    checkpoint.load(tensors, storage_reader=checkpoint.FileSystemReader(metadata.directory), no_dist=True)
    return tensors


SESSION = st.sampled_from(list(LAYOUTS))
GROWTH = st.tuples(st.integers(2, 4), st.booleans(), st.booleans())


@settings(max_examples=1, deadline=None, derandomize=True, database=None)
@given(st.lists(SESSION | GROWTH, min_size=2, max_size=3))
@example(["pp2", (3, True, False), "tp2", "one"])  # its optimizer state kept: the run goes on
@example(["tp2", "dp2", (2, False, True), "pp2", "tp2"])  # the new head alone, resumed elsewhere
def test_any_order_gives_the_same_weights(operations):
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        start = State(folder / "none")
        long = train(start, STEPS, "one", folder / "long")
        short, pending = start, STEPS
        for number, operation in enumerate(operations):
            target = folder / f"long{number}"
            if isinstance(operation, str):
                long = train(long, STEPS, operation, target)
                pending += STEPS
                continue
            heads, keep, only_new = operation
            keep = keep and not long.flags and long.iteration > 0  # frozen heads have no optimizer state to keep
            if pending:
                short = train(short, pending, "one", folder / f"short{number}")
            before = weights(long)
            old, pending = long.heads, 0
            long = grow(long, heads, keep, only_new, target)
            short = grow(short, heads, keep, only_new, folder / f"short-grown{number}")
            for key, value in weights(long).items():
                head = head_of(key)
                source = key if head is None else key.replace(f"layers.{head}.", f"layers.{head % old}.", 1)
                assert torch.equal(value, before[source]), key
        if pending:
            short = train(short, pending, "one", folder / "short-last")
        expected, found = weights(short), weights(long)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            # Sums in another order, through up to ten steps.
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )
