"""Checkpoints of FP8 training: weights in high precision, with scales and amax histories beside them, which neither an
export nor a model of local layers reads; and FP8 numbers without scales, which no export may take for weights."""

import pickle
from pathlib import Path

import pytest
import torch

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.metadata import CheckpointError
from megatron_mtpd.speculative import loading
from tests.unit.checkpoint.hf import models
from tests.unit.checkpoint.hf.models import toy_checkpoint, toy_shape, weights


def with_fp8_state(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """The toy, whose linear layers have what Transformer Engine 2 keeps under delayed scaling: a pickle, as bytes."""
    state = {"scale_fwd": torch.full((3,), 7.0), "amax_history_fwd": torch.full((16, 3), 64.0)}
    amax = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    save = torch.save

    def saved(value: object, *args: object, **options: object) -> None:
        save([amax] if isinstance(value, list) and value == [None] else value, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", saved)
        return toy_checkpoint(root, toy_shape())


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.distcp"))


def test_scales_and_histories_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None):
    plain, fp8 = toy_checkpoint(tmp_path / "plain", toy_shape()), with_fp8_state(monkeypatch, tmp_path / "fp8")
    assert size(fp8) > size(plain), "there is a state"
    for root in (plain, fp8):
        export_hf(root, tmp_path / "hf" / root.name, vocab_size=96)
    before, after = (weights(tmp_path / "hf" / root.name) for root in (plain, fp8))
    assert before.keys() == after.keys() and "model.layers.2.eh_proj.weight" in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = (dict(loading.load(root).model.named_parameters()) for root in (plain, fp8))
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())


def test_fp8_numbers_without_scales_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weight = models.toy_weight

    def quantised(key: str, *args: object) -> torch.Tensor:
        return weight(key, *args).to(torch.float8_e4m3fn if "linear_fc1.weight" in key else torch.float32)

    monkeypatch.setattr(models, "toy_weight", quantised)
    root = toy_checkpoint(tmp_path / "ours", toy_shape())
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight as float8_e4m3fn, and no scales"):
        export_hf(root, tmp_path / "hf", vocab_size=96)
    assert not (tmp_path / "hf").exists()
