"""The losses once more, as naively as they can be said: float64, a row or a position at a time, Python's own sorting.

Nothing of the package is used but the names of its options, so agreement with it means something. Which pairs of
position and target count follows the words of the method: nothing between them is masked or ends a document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def top_set(row: Tensor, n: int) -> list[int]:
    """Ids of the n largest logits of a row, with all that equal the n-th."""
    values = row.tolist()
    nth = sorted(values, reverse=True)[min(n, len(values)) - 1]
    return [i for i, v in enumerate(values) if v >= nth]


def topn_kl(teacher: Tensor, student: Tensor, n: int, temperature: float = 1.0) -> Tensor:
    """KL over the teacher's top set; of rows [V]."""
    ids = torch.tensor(top_set(teacher, n))
    log_p = (teacher[ids] / temperature).log_softmax(-1)
    log_q = (student[ids] / temperature).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


def objective(name: str, teacher: Tensor, student: Tensor, *, n: int, temperature: float, eta: float) -> Tensor:
    """One number for one row [V]."""
    if name == "topn_kl":
        return topn_kl(teacher, student, n, temperature)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    squared = temperature**2
    if name == "kl":
        return (p * (p / q).log()).sum() * squared
    if name == "reverse_kl":
        return (q * (q / p).log()).sum() * squared
    tv = (p - q).abs().sum() / 2
    if name == "tv":
        return tv
    assert name == "lk"
    lam = math.exp(-eta * (1 - tv.item()))
    return lam * (p * (p / q).log()).sum() * squared + (1 - lam) * tv


def acceptance(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v min(p, q) of rows [V], by its other form 1 - TV."""
    return 1 - ((teacher / temperature).softmax(-1) - (student / temperature).softmax(-1)).abs().sum() / 2


def rows(function, teacher: Tensor, student: Tensor, *args, **kwargs) -> Tensor:
    """A function of two rows [V], for every row of [..., V], with the teacher detached."""
    flat = zip(teacher.detach().flatten(0, -2), student.flatten(0, -2), strict=True)
    return torch.stack([function(t, z, *args, **kwargs) for t, z in flat]).reshape(teacher.shape[:-1])


def has_target(i: int, k: int, loss_mask: list[float], document_ends: list[bool] | None, cross_documents: bool) -> bool:
    """Whether head k at position i of one sequence has a target that it may learn from."""
    if i + k >= len(loss_mask):
        return False
    if cross_documents:
        return loss_mask[i + k] == 1
    between = range(i, i + k + 1)
    return all(loss_mask[j] == 1 and not (document_ends and document_ends[j]) for j in between)


@dataclass
class Result:
    """`total` is what is differentiated; the rest is what the report holds, heads from 0."""

    total: Tensor
    main_loss: float = 0.0
    main_tokens: float = 0.0
    cross_entropy: list[float] = field(default_factory=list)
    distillation: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    cumulative: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    cumulative_overlap: list[float] = field(default_factory=list)
    tokens_per_step: float = 0.0
    tokens_per_step_sampled: float = 0.0


def mtpd_loss(
    main: Tensor,
    heads: list[Tensor],
    labels: Tensor,
    loss_mask: Tensor,
    document_ends: Tensor | None,
    config,
    alpha: list[float],
    beta: list[float],
    per_head_mean: bool = True,
) -> Result:
    """The whole loss, (main * loss_mask).sum() + heads, of [s, b, V] logits in float64."""
    length, batch, _ = main.shape
    num_heads = len(heads)
    options = {"n": config.top_n, "temperature": config.temperature, "eta": config.lk_eta}
    counts: dict[tuple[int, int], list[int]] = {}  # (position, sequence) -> heads with a target there, from 0
    for i in range(length):
        for b in range(batch):
            ends = None if document_ends is None else document_ends[:, b].tolist()
            mask = loss_mask[:, b].tolist()
            counts[i, b] = [k for k in range(num_heads) if has_target(i, k + 1, mask, ends, config.cross_documents)]
    zero = main.new_zeros(())
    cross_entropy, distillation = [zero] * num_heads, [zero] * num_heads
    tokens = [0.0] * num_heads
    names = ("drafted", "accepted", "reached", "cumulative", "overlap", "cumulative_overlap")
    sums: dict[str, list[float]] = {name: [0.0] * num_heads for name in names}
    steps = steps_sampled = 0.0
    for (i, b), present in counts.items():
        alphas = []
        for k in present:
            j = i + k + 1
            teacher, student = main[j, b].detach(), heads[k][i, b]
            tokens[k] += 1
            cross_entropy[k] = cross_entropy[k] + F.cross_entropy(student, labels[j, b])
            if config.objective != "e2e_tv":
                distillation[k] = distillation[k] + objective(config.objective, teacher, student, **options)
        survives, survives_sampled = True, 1.0
        accepted, expected = 0, 0.0
        chain = zero + 1.0
        survival = []
        for k in range(num_heads):
            if k not in present:
                break  # a draft ends with the first head that has no target
            teacher, student = main[i + k + 1, b].detach(), heads[k][i, b]
            alphas.append(acceptance(teacher, student, config.temperature))
            chain = chain * alphas[-1]
            survival.append(chain)
            agrees = _argmax(teacher) == _argmax(student)
            sampled = acceptance(teacher, student.detach()).item()
            sums["drafted"][k] += 1
            sums["accepted"][k] += agrees
            sums["reached"][k] += survives
            survives = survives and agrees
            survives_sampled *= sampled
            sums["cumulative"][k] += survives
            sums["overlap"][k] += sampled
            sums["cumulative_overlap"][k] += survives_sampled
            accepted += survives
            expected += survives_sampled
        if len(survival) == num_heads:
            steps += 1 + accepted
            steps_sampled += 1 + expected
        if survival and config.objective == "e2e_tv":
            lost = 1 - sum(survival, zero) / len(survival)
            for k in present:
                distillation[k] = distillation[k] + lost
    main_losses = F.cross_entropy(main.flatten(0, 1), labels.flatten(), reduction="none").reshape(length, batch)
    main_loss, main_tokens = (main_losses * loss_mask).sum(), loss_mask.sum().item()
    scale = [main_tokens / max(n, 1) if per_head_mean else 1.0 for n in tokens]
    total = main_loss
    for k in range(num_heads):
        total = total + alpha[k] * scale[k] * cross_entropy[k]
        if config.objective != "e2e_tv":
            total = total + beta[k] * scale[k] * distillation[k]
    if config.objective == "e2e_tv":
        total = total + sum(beta) * scale[0] * distillation[0]
    return Result(
        total,
        main_loss.item(),
        main_tokens,
        [x.item() for x in cross_entropy],
        [x.item() for x in distillation],
        tokens,
        tokens_per_step=steps,
        tokens_per_step_sampled=steps_sampled,
        **sums,
    )


def _argmax(row: Tensor) -> int:
    values = row.tolist()
    return values.index(max(values))
