"""Acceptance without decoding: one pass over text, where every position starts a draft.

Heads see the true tokens of the text, and a draft counts as accepted where the main head's argmax agrees. On somebody's
text that is not the acceptance of decoding, where the text is the model's own; it is fast, and comparable between the
checkpoints of a run. On what the model itself wrote greedily, it is what greedy decoding accepts, had it started a
draft at every position. The numbers are the model's own report of its loss (`losses.report.LossReport`), the one that
training writes at every validation: there is no second way of counting. The main head's loss stands beside them,
because a model that is easier to predict is also accepted more often.

Deliberately absent: sampling from text, data loading: the caller brings token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import batched
from typing import Any

import torch
from torch import Tensor

from megatron_mtpd.losses.alignment import shift_left
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative.counts import Acceptance, rate, wilson


@dataclass
class TeacherForced:
    """Sums over texts; they add up with `+`. Lists have one entry a head. Pairs of position and target that cross an
    end of document are left out, as in training."""

    acceptance: Acceptance
    """A draft of head k counts where heads 1..k all have a target; `num_drafts` is that of head 1."""
    loss_sum: float = 0.0
    """Cross-entropy of the main head, in nats."""
    loss_tokens: int = 0
    heads_loss_sum: list[float] = field(default_factory=list)
    heads_loss_tokens: list[int] = field(default_factory=list)
    overlap_sum: list[float] = field(default_factory=list)
    """sum_v min(p, q) of main head and head: the acceptance of drafts that are sampled, over the drafts of the head."""

    def __add__(self, other: TeacherForced) -> TeacherForced:
        def added(a: Any, b: Any) -> Any:
            return [x + y for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b

        return TeacherForced(*(added(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def report(self) -> dict[str, Any]:
        """The fields of `Acceptance.report`, the overlap, and the losses in nats a token. CAR_k is of the drafts that
        have k targets."""
        drafted = self.acceptance.num_draft_tokens_per_pos
        cumulative = list(zip(self.acceptance.num_accepted_tokens_per_pos, drafted, strict=True))
        rates = [rate(*pair) for pair in cumulative]
        return {
            "main_loss": self.loss_sum / self.loss_tokens if self.loss_tokens else None,
            "main_loss_tokens": self.loss_tokens,
            "heads_loss": _means(self.heads_loss_sum, self.heads_loss_tokens),
            "overlap": _means(self.overlap_sum, drafted),
            **self.acceptance.report(),
            "cumulative_acceptance_rate": rates,
            "cumulative_acceptance_rate_interval": [wilson(*pair) for pair in cumulative],
            "acceptance_length": 1 + sum(r or 0.0 for r in rates) if drafted and drafted[0] else None,
        }


def _means(sums: list[float], counts: list[int]) -> list[float | None]:
    return [s / n if n else None for s, n in zip(sums, counts, strict=True)]


def measure(model: MTPDModel, texts: Iterable[list[int]], batch_size: int = 8) -> TeacherForced:
    """Acceptance of all heads against the main head on token sequences, and the losses. Every rank's own texts.

    Raises ValueError without any text.
    """
    total = None
    for result in per_batch(model, texts, batch_size):
        total = result if total is None else total + result
    if total is None:
        raise ValueError("There is no text to measure on.")
    return total


@torch.no_grad()
def per_batch(model: MTPDModel, texts: Iterable[list[int]], batch_size: int, given: int = 0) -> Iterator[TeacherForced]:
    """`measure` of each batch of texts, without the first `given` tokens of each, which all the others see."""
    device = next(model.parameters()).device
    for batch in batched(texts, batch_size):
        length = max(len(text) for text in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros(len(batch), length)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, max(0, given - 1) : len(text) - 1] = 1.0  # the last token has no target
        yield _measure(model, ids.to(device), mask.to(device))


def _measure(model: MTPDModel, ids: Tensor, mask: Tensor) -> TeacherForced:
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    labels = shift_left(ids.t(), 1).t()
    losses = model(ids, positions, None, labels=labels, loss_mask=mask)
    loss, tokens = float((losses.float() * mask).sum()), int(mask.sum())
    if not model.mtp_process:
        return TeacherForced(Acceptance.of_heads(0), loss, tokens)
    report = model.loss_report
    assert report is not None, "the model has just computed it"
    drafted, reached, accepted = ([int(n) for n in c] for c in (report.drafted, report.reached, report.cumulative))
    return TeacherForced(
        Acceptance(drafted[0], drafted, reached, accepted),
        loss,
        tokens,
        report.cross_entropy.tolist(),
        [int(n) for n in report.tokens],
        report.overlap.tolist(),
    )
