import pytest
import torch

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
QKV = ("q", "k", "v")
CASES: list[tuple[Layout, tuple[int, ...]]] = [
    (Same("a"), (5, 4)),
    (Vocabulary("a"), (16, 4)),
    (Stacked(("gate", "up")), (8, 4)),
    (GroupedQKV(QKV), (30, 4)),
    (GroupedQKV(QKV), (30,)),  # biases
    (ConcatenatedQKV("qkv"), (30, 4)),
    (SwappedHalves("a"), (4, 8)),
]


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_split_and_join_undo_each_other(layout: Layout, size: tuple[int, ...]) -> None:
    ours = torch.randn(size)
    theirs = layout.split(ours, SHAPE)
    assert [tuple(part.shape) for part in theirs] == layout.shapes(size, SHAPE)
    assert len(theirs) == len(layout.names)
    back = torch.cat(layout.join(theirs, SHAPE))
    assert back.shape == ours.shape
    again = layout.split(back, SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(theirs, again, strict=True))
    if not isinstance(layout, Vocabulary):  # whose padding is made anew
        assert torch.equal(back, ours)


def test_query_key_value_rows_go_group_by_group() -> None:
    """6 query heads in 2 groups, 3 channels a head: ours is q0 q1 q2 k0 v0, q3 q4 q5 k1 v1."""
    rows = {name: torch.arange(heads * 3) + start for name, heads, start in (("q", 6, 0), ("k", 2, 100), ("v", 2, 200))}
    (ours,) = GroupedQKV(QKV).join([rows[name] for name in QKV], SHAPE)
    expected = [*range(9), 100, 101, 102, 200, 201, 202, *range(9, 18), 103, 104, 105, 203, 204, 205]
    assert ours.tolist() == expected


def test_padding_of_the_vocabulary_has_the_mean_logit() -> None:
    theirs = torch.randn(10, 4)
    ours = torch.cat(Vocabulary("a").join([theirs], SHAPE))
    hidden = torch.randn(4)
    logits = ours @ hidden
    # The mean of ten products against the product of a mean: fp32 rounding of sums of about 1.
    torch.testing.assert_close(logits[10:], logits[:10].mean().expand(6), rtol=0, atol=1e-5)


def test_zero_biases_have_the_sizes_of_the_projections() -> None:
    parts = ZeroBias(QKV).split(torch.randn(30, 4), SHAPE)
    assert [tuple(part.shape) for part in parts] == [(18,), (6,), (6,)]
    assert not any(part.any() for part in parts)


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_a_prefix_changes_names_alone(layout: Layout, size: tuple[int, ...]) -> None:
    changed = prefixed(layout, "x.")
    assert type(changed) is type(layout)
    assert list(changed.names) == ["x." + name for name in layout.names]
