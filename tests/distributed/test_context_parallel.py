"""Context parallelism: a sequence in pieces on several ranks trains the model that one rank trains with all of it.

Values, reports and gradients against one process, with both implementations of the loss. On a CPU the attention is ours
(`specs.SDPAttention`, which gathers keys and values); everything else, the shift of targets above all, is what runs
beside Transformer Engine's attention on a GPU.
"""

from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from megatron_mtpd.config import LossImplementation, MTPDConfig
from megatron_mtpd.losses.halo import Halo
from tests.distributed import training
from tests.distributed.gloo import run
from tests.distributed.layouts import train
from tests.distributed.test_equivalence import EXPERTS, UNEQUAL_SHARES, alone, check, check_bf16, with_loss
from tests.distributed.toy import Layout, Toy
from tests.distributed.training import SAVED, second_half

pytestmark = pytest.mark.distributed

TOYS = {
    # Megatron averages the means of ranks where tokens are not counted over the global batch: without masks the same.
    "plain": Toy(),
    "documents": Toy(documents=True, masked=True, per_token=True),
    "cross-documents": Toy(masked=True, per_token=True, mtpd=MTPDConfig.as_published(top_n=10, cross_documents=True)),
    "two-passes": Toy(mtpd=UNEQUAL_SHARES),
    "e2e-tv": Toy(mtpd=MTPDConfig.as_published(objective="e2e_tv")),
    "tied": Toy(tied=True, optimizer_steps=2, clip=0.5),
}


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize("toy", TOYS)
def test_two_ranks(toy, loss):
    check(train(Layout(cp=2), with_loss(TOYS[toy], loss)), alone(TOYS[toy]))


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize(
    "layout",
    [
        Layout(cp=4),
        Layout(cp=2, tp=2, sequence_parallel=True),
        Layout(cp=2, stages=(3, 1)),
        Layout(cp=2, dp=2, distributed_optimizer=True),
    ],
    ids=["cp4", "cp2-tp2-sp", "cp2-pp2", "cp2-dp2-sharded"],
)
def test_layouts(layout, loss):
    toy = replace(TOYS["plain"], optimizer_steps=1)
    check(train(layout, with_loss(toy, loss)), alone(toy))


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize(
    "layout", [Layout(cp=4), Layout(cp=2, tp=2, sequence_parallel=True)], ids=["cp4", "cp2-tp2-sp"]
)
def test_four_heads_and_documents(layout, loss):
    """Pieces of 8 positions, and of 4 with four ranks: the last head then sees nothing but what others sent."""
    toy = Toy(heads=4, sequence=32, documents=True, masked=True, per_token=True)
    check(train(layout, with_loss(toy, loss)), alone(toy))


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, dp=2, ep=2)], ids=["cp2", "cp2-dp2-ep2"])
def test_mixture_of_experts(layout):
    check(train(layout, EXPERTS), alone(EXPERTS))


@pytest.mark.parametrize(
    "layout", [Layout(cp=2), Layout(cp=2, tp=2, sequence_parallel=True)], ids=["cp2", "cp2-tp2-sp"]
)
def test_bf16(layout):
    check_bf16(layout)


def test_a_run_goes_on_without(tmp_path):
    """From the checkpoint of a run on two ranks of context parallelism, one rank trains what the two would have."""
    untied = "--untie-embeddings-and-output-weights"
    halves = training.run(tmp_path, 2, untied, "--context-parallel-size", "2", "--save", str(tmp_path / "checkpoints"))
    resumed = training.run(tmp_path, 1, untied, "--load", str(tmp_path / "checkpoints"), "--ckpt-step", str(SAVED))
    expected = second_half(halves)
    assert resumed.keys() == expected.keys()
    for iteration, metrics in expected.items():  # fp32, the same sums in another order
        assert resumed[iteration] == pytest.approx(metrics, rel=1e-5, abs=1e-5), iteration


def pieces_with_halo(whole: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    pieces = whole.chunk(2 * ranks)
    mine = torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])
    halo = Halo(size, group)
    return halo.extend(mine), halo.restore(halo.pad(mine)) - mine


@pytest.mark.parametrize(("ranks", "size"), [(2, 1), (2, 3), (3, 2)])
def test_a_piece_sees_what_follows_it(ranks, size):
    whole = torch.arange(1, 2 * 6 * ranks + 1).view(-1, 2)  # 2 sequences, pieces of 3 positions
    padded = torch.cat([whole, torch.zeros(size, 2, dtype=torch.int64)])
    for rank, (found, difference) in enumerate(run(pieces_with_halo, ranks, whole, size)):
        starts = (3 * rank, 3 * (2 * ranks - 1 - rank))
        assert torch.equal(found, torch.cat([padded[start : start + 3 + size] for start in starts], 1))
        assert not difference.any()


def too_long_a_halo() -> None:
    Halo(4, dist.group.WORLD).extend(torch.zeros(6, 1))


def test_pieces_shorter_than_the_heads_look_ahead_are_refused():
    with pytest.raises(AssertionError, match="context-parallel-size 2 cuts the sequence into pieces of 3"):
        run(too_long_a_halo, 2)
