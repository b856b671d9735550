"""Acceptance without decoding: one pass over text, where every position starts a draft.

Heads see the true tokens of the text, and a draft counts as accepted where the main head's argmax agrees. So it is not
the acceptance of decoding, where the text is the model's own and greedy; it is fast, comparable between the checkpoints
of a run, and the same measure that training reports (`losses.report`). The main head's loss stands beside it, because a
model that is easier to predict is also accepted more often.

Deliberately absent: sampling from text, data loading: the caller brings token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import batched

import torch
from torch import Tensor

from megatron_mtpd.losses.alignment import head_masks, shift_left
from megatron_mtpd.losses.vocab_parallel import vocab_argmax, vocab_gather, vocab_logsumexp
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative.counts import Acceptance


@dataclass
class TeacherForced:
    """Sums over texts. Pairs of position and target that cross an end of document are left out, as in training."""

    acceptance: Acceptance
    loss_sum: float = 0.0
    """Cross-entropy of the main head, in nats."""
    loss_tokens: int = 0
    heads_loss_sum: list[float] = field(default_factory=list)
    heads_loss_tokens: list[int] = field(default_factory=list)

    def report(self) -> dict:
        """The fields of `Acceptance.report` and the losses in nats a token."""
        heads = zip(self.heads_loss_sum, self.heads_loss_tokens, strict=True)
        return {
            "main_loss": self.loss_sum / self.loss_tokens if self.loss_tokens else None,
            "main_loss_tokens": self.loss_tokens,
            "heads_loss": [s / n if n else None for s, n in heads],
            **self.acceptance.report(),
        }


def measure(model: MTPDModel, texts: Iterable[list[int]], batch_size: int = 8, eod: int | None = None) -> TeacherForced:
    """Acceptance of all heads against the main head on token sequences, and the losses. Every rank's own texts.

    A draft is counted where all heads have a target; heads are then counted up to the first that fails.
    """
    total = None
    for result in per_batch(model, texts, batch_size, eod):
        total = result if total is None else add(total, result)
    if total is None:
        raise ValueError("There is no text to measure on.")
    return total


def add(a: TeacherForced, b: TeacherForced) -> TeacherForced:
    return TeacherForced(
        a.acceptance + b.acceptance,
        a.loss_sum + b.loss_sum,
        a.loss_tokens + b.loss_tokens,
        [x + y for x, y in zip(a.heads_loss_sum, b.heads_loss_sum, strict=True)],
        [x + y for x, y in zip(a.heads_loss_tokens, b.heads_loss_tokens, strict=True)],
    )


@torch.no_grad()
def per_batch(
    model: MTPDModel, texts: Iterable[list[int]], batch_size: int, eod: int | None
) -> Iterator[TeacherForced]:
    """`measure` of each batch of texts."""
    device = next(model.parameters()).device
    for batch in batched(texts, batch_size):
        length = max(len(text) for text in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros(len(batch), length)
        for row, text in enumerate(batch):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text) - 1] = 1.0  # the last token has no target
        yield _measure(model, ids.to(device), mask.to(device), eod)


def _measure(model: MTPDModel, ids: Tensor, mask: Tensor, eod: int | None) -> TeacherForced:
    tp_group = model.pg_collection.tp if model.parallel_output else None
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    main, heads, _ = model.hidden_states_of_all_heads(ids, positions, None)
    size, num_heads = ids.shape[1], len(heads)
    ends = None if eod is None else (ids == eod).t()
    targets = shift_left(ids.t(), 1)
    logits = model.logits(main).float()
    choices = vocab_argmax(logits, tp_group)
    loss = (vocab_logsumexp(logits, tp_group) - vocab_gather(logits, targets, tp_group)) * mask.t()
    masks = head_masks(mask.t(), num_heads, ends, False)
    agree, sums, tokens = [], [], []
    for k, hidden in enumerate(heads, 1):
        logits = model.logits(hidden).float()
        ahead, target = shift_left(choices, k), shift_left(targets, k)
        head_loss = (vocab_logsumexp(logits, tp_group) - vocab_gather(logits, target, tp_group)) * masks[k - 1]
        agree.append(vocab_argmax(logits, tp_group) == ahead)
        sums.append(head_loss.sum().item())
        tokens.append(int(masks[k - 1].sum()))
    counts = Acceptance.of_heads(num_heads)
    if num_heads and size:
        drafts = masks.prod(0) > 0
        accepted = torch.stack(agree).long().cumprod(0).sum(0)[drafts]
        histogram = accepted.bincount(minlength=num_heads + 1)
        at_least = histogram.flip(0).cumsum(0).flip(0).tolist()  # drafts with at least so many accepted
        counts = Acceptance(at_least[0], [at_least[0]] * num_heads, at_least[:-1], at_least[1:])
    return TeacherForced(counts, loss.sum().item(), int(mask.sum()), sums, tokens)
