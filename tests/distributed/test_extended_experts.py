"""A mixture of experts that was saved by expert-parallel ranks, its heads rearranged, and loaded elsewhere."""

import argparse

import pytest
import torch

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.inspection import describe
from megatron_mtpd.checkpoint.iterations import write_tracker
from megatron_mtpd.checkpoint.looping import make_plan
from tests.distributed import gloo
from tests.distributed.layouts import _slices, build
from tests.distributed.saving import saves_may_run
from tests.distributed.toy import HEADS, Layout, Toy, initial_weight

pytestmark = pytest.mark.distributed

EXPERTS = Toy(experts=4)
SOURCES = {0: 1, 1: 0}  # each head has the other's weights afterwards


def save(layout: Layout, directory: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    model, _ = build(layout, EXPERTS)
    args = argparse.Namespace(mtp_num_layers=HEADS, hybrid_layer_pattern="*E" * 4 + "/*E" * HEADS)
    with saves_may_run():
        state = {"args": args, "iteration": 3, **unwrap_model(model[0]).sharded_state_dict()}
        dist_checkpointing.save(state, directory)


def load(layout: Layout, directory: str) -> list[tuple[str, bool]]:
    """Every weight that this rank holds, and whether it is what it should be."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    model, _ = build(layout, EXPERTS)
    core = unwrap_model(model[0])
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load(core.sharded_state_dict(), directory)
    core.load_state_dict({name: loaded[name] for name in core.state_dict()})
    found = []
    for part in _slices(core, lambda parameter: parameter.data):
        source = part.name
        for head, old in SOURCES.items():
            if part.name.startswith(f"mtp.layers.{head}."):
                source = part.name.replace(f"layers.{head}.", f"layers.{old}.", 1)
        found.append((part.name, torch.equal(part.value, initial_weight(EXPERTS, source, part.shape)[part.place])))
    return found


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2, ep=2), Layout(tp=2, ep=2, sequence_parallel=True)], ids=["one", "ep2", "tp2-ep2"]
)
def test_experts_of_extended_heads(layout, tmp_path):
    directory = tmp_path / "run" / "iter_0000003"
    directory.mkdir(parents=True)
    gloo.run(save, 2, Layout(dp=2, ep=2), str(directory))
    write_tracker(tmp_path / "run", 3)
    extend(make_plan(tmp_path / "run", pattern=[old + 1 for old in SOURCES.values()]), tmp_path / "out")
    assert describe(tmp_path / "out")["problems"] == []
    for rank in gloo.run(load, layout.ranks, layout, str(tmp_path / "out" / "release")):
        assert any("experts" in name and name.startswith("mtp.") for name, _ in rank)
        assert [name for name, is_right in rank if not is_right] == []
