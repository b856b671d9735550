"""What a run finds when it comes back: after saves that were cut short, damage, and both."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mtpd.checkpoint.integrity import MANIFEST, write_manifest
from megatron_mtpd.checkpoint.iterations import (
    TRACKER,
    check_loadable,
    list_checkpoints,
    read_tracker,
    resolve,
    write_tracker,
)
from megatron_mtpd.checkpoint.metadata import CheckpointError
from tests.unit.checkpoint.runs import Model, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def template(one_rank, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    for iteration in (100, 200, 300):
        write_manifest(save_checkpoint(root, Model(heads=1), iteration, optimizer=None))
    return root


@pytest.fixture
def root(template, tmp_path):
    return shutil.copytree(template, tmp_path / "run")


def data_file(root, iteration):
    return next((root / f"iter_{iteration:07d}").glob("*.distcp"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


def states(root):
    return [(saved.iteration, saved.state) for saved in list_checkpoints(root)]


def test_a_good_run(root):
    assert states(root) == [(100, "complete"), (200, "complete"), (300, "complete")]
    assert check_loadable(root) == 300
    assert check_loadable(root, 100) == 100
    assert resolve(root) == (300, root / "iter_0000300")
    assert resolve(root / "iter_0000200") == (None, root / "iter_0000200")


def test_nothing_to_load(tmp_path):
    assert check_loadable(tmp_path) is None
    assert check_loadable(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve(tmp_path)


# In the order in which a save makes them: at a kill there are the first n of them.
WRITTEN = ("__0_0.distcp", ".metadata", "metadata.json", MANIFEST, TRACKER)


@pytest.mark.parametrize("count", range(len(WRITTEN) + 1))
@pytest.mark.parametrize("partial", [False, True])
def test_a_save_cut_short_anywhere_leaves_the_last_good_one(root, caplog, count, partial):
    """With the file after the last one missing, or there in part."""
    directory = root / "iter_0000300"
    for number, name in enumerate(WRITTEN[:-1]):
        if number == count and partial and name in WRITTEN[:1]:  # all others appear whole
            (directory / name).write_bytes((directory / name).read_bytes()[:1000])
        elif number >= count:
            (directory / name).unlink()
    if count < len(WRITTEN):
        write_tracker(root, 200)
    with caplog.at_level(logging.WARNING):
        assert check_loadable(root) == (300 if count == len(WRITTEN) else 200)
    passed_over = f"Passing over {directory}, which is incomplete: "
    assert (passed_over in caplog.text) == (count < 3)  # from metadata.json on it is a checkpoint, if not the latest
    assert dict(states(root))[300] == ("incomplete" if count < 3 else "complete")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_named_with_the_way_out(root, damage):
    path = data_file(root, 300)
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        check_loadable(root)
    assert str(error.value).startswith(f"Cannot load {path}: ")
    assert str(error.value).endswith("The last good one before it is iteration 200: load it with --ckpt-step 200.")
    assert check_loadable(root, 200) == 200


def test_the_way_out_is_itself_good(root):
    flip(data_file(root, 300))
    flip(data_file(root, 200))
    with pytest.raises(CheckpointError, match=r"iteration 100: load it with --ckpt-step 100\.$"):
        check_loadable(root)
    data_file(root, 100).unlink()
    with pytest.raises(CheckpointError, match="There is no good checkpoint before it"):
        check_loadable(root)


def test_a_quick_look_reads_no_data(root):
    flip(data_file(root, 300))
    assert check_loadable(root, full=False) == 300


def test_an_iteration_that_is_not_there(root):
    with pytest.raises(CheckpointError, match=r"run/iter_0000250: no such directory.* --ckpt-step 200"):
        check_loadable(root, 250)
    with pytest.raises(CheckpointError, match=r"Iterations in .*: 100, 200, 300"):
        resolve(root, 250)


@pytest.mark.parametrize("text", ["", "3o0", "-1"])
def test_a_tracker_that_was_cut_short(root, text):
    (root / TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{TRACKER} says '{text}'.* Write 300 into it"):
        check_loadable(root)


def test_release_checkpoints(root):
    (root / "iter_0000100").rename(root / "release")
    write_tracker(root, "release")
    assert read_tracker(root) == check_loadable(root) == "release"
    assert resolve(root) == ("release", root / "release")
    assert states(root)[0] == ("release", "complete")


def check_on_two_ranks(rank: int, roots: list[Path], answers: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(answers / "store"), 2), rank=rank, world_size=2
    )
    said = []
    for root in roots:
        try:
            said.append(str(check_loadable(root)))
        except CheckpointError as error:
            said.append(str(error))
    (answers / str(rank)).write_text("\n".join(said))
    torch.distributed.destroy_process_group()


def test_ranks_agree(template, root, tmp_path):
    """Each reads half: damage in one half stops both, with the same words."""
    flip(data_file(root, 300))
    torch.multiprocessing.spawn(check_on_two_ranks, ([template, root], tmp_path), nprocs=2)
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second
    good, bad = first.splitlines()
    assert good == "300"
    assert bad.startswith(f"Cannot load {data_file(root, 300)}: ") and bad.endswith("--ckpt-step 200.")
