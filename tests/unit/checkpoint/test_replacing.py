"""Checkpoints whose heads get other weights."""

import pytest
import torch

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import read_tracker, resolve
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata
from megatron_mtpd.checkpoint.replacing import plan_replacement
from tests.unit.checkpoint.runs import Model, load_weights, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("kind", ["hybrid", "gpt"])
@pytest.mark.parametrize("mode", ["link", "materialize"])
def test_the_heads_get_the_new_weights_and_all_else_stays(tmp_path, kind, mode):
    model = Model(heads=2, kind=kind)
    save_checkpoint(tmp_path / "run", model, tp=2)  # so that a tensor has two chunks
    projections, norm = [{"eh_proj": torch.randn(16, 32)} for _ in range(2)], torch.randn(16)
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
                expected = projections[head]["eh_proj"].bfloat16()
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


def test_a_weight_that_a_head_lacks_is_refused(tmp_path):
    save_checkpoint(tmp_path / "run", Model(heads=2))
    weights = [{"eh_proj": torch.randn(16, 32)}, {"mlp.linear_fc2": torch.randn(16, 32)}]
    with pytest.raises(CheckpointError, match=r"its head 2 has no mlp\.linear_fc2\.weight"):
        plan_replacement(tmp_path / "run", None, weights, {"weight": torch.randn(16)}, [])


def test_a_weight_replaces_where_others_of_its_kind_become_zero(tmp_path):
    model = Model(heads=1)
    save_checkpoint(tmp_path / "run", model)
    weight = torch.randn(32, 16)
    named = [{"self_attention.linear_qkv": weight}]
    zeroed = ["linear_qkv.", "eh_proj."]
    extend(plan_replacement(tmp_path / "run", None, named, {"weight": torch.randn(16)}, zeroed), tmp_path / "new")
    loaded = load_weights(resolve(tmp_path / "new")[1], model, tp=1)
    heads = {key: value for key, value in loaded.items() if key.startswith("mtp.")}
    (qkv,) = (value for key, value in heads.items() if "linear_qkv" in key)
    (eh_proj,) = (value for key, value in heads.items() if "eh_proj" in key)
    assert qkv.equal(weight.bfloat16()) and not eh_proj.any()
