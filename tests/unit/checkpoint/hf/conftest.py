from collections.abc import Iterator

import pytest
import torch

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
