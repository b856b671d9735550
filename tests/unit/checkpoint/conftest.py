from collections.abc import Iterator

import pytest
import torch

from megatron_mtpd import platform


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """torch.distributed with one process, which Megatron's checkpoints need."""
    platform.setup()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _same_weights_every_time() -> None:
    torch.manual_seed(0)
