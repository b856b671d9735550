"""Rows of ours and theirs, a block at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_mtpd.checkpoint.hf import blocks
from megatron_mtpd.checkpoint.hf.layouts import (
    ConcatenatedQKV,
    GroupedQKV,
    Layout,
    Same,
    Stacked,
    SwappedHalves,
    Vocabulary,
    ZeroBias,
    prefixed,
)
from tests.unit.checkpoint.hf.models import toy_shape

SHAPE = toy_shape(num_attention_heads=6, num_query_groups=2, head_dim=3, vocab_size=10, padded_vocab_size=16)
KEY = "decoder.layers.0.self_attention.linear_qkv.weight"
QKV = ("q", "k", "v")
CASES: list[tuple[Layout, tuple[int, ...]]] = [
    (Same("a"), (5, 4)),
    (Same("a"), (5,)),
    (Vocabulary("a"), (16, 4)),
    (Stacked(("gate", "up")), (8, 4)),
    (Stacked(("gate0", "up0", "gate1", "up1", "gate2", "up2")), (3, 10, 4)),  # of three experts
    (Stacked(("down0", "down1", "down2")), (3, 5, 4)),
    (GroupedQKV(QKV), (30, 4)),
    (GroupedQKV(QKV), (30,)),  # biases
    (ConcatenatedQKV("qkv"), (30, 4)),
    (SwappedHalves("a"), (4, 8)),
]


@pytest.fixture(params=[8, 50, blocks.BLOCK], ids=["row by row", "some rows", "whole"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", request.param)


class Memory(dict[str, Tensor]):
    """Tensors by name, to read rows from."""

    def read(self, name: str, first: int, out: Tensor) -> None:
        out.copy_(self[name].reshape(-1, out.shape[1])[first : first + len(out)])


def join(layout: Layout, theirs: dict[str, Tensor], size: tuple[int, ...]) -> Tensor:
    pieces = blocks.of_theirs(Memory(theirs), layout, size, torch.float32, SHAPE, blocks.Buffer())
    return torch.cat([piece.clone() for piece in pieces]).view(size)


def split(layout: Layout, ours: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(type(SHAPE), "size_of", lambda self, key: tuple(ours.shape))
    shapes = layout.shapes(tuple(ours.shape), SHAPE)
    assert len(shapes) == len(layout.names)
    found = {}
    for name, size in zip(layout.names, shapes, strict=True):
        source, buffer = Memory({KEY: ours}), blocks.Buffer()
        pieces = blocks.of_ours(source, KEY, layout, name, SHAPE, torch.float32, buffer)
        found[name] = torch.cat([piece.clone() for piece in pieces]).view(size)
    return found


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_split_and_join_undo_each_other(layout: Layout, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch.randn(size)
    theirs = split(layout, ours, monkeypatch)
    back = join(layout, theirs, size)
    again = split(layout, back, monkeypatch)
    assert all(torch.equal(theirs[name], again[name]) for name in theirs)
    assert sum(map(Tensor.numel, theirs.values())) == math.prod(size) - isinstance(layout, Vocabulary) * 6 * 4
    if not isinstance(layout, Vocabulary):  # whose padding is made anew
        assert torch.equal(back, ours)


def test_query_key_value_rows_go_group_by_group() -> None:
    """6 query heads in 2 groups, 3 channels a head: ours is q0 q1 q2 k0 v0, q3 q4 q5 k1 v1."""
    rows = {
        name: torch.arange(heads * 3.0) + start for name, heads, start in (("q", 6, 0), ("k", 2, 100), ("v", 2, 200))
    }
    expected = [*range(9), 100, 101, 102, 200, 201, 202, *range(9, 18), 103, 104, 105, 203, 204, 205]
    assert join(GroupedQKV(QKV), rows, (30,)).tolist() == expected
    assert join(ConcatenatedQKV("all"), {"all": torch.cat(list(rows.values()))}, (30,)).tolist() == expected


def test_experts_lie_one_behind_the_other_with_their_two_projections() -> None:
    rows = {
        f"{name}{expert}": torch.full((2, 1), 10.0 * expert + n) for expert in range(3) for n, name in enumerate("gu")
    }
    ours = join(Stacked(("g0", "u0", "g1", "u1", "g2", "u2")), rows, (3, 4, 1))
    assert ours.flatten(1).tolist() == [[0, 0, 1, 1], [10, 10, 11, 11], [20, 20, 21, 21]]


def test_halves_are_swapped() -> None:
    assert join(SwappedHalves("a"), {"a": torch.tensor([[1.0, 2, 3, 4]])}, (1, 4)).tolist() == [[3, 4, 1, 2]]


def test_padding_of_the_vocabulary_has_the_mean_logit() -> None:
    theirs = torch.randn(10, 4)
    ours = join(Vocabulary("a"), {"a": theirs}, (16, 4))
    assert torch.equal(ours[:10], theirs)
    hidden = torch.randn(4)
    logits = ours @ hidden
    # The mean of ten products against the product of a mean: fp32 rounding of sums of about 1.
    torch.testing.assert_close(logits[10:], logits[:10].mean().expand(6), rtol=0, atol=1e-5)


def test_zero_biases_have_the_sizes_of_the_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(ZeroBias(QKV), torch.randn(30, 4), monkeypatch)
    assert [tuple(part.shape) for part in parts.values()] == [(18,), (6,), (6,)]
    assert not any(part.any() for part in parts.values())


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_a_prefix_changes_names_alone(layout: Layout, size: tuple[int, ...]) -> None:
    changed = prefixed(layout, "x.")
    assert type(changed) is type(layout)
    assert list(changed.names) == ["x." + name for name in layout.names]
    assert not layout.names[0].startswith("x.")
