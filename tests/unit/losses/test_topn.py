"""The top-N cut against sorting: the set must be the same, ties included, for every dtype and distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_mtpd.losses import topn
from megatron_mtpd.losses.topn import topn_cut

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROWS, VOCAB = 6, 1501


def distributions(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    everything = {
        "normal": normal,
        "skewed": normal.exp(),
        "heavy_tails": normal**5 * 10,
        "few_values": normal.round(),
        "constant": torch.zeros_like(normal),
        "negative": -normal.abs() - 5,
        "sorted": normal.sort().values,
        "tiny": normal * 1e-7,
        "one_peak": normal * 1e-3 + torch.eye(ROWS, VOCAB) * 1e4,
        "minus_infinity": torch.where(normal > -0.5, normal, -torch.inf),
        "signed_zeros": torch.where(normal > 0, 0.0, -0.0),
        "rows_unlike": normal * 10.0 ** torch.arange(ROWS).view(-1, 1) - 100,
    }
    return {name: x.to(dtype) for name, x in everything.items()}


def expected_set(logits: Tensor, n: int) -> Tensor:
    nth = logits.sort(-1, descending=True).values[:, min(n, logits.shape[-1]) - 1]
    return logits >= nth.unsqueeze(-1)


@pytest.mark.parametrize("name", distributions(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_set_is_that_of_sorting(dtype, name):
    logits = distributions(dtype)[name]
    for n in (1, 2, 17, VOCAB // 3, VOCAB - 1, VOCAB, 10 * VOCAB):
        cut = topn_cut(logits, n)
        assert cut.dtype == dtype and cut.shape == (ROWS,)
        assert torch.equal(logits >= cut.unsqueeze(-1), expected_set(logits, n)), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coarse_numbers_in_a_finer_dtype(dtype):
    """bf16 logits that are held in fp32 have the same set as in bf16, and there are fewer floats to search."""
    for logits in distributions(dtype).values():
        for n in (1, 100, 700):
            cut = topn_cut(logits.float(), n, dtype=dtype)
            assert torch.equal(logits.float() >= cut.unsqueeze(-1), expected_set(logits, n))


def test_the_number_of_probes_is_small(monkeypatch):
    """Few on what logits look like; never more than ten and two for each bit, however they are distributed."""
    probes = 0
    original = topn._count

    def counted(*arguments):
        nonlocal probes
        probes += 1
        return original(*arguments)

    monkeypatch.setattr(topn, "_count", counted)
    for name, logits in distributions(torch.float32).items():
        for n in (1, 17, VOCAB // 3):
            probes = 0
            topn_cut(logits, n)
            assert probes <= (25 if name == "normal" else 10 + 2 * 32), name


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="top-n of 0"):
        topn_cut(torch.zeros(1, 3), 0)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60),
    n=st.integers(1, 70),
)
def test_any_row(values, n):
    logits = torch.tensor([values], dtype=torch.float32)
    cut = topn_cut(logits, n)
    assert torch.equal(logits >= cut.unsqueeze(-1), expected_set(logits, n))
