"""Which position learns from which target, against the rule said in words and walked position by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtpd.losses.alignment import head_masks, shift_left
from tests.unit.losses.naive import has_target


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 9])
def test_shift_left(k, dtype):
    x = torch.arange(1, 9).reshape(4, 2).to(dtype)
    expected = [x[i + k].tolist() if i + k < 4 else [0, 0] for i in range(4)]
    shifted = shift_left(x, k)
    assert shifted.dtype == dtype and shifted.tolist() == expected


def test_the_example_of_the_docstring():
    #                a1 a2 a3 EOD b1 b2
    ends = torch.tensor([0, 0, 0, 1, 0, 0]).bool().unsqueeze(1)
    masks = head_masks(torch.ones(6, 1), 2, ends).squeeze(-1)
    assert masks.tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_what_each_head_learns_is_a_token_of_its_own_document():
    # Documents of 3, 1 (its end alone), 4 and 2 tokens; 0 is the end of a document, the last one is cut off.
    tokens = [11, 12, 0, 0, 21, 22, 23, 0, 31, 32]
    document = [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    labels = [*tokens[1:], 33]
    label_document = [*document[1:], 3]
    masks = head_masks(torch.ones(10, 1), 3, (torch.tensor(tokens) == 0).unsqueeze(1))
    learned = [(k, i) for k in range(3) for i in range(10) if masks[k, i, 0]]
    for k, i in learned:
        j = i + k + 1
        assert label_document[j] == document[i] and labels[j] not in labels[i:j]
    # Every pair within a document is there: document a gives head 1 one pair (11, 12 -> end), and so on.
    assert learned == [(0, 0), (0, 4), (0, 5), (0, 8), (1, 4)]


def random_masks(length, batch, flags):
    values = torch.tensor(flags[: length * batch]).reshape(length, batch)
    return (values != 0).float(), values == 2  # about a third is masked, a third ends a document


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(
    length=st.integers(1, 8),
    batch=st.integers(1, 2),
    num_heads=st.integers(1, 4),
    flags=st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=16, max_size=16),
    cross_documents=st.booleans(),
    tells_documents=st.booleans(),
)
def test_head_masks_position_by_position(length, batch, num_heads, flags, cross_documents, tells_documents):
    loss_mask, ends = random_masks(length, batch, flags)
    ends = ends if tells_documents else None
    masks = head_masks(loss_mask, num_heads, ends, cross_documents)
    for k in range(num_heads):
        for b in range(batch):
            mask = loss_mask[:, b].tolist()
            document_ends = None if ends is None else ends[:, b].tolist()
            expected = [has_target(i, k + 1, mask, document_ends, cross_documents) for i in range(length)]
            assert masks[k, :, b].tolist() == expected
    if not cross_documents:
        assert (masks[1:] <= masks[:-1]).all()  # a head with a target has all the heads before it


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_head_masks_keep_the_dtype(dtype):
    masks = head_masks(torch.ones(4, 1).to(dtype), 2, torch.tensor([[0], [1], [0], [0]]).bool())
    assert masks.dtype == dtype and masks.squeeze(-1).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("cross_documents", [False, True])
def test_everything_is_shifted_by_the_given_shift(cross_documents):
    ring = lambda x, k: x.roll(-k, 0)  # noqa: E731  # a sequence that goes on elsewhere, as under context parallelism
    loss_mask = torch.tensor([[1.0], [1.0], [0.0], [1.0]])
    masks = head_masks(loss_mask, 2, None, cross_documents, ring).squeeze(-1)
    if cross_documents:
        assert masks.tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]
    else:
        assert masks.tolist() == [[1, 0, 0, 1], [0, 0, 0, 1]]
