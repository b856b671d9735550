from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.generation import candidate_generator

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402

from megatron_mtpd.speculative.loading import start_distributed  # noqa: E402


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """What building a model of ours needs."""
    start_distributed()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def matches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many drafts each step of transformers accepts, as it goes: it keeps no counts itself."""
    found: list[int] = []

    def record(self: Any, input_ids: Any, scores: Any, num_matches: Any) -> None:
        found.append(int(num_matches))

    monkeypatch.setattr(candidate_generator.MTPCandidateGenerator, "update_candidate_strategy", record)
    return found
