"""The rule that chooses the kernels: what is named wins, nothing falls back in silence, and the choice is said."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses import kernels
from tests.unit.losses.test_fused import fused, make_case

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels._say.cache_clear()


@pytest.fixture
def triton(monkeypatch):
    """Triton's kernels by name alone: nothing here imports Triton."""
    names = kernels.TORCH._replace(name="triton")
    monkeypatch.setattr(kernels, "_triton", lambda: names)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)


def test_by_the_device(triton, caplog):
    caplog.set_level(logging.DEBUG)
    assert kernels.choose(CPU).name == "torch"
    assert kernels.choose(GPU).name == kernels.choose(GPU, "auto").name == "triton"
    assert caplog.messages == ["Loss kernels on cpu: torch", "Loss kernels on cuda: triton"]  # once each


def test_the_argument_comes_before_the_environment(triton, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert kernels.choose(GPU).name == "torch"
    assert kernels.choose(GPU, "triton").name == "triton"


def test_a_gpu_without_triton_warns(no_triton, caplog):
    assert kernels.choose(GPU).name == "torch"
    assert "not installed" in caplog.text and caplog.records[0].levelno == logging.WARNING


def test_triton_where_it_cannot_run_is_refused(triton, monkeypatch):
    with pytest.raises(ValueError, match="kernels is 'triton', but the tensors are on cpu"):
        kernels.choose(CPU, "triton")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    with pytest.raises(ValueError, match="MTPD_LOSS_KERNELS is 'triton'"):
        fused(make_case(), MTPDConfig.as_published())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose(CPU).name == "triton"


def test_triton_that_is_not_installed_is_refused(no_triton):
    with pytest.raises(ValueError, match="not installed"):
        kernels.choose(GPU, "triton")


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="MTPD_LOSS_KERNELS is 'cuda': choose one of auto, torch, triton"):
        kernels.choose(CPU)


def test_all_of_the_vocabulary_costs_no_search(monkeypatch):
    """N at the vocabulary is the full KL: the same path and numbers, and no cut is looked for."""

    def forbidden(*arguments):
        raise AssertionError("a cut was looked for")

    monkeypatch.setattr("megatron_mtpd.losses.fused.choose", lambda *_: kernels.TORCH._replace(topn_cut=forbidden))
    case = make_case(vocab=37)
    with pytest.raises(AssertionError, match="looked for"):
        fused(case, MTPDConfig.as_published(top_n=36))
    everything, full = (
        fused(case, MTPDConfig.as_published(top_n=37)),
        fused(case, MTPDConfig.as_published(objective="kl")),
    )
    assert torch.equal(everything.heads_loss, full.heads_loss)
    assert all(torch.equal(x, y) for x, y in zip(everything.gradients, full.gradients, strict=True))
