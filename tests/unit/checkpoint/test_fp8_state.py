"""FP8 state in a checkpoint: scales and amax histories of Transformer Engine's layers, which are bytes to us.

They are saved as objects, `..._extra_state`, of one shard or of several (experts). A copied head has to start with its
source's: without a history its first steps would be scaled wrongly.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import pytest
import torch

from megatron_mtpd.checkpoint import fp8_state, seam
from megatron_mtpd.checkpoint.common_state import read_payload
from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata
from tests.unit.checkpoint.runs import Model, megatrons_save, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")

MODULES = ("eh_proj", "mtp_model_layer.layers.0.self_attention.linear_qkv", "mtp_model_layer.layers.1.mlp.linear_fc1")
SHARDS = 2


class Format(Enum):
    HYBRID = (448, 57344)


@dataclass
class DelayedScaling:
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 16
    amax_compute_algo: object = "max"


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """A recipe under the name that it has in Transformer Engine, which is not there."""
    module = ModuleType("transformer_engine.common.recipe")
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for recipe in (Format, DelayedScaling):
        monkeypatch.setattr(recipe, "__module__", module.__name__)
        setattr(module, recipe.__name__, recipe)
    monkeypatch.delenv(fp8_state.ALLOW, raising=False)


def amax_state(number: float, recipe: object = None) -> torch.Tensor:
    """As Transformer Engine 2 writes it under delayed scaling: a pickle of its tensors and its recipe, as bytes."""
    state = {
        "recipe": recipe or DelayedScaling(),
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
            amax_state(100.0 * head + 10 * index + shard),
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


# What Transformer Engine may load -------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


class HiddenStorage:
    """Bytes in torch's old format, whose own pickles name what they should not."""

    def __reduce__(self):
        data = b"".join(pickle.dumps(part) for part in (0x1950A86A20F9469CFC6C, 1001, {}, RunsCode(), []))
        return torch.storage._load_from_bytes, (data,)


def checkpoint_with(root, state):
    def saver(values, directory, *args, **kwargs):
        from megatron.core.dist_checkpointing import ShardedObject

        kept = {key: value for key, value in values.items() if not str(key).endswith("_extra_state")}
        key = "decoder.layers.0.mlp.linear_fc1._extra_state"
        return megatrons_save()(kept | {key: ShardedObject(key, state, (1,), (0,))}, directory, *args, **kwargs)

    save_checkpoint(root, Model(heads=2), saver=saver)
    return read_metadata(resolve(root)[1])


@pytest.mark.parametrize("state", [amax_state, lambda number: torch.empty(0, dtype=torch.uint8), lambda number: None])
def test_scales_and_histories_name_nothing_that_runs(tmp_path, state):
    assert fp8_state.problems(checkpoint_with(tmp_path, state(1.0))) == []


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (RunsCode(), r"posix\.system"),
        (HiddenStorage(), r"posix\.system"),
        (DelayedScaling(amax_compute_algo=os.path.join), r"posixpath\.join"),
    ],
    ids=["plain", "inside a tensor's bytes", "a function for the amax"],
)
def test_a_state_that_could_run_code_is_named(tmp_path, recipe, name):
    (problem,) = fp8_state.problems(checkpoint_with(tmp_path, amax_state(1.0, recipe)))
    assert problem.startswith("decoder.layers.0.mlp.linear_fc1._extra_state")
    with pytest.raises(CheckpointError, match=rf"{name}, which has no business there\. Loading it could run code: set"):
        fp8_state.refuse(read_metadata(resolve(tmp_path)[1]), [problem])


def test_ranks_share_the_reading(tmp_path):
    save_checkpoint(tmp_path, Model(heads=2), saver=save_with_fp8_state)
    checkpoint = read_metadata(resolve(tmp_path)[1])
    read = []
    for share in range(3):
        parts = [key for key in checkpoint.objects if "._extra_state" in key]
        read += sorted(parts)[share::3]
        assert fp8_state.problems(checkpoint, (share, 3)) == []
    assert sorted(read) == sorted(parts) and len(parts) == 2 * len(MODULES) * SHARDS


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_training_lets_transformer_engine_load_what_was_read(tmp_path, recipe, monkeypatch):
    """And only that: a state that could run code ends the run before anything is loaded."""
    loads = []
    args = argparse.Namespace(load=str(tmp_path / "good"), save=None, ckpt_format="torch_dist", fp8="hybrid")
    args.fp8_recipe, args.no_load_optim, args.finetune = recipe, False, False
    load = seam.loads_checked(lambda *args, **kwargs: loads.append(os.environ.get(fp8_state.ALLOW)), lambda: args)
    save_checkpoint(tmp_path / "good", Model(heads=2), saver=save_with_fp8_state)
    checkpoint_with(tmp_path / "bad", amax_state(1.0, RunsCode()))

    load()
    assert loads == ["1" if recipe == "delayed" else None]
    monkeypatch.delenv(fp8_state.ALLOW, raising=False)
    args.load = str(tmp_path / "bad")
    if recipe == "delayed":
        with pytest.raises(CheckpointError, match=fp8_state.ALLOW):
            load()
        assert len(loads) == 1 and fp8_state.ALLOW not in os.environ
        monkeypatch.setenv(fp8_state.ALLOW, "1")
    load()
    assert len(loads) == 2
