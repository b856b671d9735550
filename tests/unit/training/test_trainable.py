"""`--mtpd-old-heads`: what a checkpoint that was extended says, where the flag is left out."""

from argparse import Namespace

import pytest

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.training.trainable import settle_old_heads
from tests.unit.checkpoint.sparse import HEADS, make_sparse_checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints with 4 heads, and extended to 8."""
    folder = tmp_path_factory.mktemp("runs")
    make_sparse_checkpoint(folder / "trained")
    extend(make_plan(folder / "trained", 8), folder / "extended")
    return folder


def settled(**values):
    args = Namespace(**{"load": None, "pretrained_checkpoint": None, "ckpt_step": None} | values)
    settle_old_heads(args)
    return args.mtpd_old_heads


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint"])
def test_the_checkpoint_says_how_many_there_are(runs, flag):
    assert settled(mtpd_train="new-heads", mtpd_old_heads=0, **{flag: str(runs / "extended")}) == HEADS


def test_megatrons_order_of_checkpoints(runs):
    roots = {"load": str(runs / "nothing"), "pretrained_checkpoint": str(runs / "extended")}
    assert settled(mtpd_train="new-heads", mtpd_old_heads=0, **roots) == HEADS
    assert settled(mtpd_train="new-heads", mtpd_old_heads=0, **roots | {"load": str(runs / "trained")}) == 0


@pytest.mark.parametrize(
    ("train", "given", "root"),
    [
        ("all", 0, "extended"),
        ("heads", 0, "extended"),
        ("new-heads", 2, "extended"),  # heads 3 and 4 go on learning
        ("new-heads", 4, "extended"),
        ("new-heads", 6, "trained"),  # it says nothing
        ("new-heads", 0, "trained"),  # refused later, as without a checkpoint
        ("new-heads", 0, "nothing"),
    ],
)
def test_otherwise_the_flag_stays_as_it_is(runs, train, given, root):
    assert settled(mtpd_train=train, mtpd_old_heads=given, load=str(runs / root)) == given


def test_copies_are_not_frozen_by_mistake(runs):
    with pytest.raises(ValueError, match=r"--mtpd-old-heads is 6, .* extended from 4 heads: head 5 would stay"):
        settled(mtpd_train="new-heads", mtpd_old_heads=6, load=str(runs / "extended"))
