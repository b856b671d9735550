"""The distillation objectives, as plain readable torch: the reference that every fast path is tested against.

Each takes the logits of a teacher (the main head) and of a student (one head) *for the same target tokens* and returns
one number a position. The teacher is always detached. All are sums over the vocabulary of something that each token
gives by itself, so the same code runs on whole logits and on tensor-parallel slices: `vocab_sum` is the only place that
knows. Inputs are converted to fp32 (fp64 stays), which is also the dtype of the results.

Deliberately absent: alignment, masks, weights and reduction over positions, which are the caller's (`eager.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.losses.vocab_parallel import (
    Group,
    to_slices,
    topn_threshold,
    vocab_gather,
    vocab_max,
    vocab_sum,
)


def _promote(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _below_top(logits: Tensor, tp_group: Group) -> Tensor:
    """Logits minus the largest of their row: the same softmax, without the rounding of large numbers that cancel."""
    return logits - vocab_max(logits, tp_group).unsqueeze(-1)


def log_softmax(logits: Tensor, tp_group: Group = None) -> Tensor:
    """[..., V / tp] -> [..., V / tp]. The same as `torch.log_softmax(full_logits, -1)`, sliced."""
    logits = _below_top(logits, tp_group)
    return logits - to_slices(vocab_sum(logits.exp(), tp_group).log(), tp_group)


def cross_entropy(logits: Tensor, labels: Tensor, tp_group: Group = None) -> Tensor:
    """-log softmax(logits)[label]. [..., V / tp] and int64 [...] -> [...].

    The same as `torch.nn.functional.cross_entropy(full_logits, labels, reduction="none")`, natural logarithm.
    """
    logits = _below_top(_promote(logits), tp_group)
    return vocab_sum(logits.exp(), tp_group).log() - vocab_gather(logits, labels, tp_group)


def _sum_p_times(p: Tensor, x: Tensor, tp_group: Group) -> Tensor:
    """sum_v p_v x_v with 0 * inf = 0: a token without probability contributes nothing, whatever its log-ratio."""
    return vocab_sum(p * torch.where(p > 0, x, 0.0), tp_group)


def forward_kl(log_p: Tensor, log_q: Tensor, tp_group: Group = None) -> Tensor:
    """KL(p || q) = sum_v p (log p - log q), of log-probabilities."""
    return _sum_p_times(log_p.exp(), log_p - log_q, tp_group)


def overlap(log_p: Tensor, log_q: Tensor, tp_group: Group = None) -> Tensor:
    """alpha = sum_v min(p, q) = 1 - TV(p, q), of log-probabilities.

    The exact probability that rejection sampling accepts a draft sampled from q (arXiv 2302.01318).
    """
    return vocab_sum(torch.minimum(log_p, log_q).exp(), tp_group)


def topn_kl(
    teacher_logits: Tensor, student_logits: Tensor, top_n: int, temperature: float = 1.0, tp_group: Group = None
) -> Tensor:
    """KL over the teacher's top-N tokens, both distributions restricted to them and renormalised (arXiv 2603.23911).

        KL( softmax_S(sg(z_teacher) / T) || softmax_S(z_student / T) ) * T^2,    S = top-N tokens of z_teacher

    Shapes [..., V / tp], [..., V / tp] -> [...]. `top_n` at or above the vocabulary gives the full KL. Ties: see
    `topn_threshold`. In plain PyTorch, without ties::

        ids = teacher.topk(n).indices
        F.kl_div(student.gather(-1, ids).log_softmax(-1), teacher.gather(-1, ids).log_softmax(-1),
                 reduction="none", log_target=True).sum(-1)
    """
    # The set is taken on the logits as they came: in bf16 the ties are those that the model really has.
    teacher_logits = teacher_logits.detach()
    outside = teacher_logits < topn_threshold(teacher_logits, top_n, tp_group).unsqueeze(-1)
    teacher = (_promote(teacher_logits) / temperature).masked_fill(outside, float("-inf"))
    student = (_promote(student_logits) / temperature).masked_fill(outside, float("-inf"))
    return forward_kl(log_softmax(teacher, tp_group), log_softmax(student, tp_group), tp_group) * temperature**2


def distillation(teacher_logits: Tensor, student_logits: Tensor, config: MTPDConfig, tp_group: Group = None) -> Tensor:
    """The objective that `config` names, for one head: [..., V / tp], [..., V / tp] -> [...].

    With p the teacher (detached), q the student, both at `config.temperature`, and alpha = sum_v min(p, q):

    ============  =====================================================  ==================================
    topn_kl       see `topn_kl`                                          arXiv 2603.23911
    kl            sum_v p log(p / q), times T^2                          Hinton et al., arXiv 1503.02531
    reverse_kl    sum_v q log(q / p), times T^2                          MiniLLM, arXiv 2306.08543
    tv            1 - alpha                                              DistillSpec, arXiv 2310.08461
    lk            lam * kl + (1 - lam) * tv, lam = exp(-eta * sg(alpha)) LK losses, arXiv 2602.23881
    ============  =====================================================  ==================================

    `e2e_tv` couples the heads and is not a function of one pair: see `e2e_tv`.
    """
    if config.objective == "topn_kl":
        return topn_kl(teacher_logits, student_logits, config.top_n, config.temperature, tp_group)
    log_p, log_q = log_probabilities(teacher_logits, student_logits, config.temperature, tp_group)
    squared = config.temperature**2
    if config.objective == "kl":
        return forward_kl(log_p, log_q, tp_group) * squared
    if config.objective == "reverse_kl":
        return forward_kl(log_q, log_p, tp_group) * squared
    if config.objective == "tv":
        return 1.0 - overlap(log_p, log_q, tp_group)
    if config.objective == "lk":
        alpha = overlap(log_p, log_q, tp_group)
        lam = torch.exp(-config.lk_eta * alpha.detach())
        return lam * forward_kl(log_p, log_q, tp_group) * squared + (1.0 - lam) * (1.0 - alpha)
    raise ValueError(f"objective {config.objective!r} is not a function of one head; use e2e_tv for it.")


def log_probabilities(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0, tp_group: Group = None
) -> tuple[Tensor, Tensor]:
    """log p of the detached teacher and log q of the student over the whole vocabulary, each [..., V / tp]."""
    teacher, student = _promote(teacher_logits.detach()) / temperature, _promote(student_logits) / temperature
    return log_softmax(teacher, tp_group), log_softmax(student, tp_group)


def e2e_tv(alphas: Tensor, masks: Tensor) -> Tensor:
    """The share of drafted tokens that rejection sampling is expected to lose: one number a draft (arXiv 2606.12370).

        1 - (1 / K) * sum_j prod_{i <= j} alpha_i

    `alphas` [K, ...]: `overlap` of each head for the draft that starts at a position; `masks` [K, ...] of 0 and 1:
    whether head k has a target there. K counts the heads that have one, and a draft without any costs 0.
    """
    survival = torch.cumprod(torch.where(masks > 0, alphas, 0.0), dim=0)
    num_heads = masks.sum(0)
    return torch.where(num_heads > 0, 1.0 - survival.sum(0) / num_heads.clamp(min=1), 0.0)
