"""FP8 state in a checkpoint: scales and amax histories of Transformer Engine's layers, which are bytes to us.

They are saved as objects, `..._extra_state`, of one shard or of several (experts). A copied head has to start with its
source's: without a history its first steps would be scaled wrongly.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from megatron_mtpd.checkpoint.common_state import read_payload
from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import read_metadata
from tests.unit.checkpoint.runs import Model, megatrons_save, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")

MODULES = ("eh_proj", "mtp_model_layer.layers.0.self_attention.linear_qkv", "mtp_model_layer.layers.1.mlp.linear_fc1")
SHARDS = 2


def amax_state(number: float) -> torch.Tensor:
    """As Transformer Engine 2 writes it under delayed scaling: a pickle of its tensors and its recipe, as bytes."""
    state = {
        "scale_fwd": torch.full((3,), 1.0 + number),
        "amax_history_fwd": torch.full((16, 3), number),
        "scale_bwd": torch.full((2,), 1 / (1.0 + number)),
        "amax_history_bwd": torch.full((16, 2), -number),
        "extra_fp8_variables": {"fp8_max_fwd": 448.0},
    }
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def objects(heads: int) -> dict:
    from megatron.core.dist_checkpointing import ShardedObject

    return {
        f"{head} {module} {shard}": ShardedObject(
            f"mtp.layers.{head}.{module}._extra_state",
            amax_state(100 * head + 10 * index + shard),
            (SHARDS,),
            (shard,),
        )
        for head in range(heads)
        for index, module in enumerate(MODULES)
        for shard in range(SHARDS)
    }


def save_with_fp8_state(state, directory, *args, **kwargs):
    state = {key: value for key, value in state.items() if not str(key).endswith("_extra_state")}
    return megatrons_save()(state | objects(2), directory, *args, **kwargs)


@pytest.mark.parametrize("mode", ["link", "copy", "materialize"])
def test_copied_heads_start_with_the_scales_of_their_source(tmp_path, mode):
    from megatron.core.dist_checkpointing import load

    save_checkpoint(tmp_path / "run", Model(heads=2), saver=save_with_fp8_state)
    extend(make_plan(tmp_path / "run", 5), tmp_path / "out", mode)
    directory = resolve(tmp_path / "out")[1]
    assert verify(directory) == []
    loaded = load(objects(5), str(directory))
    for head, source in enumerate([0, 1, 0, 1, 0]):
        for index, module in enumerate(MODULES):
            for shard in range(SHARDS):
                state = pickle.loads(loaded[f"{head} {module} {shard}"].numpy().tobytes())
                assert state["amax_history_fwd"][0, 0] == 100 * source + 10 * index + shard
                assert state["extra_fp8_variables"] == {"fp8_max_fwd": 448.0}


@pytest.mark.parametrize("mode", ["link", "materialize"])
def test_fp8_parameters_of_other_software_are_copied_as_they_are(tmp_path, mode):
    """Megatron saves FP8 parameters as bf16; where a checkpoint holds FP8 numbers all the same, they are bytes."""
    from tests.unit.checkpoint.runs import HEAD, TRUNK

    shapes = TRUNK | {f"mtp.layers.0.{name}": shape for name, shape in HEAD["hybrid"].items()}
    tensors = {
        key: torch.randn(shape).to(torch.float8_e4m3fn if len(shape) > 1 else torch.bfloat16)
        for key, shape in shapes.items()
    }
    save_checkpoint(tmp_path / "run", Model(heads=1, tensors=tensors), optimizer=None)
    extend(make_plan(tmp_path / "run", 2), tmp_path / "out", mode)
    contents = read_metadata(resolve(tmp_path / "out")[1])
    assert verify(contents.directory) == []
    name = "mtp.layers.{}.eh_proj.weight"
    assert contents.tensors[name.format(1)].dtype == "float8_e4m3fn"
    for head in range(2):
        payloads = contents.tensors[name.format(head)].chunks
        parts = [torch.load(io.BytesIO(read_payload(contents.directory, p))) for p in payloads.values()]
        assert torch.equal(torch.cat(parts).view(torch.uint8), tensors[name.format(0)].view(torch.uint8))
