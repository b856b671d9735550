"""Products with reordered weights, against torch's own."""

import gc
import weakref

import pytest
import torch
from torch.nn.functional import linear

from megatron_mtpd.speculative.packed import PackedWeight, shared_packed

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    monkeypatch.setattr("megatron_mtpd.speculative.packed.LEAST_ROWS", 1)


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.randn(48, 64, generator=torch.Generator().manual_seed(1)))


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def is_packed(packed):
    return packed._packed is not None and packed._packed.layout == torch._mkldnn  # pyright: ignore


@needs_onednn
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (5, 3, 64), (200, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_products_are_those_of_linear(weight, shape, with_bias):
    packed, x, bias = PackedWeight(), values(*shape), values(48) if with_bias else None
    with torch.inference_mode():
        torch.testing.assert_close(packed.linear(x, weight, bias), linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert is_packed(packed)


@needs_onednn
def test_few_rows_take_linear_where_that_is_faster(weight, monkeypatch):
    monkeypatch.setattr("megatron_mtpd.speculative.packed.LEAST_ROWS", 4)
    with torch.inference_mode():
        few, many = PackedWeight(), PackedWeight()
        few.linear(values(3, 1, 64), weight)
        many.linear(values(2, 2, 64), weight)
    assert few._packed is None and is_packed(many)


@needs_onednn
def test_input_that_is_not_contiguous(weight):
    x = values(64, 6).t()
    with torch.inference_mode():
        torch.testing.assert_close(PackedWeight().linear(x, weight), linear(x, weight), rtol=1e-5, atol=1e-5)


@needs_onednn
def test_a_changed_weight_is_packed_again(weight):
    packed, x = PackedWeight(), values(2, 64)
    with torch.no_grad():
        before = packed.linear(x, weight)
        kept = packed._packed
        assert packed.linear(x, weight).equal(before)
        assert packed._packed is kept, "nothing has changed"
        weight.mul_(2)
        torch.testing.assert_close(packed.linear(x, weight), 2 * before, rtol=1e-5, atol=1e-5)
        other = torch.nn.Parameter(3 * weight.detach())
        torch.testing.assert_close(packed.linear(x, other), 6 * before, rtol=1e-5, atol=1e-5)


def test_gradients_and_half_precision_take_linear(weight):
    packed, x = PackedWeight(), values(2, 64)
    packed.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(48, 64), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        half = weight.bfloat16()
        assert packed.linear(x.bfloat16(), half).equal(linear(x.bfloat16(), half))
    assert packed._packed is None


def test_all_that_multiply_by_a_weight_share_its_copy_as_long_as_it_lives():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    shared = shared_packed(weight)
    assert shared_packed(weight) is shared
    assert shared_packed(torch.nn.Parameter(weight.detach())) is not shared
    copy = weakref.ref(shared)
    del shared
    assert copy() is not None
    del weight
    gc.collect()
    assert copy() is None
