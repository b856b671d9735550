"""Damage is found and named: every kind, in every file, with and without a manifest."""

import json
import random
import shutil

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_mtpd.checkpoint.integrity import MANIFEST, verify, write_manifest
from megatron_mtpd.checkpoint.metadata import read_metadata
from tests.unit.checkpoint.runs import Model, load_weights, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def saved(one_rank, tmp_path_factory):
    torch.manual_seed(0)
    model = Model(heads=2)
    return model, save_checkpoint(tmp_path_factory.mktemp("run"), model, optimizer=None)


@pytest.fixture(params=["manifest", "no manifest"])
def copy(saved, tmp_path, request):
    directory = shutil.copytree(saved[1], tmp_path / "iter_0000100")
    if request.param == "manifest":
        write_manifest(directory)
    return directory


def damaged_files(directory, **options):
    return [problem.file for problem in verify(directory, **options)]


def data_file(directory):
    return next(directory.glob("*.distcp"))


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_good_checkpoint_has_no_problems(copy):
    assert verify(copy, full=True) == verify(copy, full=False) == []


def test_a_truncated_file_is_found_without_reading_it(copy):
    with data_file(copy).open("r+b") as file:
        file.truncate(data_file(copy).stat().st_size - 1)
    assert damaged_files(copy, full=False) == damaged_files(copy, full=True) == [data_file(copy).name]


def test_a_missing_file_is_found_without_reading_the_others(copy):
    name = data_file(copy).name
    data_file(copy).unlink()
    assert [str(problem) for problem in verify(copy, full=False)] == [f"{name}: missing"]


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_an_unfinished_save_is_told_from_damage(copy, name):
    (copy / name).unlink()
    assert str(verify(copy)[0]) == f"{name}: missing: the save did not finish"


def test_a_flipped_bit_is_found_wherever_it_matters(saved, copy):
    """Sixty places at random. What the check passes over is padding, which loads as if nothing had happened, or a
    field of an archive that only torch insists on: its load fails. Nothing loads with other weights.
    """
    model, _ = saved
    path = data_file(copy)
    good, found = path.read_bytes(), 0
    for position in random.Random(0).sample(range(len(good)), 60):
        flip(path, position)
        if verify(copy):
            assert damaged_files(copy) == [path.name]
            found += 1
        else:
            try:
                loaded = load_weights(copy, model, tp=1)
            except CheckpointException:
                path.write_bytes(good)
                continue
            assert all(torch.equal(loaded[key], tensor) for key, tensor in model.tensors.items())
        path.write_bytes(good)
    assert found > 20  # the tensors here are small: half of the file is padding


def test_the_place_of_the_damage_is_named(copy):
    payload = read_metadata(copy).tensors["mtp.layers.1.eh_proj.weight"].chunks[8, 0]
    flip(copy / payload.file, payload.end - 1000)
    assert f"bytes {payload.offset:,} to {payload.end:,} are damaged" in verify(copy)[0].what


@pytest.mark.parametrize("full", [True, False])
def test_a_flipped_bit_in_the_metadata_is_found_even_by_a_quick_look(saved, tmp_path, full):
    directory = shutil.copytree(saved[1], tmp_path / "copy")
    write_manifest(directory)
    flip(directory / ".metadata", 500)
    assert damaged_files(directory, full=full) == [".metadata"]


def test_a_damaged_manifest_is_named(saved, tmp_path):
    directory = shutil.copytree(saved[1], tmp_path / "copy")
    (directory / MANIFEST).write_text('{"algorithm": "sha')
    assert damaged_files(directory) == [MANIFEST]


def test_shares_make_up_the_whole(copy):
    """Of three ranks, exactly one reads each payload, and every one has payloads to read."""
    found = []
    for payload in read_metadata(copy).archives()[::7]:
        good = (copy / payload.file).read_bytes()
        flip(copy / payload.file, payload.offset + 3)  # the signature of its archive
        found.append([rank for rank in range(3) if verify(copy, share=(rank, 3))])
        (copy / payload.file).write_bytes(good)
    assert found == sorted(found)  # consecutive parts
    assert [ranks for ranks, before in zip(found, [None, *found], strict=False) if ranks != before] == [[0], [1], [2]]


def test_files_without_checksums_are_not_called_damaged(one_rank, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        directory = save_checkpoint(tmp_path, Model(heads=1), optimizer=None)
    finally:
        torch.serialization.set_crc32_options(True)
    assert verify(directory) == []


def test_megatron_reads_our_manifest_and_we_keep_its_own(saved, tmp_path):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import save_integrity_manifest, verify_integrity_manifest

    directory = shutil.copytree(saved[1], tmp_path / "copy")
    write_manifest(directory)
    verify_integrity_manifest(str(directory))
    flip(directory / ".metadata", 500)
    with pytest.raises(CheckpointingException, match=r"\.metadata: hash mismatch"):
        verify_integrity_manifest(str(directory))
    flip(directory / ".metadata", 500)

    save_integrity_manifest(str(directory))
    digests = json.loads((directory / MANIFEST).read_text())["files"]
    write_manifest(directory)
    assert json.loads((directory / MANIFEST).read_text())["files"] == digests
    assert data_file(directory).name in digests
    verify_integrity_manifest(str(directory))
