"""Our top-N KL against a third writing of it: the one that megatron-core has for teachers whose logits are on disk.

It takes the teacher's log-probabilities and their ids, and normalises the student over its whole vocabulary. So it is
given a student that has next to nothing outside the set. It computes in fp32, overwrites its input and returns [b, s];
its result has to be summed over the ranks, and each rank differentiates its own part.
"""

from typing import Any

from megatron_mtpd import platform

platform.setup()

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.training.distillation.cached_logits_loss import topk_kl_div  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.losses.objectives import topn_kl  # noqa: E402
from tests.distributed.gloo import run  # noqa: E402

pytestmark = pytest.mark.distributed

N = 7


def both(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of this rank's slice: ours, then Megatron's."""
    group: Any = dist.group.WORLD
    rank, ranks = group.rank(), group.size()
    mine = student.chunk(ranks, -1)[rank].clone().requires_grad_()
    ours = topn_kl(teacher.chunk(ranks, -1)[rank], mine, N, tp_group=group)
    ours.sum().backward()

    top, ids = teacher.topk(N)
    # Not -inf: ids of other ranks are looked up too, and then multiplied by 0.
    restricted = torch.full_like(student, -1e4).scatter(-1, ids, student.gather(-1, ids))
    theirs = restricted.chunk(ranks, -1)[rank].clone().requires_grad_()
    # A clone again: what it overwrites must not be the leaf.
    part = topk_kl_div(theirs.clone(), top.log_softmax(-1), ids, ranks, rank, group).transpose(0, 1)
    part.sum().backward()
    whole = part.detach().contiguous()
    dist.all_reduce(whole)
    assert mine.grad is not None and theirs.grad is not None
    return ours.detach(), mine.grad, whole, theirs.grad


@pytest.mark.parametrize("ranks", [1, 2])
def test_value_and_gradient(ranks):
    generator = torch.Generator().manual_seed(0)
    teacher, student = 2 * torch.randn(2, 5, 3, 20, generator=generator)
    for ours, gradient, theirs, their_gradient in run(both, ranks, teacher, student):
        # Both fp32: sums of seven terms of log-probabilities up to 10, each rounded to 5e-7.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=2e-6)
