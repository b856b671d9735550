"""Megatron's own saving and loading with our wrappers around it, killed and out of space."""

import argparse
import inspect
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_mtpd.checkpoint import seam
from megatron_mtpd.checkpoint.integrity import MANIFEST, verify
from megatron_mtpd.checkpoint.iterations import TRACKER, check_loadable, read_tracker
from megatron_mtpd.checkpoint.metadata import CheckpointError
from tests.unit.checkpoint.runs import Model, load_weights, megatrons_save, save_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture
def save(one_rank):
    return seam.saves_whole(megatrons_save())


def test_megatron_has_what_the_wrappers_expect(one_rank):
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing, training

    assert list(inspect.signature(dist_checkpointing.save).parameters)[:2] == ["sharded_state_dict", "checkpoint_dir"]
    assert "dist_checkpointing.save(" in inspect.getsource(checkpointing.save_checkpoint)
    assert "maybe_msc.open(tracker_filename, 'w')" in inspect.getsource(checkpointing.save_checkpoint)
    assert inspect.signature(training.load_checkpoint).parameters["load_arg"].default == "load"


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_save_ends_with_a_manifest(save, tmp_path):
    directory = save_checkpoint(tmp_path, Model(), saver=save)
    assert set(json.loads((directory / MANIFEST).read_text())["sizes"]) == {p.name for p in directory.iterdir()} - {
        MANIFEST
    }
    assert verify(directory) == []


def test_an_asynchronous_save_ends_with_a_manifest_too(save, tmp_path):
    requests = []

    def scheduled(state, directory):
        requests.append(save(state, directory, async_sharded_save=True, async_strategy="mcore"))

    directory = save_checkpoint(tmp_path, Model(), saver=scheduled)
    assert not (directory / MANIFEST).exists()
    requests[0].execute_sync()
    assert (directory / MANIFEST).exists()
    assert verify(directory) == []


def test_saving_again_does_not_touch_the_bytes_that_an_extended_checkpoint_shares(save, tmp_path):
    old, new = Model(), Model()
    directory = save_checkpoint(tmp_path / "run", old, saver=save)
    extended = tmp_path / "extended"
    extended.mkdir()
    for file in directory.iterdir():
        (extended / file.name).hardlink_to(file)
    save_checkpoint(tmp_path / "run", new, saver=save)
    for where, model in ((extended, old), (directory, new)):
        assert verify(where) == []
        loaded = load_weights(where, model, tp=1)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.tensors.items())


def test_leftovers_of_a_larger_run_do_not_stay(save, tmp_path):
    directory = save_checkpoint(tmp_path, Model(), saver=save)
    for name in ("__7_0.distcp", ".metadata.tmp", "integrity.json.partial"):
        (directory / name).write_bytes(b"old")
    (directory / "train_dataloader_dprank000.pt").write_bytes(b"kept")  # written before the save begins
    save_checkpoint(tmp_path, Model(), saver=save)
    assert sorted(p.name for p in directory.iterdir()) == sorted(
        [".metadata", "__0_0.distcp", MANIFEST, "metadata.json", "train_dataloader_dprank000.pt"]
    )


def test_the_failure_of_a_save_says_what_it_means(one_rank, tmp_path):
    def full_disk(state, directory):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as error:
        save_checkpoint(tmp_path, Model(), saver=seam.saves_whole(full_disk))
    assert "GB free. The checkpoints before it are untouched" in error.value.__notes__[0]


