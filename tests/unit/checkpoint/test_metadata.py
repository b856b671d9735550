"""The typed view of `.metadata` and of the stored arguments, against Megatron's and torch's own readers."""

import pickle
import shutil
import zipfile

import pytest
import torch

from megatron_mtpd.checkpoint.common_state import KEY, LEGACY_FILE, read_common_state, read_payload
from megatron_mtpd.checkpoint.metadata import (
    CheckpointError,
    head_of,
    is_optimizer,
    optimizer_slot,
    read_metadata,
    with_head,
)
from tests.unit.checkpoint.runs import Model, save_checkpoint
from tests.unit.checkpoint.test_pickles import Attack

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def saved(one_rank, tmp_path_factory):
    model = Model(heads=2)
    return model, save_checkpoint(tmp_path_factory.mktemp("run"), model, tp=2)


def test_tensors_are_those_that_were_saved(saved):
    model, directory = saved
    metadata = read_metadata(directory)
    found = {key: (t.shape, t.dtype) for key, t in metadata.tensors.items() if not is_optimizer(key)}
    assert found == {key: (tuple(t.shape), "bfloat16") for key, t in model.tensors.items()}
    assert metadata.num_heads == 2
    sharded = metadata.tensors["mtp.layers.1.eh_proj.weight"]
    assert sorted(sharded.chunks) == [(0, 0), (8, 0)]  # 16 rows over two ranks
    assert sharded.nbytes == 16 * 32 * 2


def test_payloads_are_where_the_metadata_says(saved):
    """Every chunk's bytes, loaded alone, are that part of the tensor."""
    model, directory = saved
    metadata = read_metadata(directory)
    for key, tensor in model.tensors.items():
        for offset, payload in metadata.tensors[key].chunks.items():
            path = directory / "chunk"
            path.write_bytes(read_payload(directory, payload))
            chunk = torch.load(path, weights_only=True)
            path.unlink()
            region = tuple(slice(o, o + n) for o, n in zip(offset, chunk.shape, strict=True))
            assert torch.equal(chunk, tensor[region])


def test_files_end_where_the_last_payload_does(saved):
    _, directory = saved
    assert read_metadata(directory).files() == {p.name: p.stat().st_size for p in directory.glob("*.distcp")}


@pytest.mark.parametrize(
    ("key", "head", "slot"),
    [
        ("mtp.layers.0.eh_proj.weight", 0, None),
        ("mtp.layers.12.mtp_model_layer.layers.3.mlp.linear_fc1.weight", 12, None),
        ("mtp.layers.3.transformer_layer.self_attention.linear_qkv._extra_state/shard_0_1", 3, None),
        ("optimizer.state.exp_avg.mtp.layers.7.enorm.weight", 7, "exp_avg"),
        ("chained_1.optimizer.state.param.mtp.layers.2.mlp.experts.linear_fc1.weight", 2, "param"),
        ("decoder.layers.3.mlp.linear_fc1.weight", None, None),
        ("optimizer.state.fp32_param.decoder.layers.1.mlp.linear_fc2.weight", None, "fp32_param"),
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg", None, None),
    ],
)
def test_what_a_key_says(key, head, slot):
    assert head_of(key) == head
    assert optimizer_slot(key) == slot
    assert is_optimizer(key) == ("optimizer" in key)
    if head is not None:
        assert head_of(with_head(key, 40)) == 40
        assert with_head(with_head(key, 40), head) == key


def test_arguments_are_those_that_were_saved(saved):
    _, directory = saved
    state = read_common_state(read_metadata(directory))
    assert (state.values["iteration"], state.args["mtp_num_layers"]) == (100, 2)
    assert state.args["hybrid_layer_pattern"] == "*-*-/*-/*-"


def test_changed_arguments_are_what_megatron_reads(saved, tmp_path):
    """Everything else as before, classes of Megatron's own and the tensors of the optimizer included."""
    from megatron.core import dist_checkpointing

    _, directory = saved
    before = dist_checkpointing.load_common_state_dict(str(directory))
    metadata = read_metadata(directory)
    state = read_common_state(metadata)
    state.args["mtp_num_layers"] = 16
    (tmp_path / "common").write_bytes(state.serialized())
    after = torch.load(tmp_path / "common", weights_only=True)[0]
    assert after["args"].mtp_num_layers == 16
    after["args"].mtp_num_layers = 2
    assert after == before


def test_arguments_of_older_checkpoints(saved, tmp_path):
    _, directory = saved
    metadata = read_metadata(directory)
    document = torch.load(_file(tmp_path, read_payload(directory, metadata.objects[KEY])), weights_only=True)
    old = tmp_path / "old"
    shutil.copytree(directory, old)
    torch.save(document[0], old / LEGACY_FILE)
    metadata = read_metadata(old)
    del metadata.objects[KEY]
    assert read_common_state(metadata).args["mtp_num_layers"] == 2


def _file(directory, data):
    path = directory / "payload"
    path.write_bytes(data)
    return path


def test_malicious_metadata_is_refused_by_name(saved, tmp_path):
    import os

    directory = shutil.copytree(saved[1], tmp_path / "copy")
    (directory / ".metadata").write_bytes(pickle.dumps(Attack(os.system, f"touch {tmp_path / 'pwned'}")))
    with pytest.raises(CheckpointError, match=r"copy/\.metadata .*posix\.system"):
        read_metadata(directory)
    assert not (tmp_path / "pwned").exists()


def test_malicious_arguments_are_refused_by_name(saved, tmp_path):
    import os

    metadata = read_metadata(shutil.copytree(saved[1], tmp_path / "copy"))
    with zipfile.ZipFile(metadata.directory / LEGACY_FILE, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([Attack(os.system, f"touch {tmp_path / 'pwned'}")]))
    del metadata.objects[KEY]
    with pytest.raises(CheckpointError, match=rf"copy/{LEGACY_FILE}: .*posix\.system"):
        read_common_state(metadata)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "sub/__0_0.distcp"])
def test_metadata_cannot_point_outside_of_its_directory(saved, tmp_path, place):
    directory = shutil.copytree(saved[1], tmp_path / "copy")
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = place
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="points outside of the checkpoint"):
        read_metadata(directory)


def test_a_directory_without_metadata_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no torch_dist checkpoint, or its save was cut short"):
        read_metadata(tmp_path)
