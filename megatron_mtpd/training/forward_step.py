"""The forward step and the loss function that Megatron's training loop calls for every micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, get_timers
from torch import Tensor

from megatron_mtpd.data.datasets import get_batch
from megatron_mtpd.losses.report import LossReport
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.training.metrics import metrics_from_report


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One micro-batch through the model: its output, and the function that turns the output into loss and metrics."""
    timers = get_timers()
    core: MTPDModel = get_attr_wrapped_model(model, "mtpd", return_model_obj=True)
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, vp_stage=core.vp_stage)
    timers("batch-generator").stop()
    core.iteration = _iteration()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"], core)


def loss_func(loss_mask: Tensor, model: MTPDModel, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the per-token losses over the unmasked tokens, their number, and the metrics as pairs (sum, count).

    Megatron divides by the number of tokens, of the micro-batch or with --calculate-per-token-loss of the global batch.
    """
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().int()
    report = model.loss_report
    assert report is not None, "the model has just computed it"
    _stop_at_nan(loss, report)
    metrics = metrics_from_report(report)
    if model.mtpd.next_objective is not None:
        has_switched = model.iteration >= model.mtpd.next_objective_start
        metrics["objective"] = loss.new_tensor([1.0 + has_switched, 1.0])
    return loss, num_tokens, metrics


def _iteration() -> int:
    """Of training, counted from 0. A loop that only evaluates knows that of the checkpoint."""
    args = get_args()
    return max(getattr(args, "curr_iteration", 0), getattr(args, "iteration", 0))


def _stop_at_nan(loss: Tensor, report: LossReport) -> None:
    if not get_args().check_for_nan_in_loss_and_grad:
        return
    heads = report.cross_entropy.sum() + report.distillation.sum()
    checked = {"loss of the main head": loss, "loss of the heads": heads}
    for name, value in checked.items():
        for reject, problem in ((torch.isnan, "NaN"), (torch.isinf, "infinite")):
            get_rerun_state_machine().validate_result(
                result=value, rejection_func=reject, message=f"found {problem} {name}", tolerance=0.0, fatal=True
            )
