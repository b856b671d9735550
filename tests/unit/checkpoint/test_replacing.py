"""Checkpoints whose heads get other weights."""

import pytest
import torch

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import read_tracker, resolve
from megatron_mtpd.checkpoint.metadata import read_metadata
from megatron_mtpd.checkpoint.replacing import plan_replacement
from tests.unit.checkpoint.runs import Model, load_weights, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("kind", ["hybrid", "gpt"])
@pytest.mark.parametrize("mode", ["link", "materialize"])
def test_the_heads_get_the_new_weights_and_all_else_stays(tmp_path, kind, mode):
    model = Model(heads=2, kind=kind)
    save_checkpoint(tmp_path / "run", model, tp=2)  # so that a tensor has two chunks
    projections, norm = [torch.randn(16, 32) for _ in range(2)], torch.randn(16)
    plan = plan_replacement(tmp_path / "run", None, projections, {"weight": norm}, ["linear_qkv."])
    extend(plan, tmp_path / "new", mode)

    directory = resolve(tmp_path / "new")[1]
    assert read_tracker(tmp_path / "new") == "release" and verify(directory) == []
    loaded = load_weights(directory, model, tp=1)
    assert set(loaded) == set(model.tensors) == set(read_metadata(directory).tensors), "no optimizer state"
    for key, old in model.tensors.items():
        expected = old
        if key.startswith("mtp."):
            head = int(key.split(".")[2])
            if "linear_qkv" in key:
                expected = torch.zeros_like(old)
            elif "eh_proj" in key:
                expected = projections[head].bfloat16()
            elif "final_layernorm" in key:
                expected = norm.bfloat16()
        assert loaded[key].equal(expected), key
        assert expected is old or not old.equal(expected), "the test must change it"
    if mode == "link":
        old = {file.stat().st_ino for file in resolve(tmp_path / "run")[1].glob("*.distcp")}
        data = list(directory.glob("*.distcp"))
        written = [file for file in data if file.stat().st_ino not in old]
        assert len(written) == 1 and len(data) > 1, "the old bytes are not written again"


def test_a_checkpoint_without_heads_is_refused(tmp_path):
    save_checkpoint(tmp_path / "run", Model(heads=0))
    with pytest.raises(ValueError, match="has no multi-token prediction heads"):
        plan_replacement(tmp_path / "run", None, [], {}, [])