# A process that saves one iteration after the other, as Megatron does, forked from one that has imported Megatron.
INTERRUPTED = """
    import os, random, resource, signal, sys, time
    from pathlib import Path
    from megatron_mtpd import platform
    platform.setup()
    import torch
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
    from megatron_mtpd.checkpoint import seam
    from tests.unit.checkpoint.runs import Model, megatrons_save, save_checkpoint

    def run(root, full_at=None):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model = Model()
        for iteration in range(1, 1000):
            if iteration == full_at:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            save_checkpoint(root, model, iteration, saver=seam.saves_whole(megatrons_save()))

    def forked(function, *arguments):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                function(*arguments)
            finally:
                os._exit(1)
        return child

    get_write_results_queue()  # a process of its own, which those that are killed would leave behind
    where = Path(sys.argv[1])
    for number in range(12):
        root = where / f"killed-{number}"
        child = forked(run, root)
        while not (root / "latest_checkpointed_iteration.txt").exists():
            time.sleep(0.001)
        time.sleep(random.Random(number).uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.waitpid(forked(run, where / "full", 3), 0)
"""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Twelve runs killed at moments that differ by milliseconds, and one whose third save finds no space."""
    where = tmp_path_factory.mktemp("interrupted")
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(where)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return where


def test_a_killed_save_leaves_the_last_good_checkpoint(interrupted):
    roots = list(interrupted.glob("killed-*"))
    assert len(roots) == 12
    for root in roots:
        assert check_loadable(root) == read_tracker(root)
        assert read_tracker(root) in range(1, 1000)


def test_a_full_disk_leaves_the_last_good_checkpoint(interrupted, caplog):
    root = interrupted / "full"
    assert check_loadable(root) == 2
    assert f"Passing over {root / 'iter_0000003'}, which is incomplete" in caplog.text


# --- the tracker ----------------------------------------------------------------------------------------------------


def test_a_tracker_changes_at_once(tmp_path):
    from megatron.core.msc_utils import maybe_msc

    storage, tracker = seam.replaces_trackers(maybe_msc), tmp_path / TRACKER
    with storage.open(str(tracker), "w") as file:
        file.write("100")
        assert not tracker.exists()
    with storage.open(str(tracker), "w") as file:
        file.write("200")
        assert tracker.read_text() == "100"
    assert tracker.read_text() == "200"
    with pytest.raises(KeyboardInterrupt), storage.open(str(tracker), "w"):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == [TRACKER]
    assert tracker.read_text() == "200"


def test_other_files_are_megatrons_business(tmp_path):
    from megatron.core.msc_utils import maybe_msc

    storage = seam.replaces_trackers(maybe_msc)
    with storage.open(tmp_path / "log", "w") as file:
        file.write("x")
    with storage.open(tmp_path / "log") as file:
        assert file.read() == "x"
    assert storage.os.path.exists(tmp_path / "log")
    assert storage.path_isdir(tmp_path)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loading(save, tmp_path):
    """Our wrapper around a load_checkpoint that says what it was called with, and the arguments that it sees."""
    for iteration in (100, 200):
        save_checkpoint(tmp_path / "run", Model(heads=1), iteration, saver=save)
    root = str(tmp_path / "run")
    arguments = argparse.Namespace(load=root, save=None, ckpt_step=None, ckpt_format="torch_dist")

    def load_checkpoint(model, load_arg="load", strict=True):
        return model, load_arg, strict

    return seam.loads_checked(load_checkpoint, lambda: arguments), arguments


def damage(arguments):
    path = next(Path(arguments.load, "iter_0000200").glob("*.distcp"))
    path.write_bytes(b"x" + path.read_bytes()[1:])


def test_a_good_checkpoint_is_loaded_as_ever(loading):
    load, arguments = loading
    assert load("model", strict=False) == ("model", "load", False)
    arguments.load = None
    assert load("model") == ("model", "load", True)


def test_a_damaged_checkpoint_is_not_loaded(loading):
    load, arguments = loading
    damage(arguments)
    with pytest.raises(CheckpointError, match=r"iter_0000200/__0_0\.distcp: .* --ckpt-step 100"):
        load("model")
    arguments.ckpt_step = 100
    assert load("model")[0] == "model"


def test_a_run_goes_on_from_its_last_good_checkpoint_where_that_was_asked_for(loading, tmp_path, caplog):
    load, arguments = loading
    damage(arguments)
    arguments.resume_from_last_good = True
    for changes in ({}, {"save": str(tmp_path / "other")}, {"save": arguments.load, "ckpt_step": 200}):
        vars(arguments).update(changes)  # another run's, or what was asked for by number
        with pytest.raises(CheckpointError, match="--ckpt-step 100"):
            load("model")
    arguments.ckpt_step = None
    assert read_tracker(Path(arguments.load)) == 200
    with caplog.at_level(logging.WARNING):
        assert load("model")[0] == "model"
    assert read_tracker(Path(arguments.load)) == 100
    assert "iter_0000200/__0_0.distcp: " in caplog.text
    assert caplog.text.endswith(" Resuming from iteration 100.\n")


def test_without_a_good_checkpoint_there_is_nothing_to_go_on_from(loading):
    load, arguments = loading
    damage(arguments)
    shutil.rmtree(Path(arguments.load, "iter_0000100"))
    arguments.save, arguments.resume_from_last_good = arguments.load, True
    with pytest.raises(CheckpointError, match="There is no good checkpoint before it"):
        load("model")
    assert read_tracker(Path(arguments.load)) == 200


def test_a_pretrained_checkpoint_is_checked_where_there_is_no_other(loading, tmp_path):
    load, arguments = loading
    damage(arguments)
    arguments.pretrained_checkpoint, arguments.load = arguments.load, str(tmp_path / "new")
    with pytest.raises(CheckpointError, match="iter_0000200"):
        load("model")


@pytest.mark.parametrize("changes", [{"ckpt_format": "torch"}, {"load": "msc://bucket/run"}])
def test_other_formats_are_megatrons_business(loading, changes):
    load, arguments = loading
    damage(arguments)
    vars(arguments).update(changes)
    assert load("model")[0] == "model"


def test_reading_every_byte_can_be_turned_off(loading):
    _, arguments = loading
    damage(arguments)
    load = seam.loads_checked(lambda model, load_arg: model, lambda: arguments, full=lambda args: False)
    assert load("model") == "model"


@pytest.mark.parametrize(
    ("now", "changes", "refused"),
    [
        (1, {}, True),
        (2, {}, False),
        (4, {}, False),
        (1, {"no_load_optim": True}, False),
        (1, {"finetune": True}, False),
    ],
)
def test_optimizer_state_of_spread_experts_is_refused_with_the_way_out(save, tmp_path, now, changes, refused):
    """As measured with megatron-core 0.19.2: from 2 to 1 it raises KeyError; the weights alone it loads."""
    save_checkpoint(tmp_path / "run", Model(heads=1), saver=save, expert_model_parallel_size=2)
    arguments = argparse.Namespace(
        **{"load": str(tmp_path / "run"), "ckpt_step": None, "ckpt_format": "torch_dist", "num_experts": 8}
        | {"no_load_optim": None, "finetune": False, "expert_model_parallel_size": now}
        | changes
    )
    load = seam.loads_checked(lambda model, load_arg: model, lambda: arguments)
    if refused:
        with pytest.raises(
            CheckpointError, match=r"--expert-model-parallel-size is 1, .* saved with 2: .*--no-load-optim"
        ):
            load("model")
    else:
        assert load("model") == "model"
