"""One training step of the toy in any parallel layout: what the equivalence tests compare.

    result = train(Layout(tp=2, sequence_parallel=True), Toy(tied=True))
    result.metrics, result.gradients, result.weights, result.norms

`step` runs on every rank of `gloo.run`: it builds the model by its builder, under Megatron's DDP, and takes one global batch
through Megatron's schedule with our forward step and loss function. Gradients and weights are known by the names and
places that they have in a *checkpoint*, which mean the same in every layout: `train` puts the slices of all ranks
together, and checks that the copies of a slice agree.

Deliberately absent: `megatron.training.pretrain`, which tests/e2e runs.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training import global_vars  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.data.datasets import get_batch  # noqa: E402
from megatron_mtpd.training.forward_step import forward_step  # noqa: E402
from tests.distributed import gloo  # noqa: E402
from tests.distributed.toy import HEADS, SAMPLES, SEQUENCE, Layout, Toy, initial_weight, model_config, samples  # noqa: E402

LEARNING_RATE = 1.0
ADAM_EPS = 1.0  # as large as the gradients: Adam's own would turn the sign of a rounding error into a whole step


class Slice(NamedTuple):
    """A rank's part of a tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]  # of the whole
    place: tuple[slice, ...]
    value: Tensor


class Rank(NamedTuple):
    """What one rank knows of a step."""

    metrics: dict[str, Tensor]  # pairs (sum, count); empty but on the last stage's first tensor-parallel ranks
    gradients: list[Slice]
    weights: list[Slice]
    norms: dict[str, float]


class Step(NamedTuple):
    """What a step did, the same in every layout."""

    metrics: dict[str, Tensor]  # pairs (sum, count) over the global batch
    gradients: dict[str, Tensor]  # before clipping, of the last step
    weights: dict[str, Tensor]  # after the optimizer's steps, empty without
    norms: dict[str, float]  # of the gradients, by the group that is clipped together, empty without


def train(layout: Layout, toy: Toy) -> Step:
    """Train on as many ranks as the layout has, and put together what they know."""
    ranks: list[Rank] = gloo.run(step, layout.ranks, layout, toy)
    metrics: dict[str, Tensor] = {}
    for rank in ranks:
        for name, pair in rank.metrics.items():
            metrics[name] = metrics.get(name, 0) + pair
    assert all(rank.norms == ranks[0].norms for rank in ranks), [rank.norms for rank in ranks]
    gradients, weights = ([part for rank in ranks for part in field] for field in zip(*(r[1:3] for r in ranks), strict=True)) if False else (
        [rank.gradients for rank in ranks],
        [rank.weights for rank in ranks],
    )
    return Step(metrics, _whole(gradients), _whole(weights), ranks[0].norms)
