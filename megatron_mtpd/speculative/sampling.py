"""From logits to tokens: temperature, top-k, top-p, and rejection sampling that leaves the distribution unchanged.

Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): a draft d ~ q is accepted with
probability min(1, p(d) / q(d)); at the first rejection a token is drawn from max(p - q, 0), renormalised; when all are
accepted, from p at the position behind them. The tokens are then distributed as p alone would have drawn them. A draft
that is not drawn but chosen (greedy drafts) is the case of a q with all its mass on d: accepted with p(d).

All randomness comes in as uniform numbers, so that every rank and every test can use the same ones.

Deliberately absent: penalties, beams, and anything that knows of batches or caches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the main head chooses tokens. Raises ValueError for values that cannot work.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens (ties at the k-th all kept); 0 keeps all.
        top_p: keep the most probable tokens until their sum reaches top_p; 1 keeps all.
        sampled_drafts: heads draw their drafts from the same kind of distribution, instead of taking the argmax.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    sampled_drafts: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature is {self.temperature}: give a number of at least 0; 0 is greedy.")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}: give at least 1, or 0 to keep all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}: give a share above 0, up to 1 (all tokens).")
        if self.greedy and (self.sampled_drafts or self.top_k or self.top_p < 1):
            raise ValueError("--draft sampled, --top-k and --top-p need --temperature above 0.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] logits -> [..., V] fp32 probabilities after temperature, then top-k, then top-p. Not at 0."""
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            kth = scaled.topk(self.top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < kth, -math.inf)
        p = scaled.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # mass of the more probable tokens
            p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before >= self.top_p), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inversion: [b, V] weights >= 0, not all 0, and fp64 [b] in [0, 1) -> int64 [b]."""
    cumulative = weights.double().cumsum(-1)
    threshold = (uniform.unsqueeze(-1) * cumulative[..., -1:]).contiguous()
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def verify(p: Tensor, q: Tensor | None, drafts: Tensor, num_drafts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Accept drafts from the left, and draw the token behind them.

    Args:
        p: [b, K + 1, V] the main head's distribution at each draft's position, and behind the last.
        q: [b, K, V] what the drafts were drawn from; None: they were chosen, not drawn.
        drafts: int64 [b, K].
        num_drafts: int64 [b], how many of a row's drafts count (the rest is padding).
        uniform: fp64 [b, K + 1] in [0, 1), independent of the drafts.

    Returns: number of accepted drafts [b], and the next token [b], both int64.
    """
    size = drafts.shape[1]
    wanted = p[:, :size].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    offered = torch.ones_like(wanted) if q is None else q.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    counts = torch.arange(size, device=drafts.device) < num_drafts.unsqueeze(-1)
    accepted = (uniform[:, :size] * offered < wanted) & counts  # u < p / q, without the division
    num_accepted = accepted.long().cumprod(-1).sum(-1)
    rows = torch.arange(len(p), device=p.device)
    target = p[rows, num_accepted]
    rejected = num_accepted < num_drafts
    if size:
        last = num_accepted.clamp(max=size - 1)
        if q is None:
            taken = torch.zeros_like(target).scatter_(-1, drafts[rows, last].unsqueeze(-1), 1.0)
        else:
            taken = q[rows, last]
        residual = (target - taken).clamp(min=0.0)
        # Rounding may leave nothing where p and q are equal: such a draft is rejected with probability ~0.
        usable = (rejected & (residual.sum(-1) > 0)).unsqueeze(-1)
        target = torch.where(usable, residual, target)
    return num_accepted, draw(target, uniform[:, size])
