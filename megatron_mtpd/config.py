"""Every knob of the method in one frozen dataclass, `MTPDConfig`.

The command-line flags (`--mtpd-*`), their help, the checks and the documentation all come from the fields below: adding
an option is one edit here. What belongs to Megatron (number of heads, learning rate, parallel sizes) is not repeated.

A *share* says how much of a gradient passes a boundary, from 0 (cut) to 1 (whole): the forward pass never changes.
There are three things that the heads share with the main model, the trunk, the embedding and the output layer, and two
losses that reach them, the heads' cross-entropy (`ce`) and the distillation (`kd`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

Objective = Literal["topn_kl", "kl", "reverse_kl", "tv", "lk", "e2e_tv"]
Trained = Literal["all", "heads", "new-heads"]
LossImplementation = Literal["fused", "eager"]
PerHead = float | Sequence[float]
"""One number for all heads, or one a head. A config keeps it as a tuple."""


@dataclass(frozen=True)
class MTPDConfig:
    """Options of multi-token prediction with self-distillation (MTP-D).

    The loss is `CE(main) + sum_k [alpha_k CE(head k) + beta_k D_k]`, where `D_k` compares head k with the main head at
    the same target token (arXiv 2603.23911). Raises ValueError, naming the option, its value and the remedy.
    """

    loss: LossImplementation = "fused"
    """How the loss is computed. fused: chunk by chunk from the hidden states, never holding all logits. eager: on the
    logits of all heads, the reference."""

    objective: Objective = "topn_kl"
    """Distillation objective D_k. topn_kl: forward KL over the main head's top-N tokens (the paper). kl, reverse_kl,
    tv, lk, e2e_tv: over the whole vocabulary."""

    next_objective: Objective | None = None
    """Objective that takes the first one's place at --mtpd-next-objective-start. Total variation trains badly from
    scratch: warm up with a KL, then tv or e2e_tv (arXiv 2602.23881). The weights stay as they are."""

    next_objective_start: int = 0
    """Iteration, counted from 0, at which --mtpd-next-objective begins. It follows from the iteration alone, so a run
    that is resumed switches where the whole run would have."""

    top_n: int = 10_000
    """N of topn_kl: how many tokens of the main head's distribution are distilled, ties at the N-th all counted; capped
    at the vocabulary size."""

    alpha: PerHead | None = None
    """Weight of each head's cross-entropy: one value for all heads or one per head. Default:
    --mtp-loss-scaling-factor divided by the number of heads, as in Megatron."""

    beta: PerHead | None = None
    """Weight of each head's distillation: one value for all heads or one per head. 0, with a
    --mtpd-ce-output-share of 1, is plain MTP. Default: 1.0 with
    one head, 0.5 with more (the paper's values for 1 and 4 heads)."""

    head_decay: float = 1.0
    """Multiplies both weights of head k by this number to the power of k - 1, so that later heads weigh less; 0.6 is
    that of FastMTP (arXiv 2509.18362). Not together with weights that are given per head. The objective e2e_tv has one
    term for all heads, with the sum of their weights."""

    temperature: float = 1.0
    """Temperature of both distributions in the distillation; its KL terms are multiplied by the temperature squared,
    so that their gradient keeps its size."""

    lk_eta: float = 3.0
    """eta of the lk objective: lambda = exp(-eta * alpha) weighs KL against total variation (arXiv 2602.23881)."""

    ce_trunk_share: float = 1.0
    """Share of the heads' cross-entropy gradient that reaches the trunk (the main model's hidden states)."""

    ce_embedding_share: float = 1.0
    """Share of the heads' cross-entropy gradient that reaches the embedding."""

    ce_output_share: float = 0.0
    """Share of the heads' cross-entropy gradient that reaches the output layer. The output layer is the main head's
    own, and what the heads teach it costs the main head most: see examples/frontier."""

    kd_trunk_share: float = 1.0
    """Share of the distillation's gradient that reaches the trunk. Other than ce_trunk_share it costs a second pass of
    the heads, because the two gradients then have to be carried through them apart."""

    kd_embedding_share: float = 1.0
    """Share of the distillation's gradient that reaches the embedding. Other than ce_embedding_share it costs a second
    pass of the heads."""

    kd_output_share: float = 0.0
    """Share of the distillation's gradient that reaches the output layer."""

    train: Trained = "all"
    """What is trained: all; heads: the trunk, embedding and output layer are frozen; new-heads: the first
    --mtpd-old-heads heads are frozen too, as after looped extension."""

    old_heads: int = 0
    """Number of heads, from the first, that --mtpd-train new-heads keeps as they are."""

    clip_apart: bool = True
    """Clip the heads' gradients by their own norm and the trunk's by its own (--clip-grad for each), so that the number
    of heads does not change the main model's steps."""

    distill_start: int | None = None
    """Iteration at which the distillation begins; before it, training is plain MTP. A main head that is still bad is a
    bad teacher, and pays for teaching: see examples/frontier. Default: the last third of --train-iters; the first
    iteration where the main model is frozen."""

    distill_ramp: int = 0
    """Iterations over which the distillation's weight then grows linearly from 0 to beta."""

    on_policy_fraction: float = 0.0
    """Fraction of the positions at which heads 2 and up are fed drafts in training, as in decoding: head k gets the
    embedding of the token that head k - 1 ranks highest there, in the place of the text's. The positions are drawn
    anew each iteration, the same for all sequences. No gradient passes through a draft. Labels and masks stay the
    text's, and the main head at the target, which is the teacher, has seen the text and not the draft: others report
    that it hurts. Metrics of training include those positions; in evaluation heads see the text alone. Costs the
    output layer's product for K - 1 heads once more, without a gradient."""

    cross_documents: bool = False
    """Let a head predict across a document end or a masked position, as Megatron's plain MTP does. By default no pair
    of position and target has one between them."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            self._refuse("objective", f"choose one of {', '.join(get_args(Objective))}")
        if self.next_objective not in (None, *get_args(Objective)):
            self._refuse("next_objective", f"choose one of {', '.join(get_args(Objective))}")
        if self.loss not in get_args(LossImplementation):
            self._refuse("loss", f"choose one of {', '.join(get_args(LossImplementation))}")
        if self.train not in get_args(Trained):
            self._refuse("train", f"choose one of {', '.join(get_args(Trained))}")
        if self.old_heads < 0 or (self.old_heads > 0) != (self.train == "new-heads"):
            self._refuse("old_heads", "with --mtpd-train new-heads give the number of trained heads, at least 1")
        if self.top_n < 1:
            self._refuse("top_n", "give a number of tokens of at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            self._refuse("temperature", "give a positive number; 1 is the paper's")
        if not (math.isfinite(self.lk_eta) and self.lk_eta >= 0):
            self._refuse("lk_eta", "give a number of at least 0; 3 is the published value")
        for name in ("alpha", "beta"):
            self._keep_per_head(name)
        if not 0.0 < self.head_decay <= 1.0:
            self._refuse("head_decay", "give a number above 0 and up to 1, which is no decay")
        if not 0.0 <= self.on_policy_fraction <= 1.0:
            self._refuse("on_policy_fraction", "give a fraction between 0 (the text alone) and 1 (drafts alone)")
        for name in SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                self._refuse(name, "give a share between 0 (cut) and 1 (whole)")
        for name in ("distill_start", "distill_ramp", "next_objective_start"):
            if (getattr(self, name) or 0) < 0:
                self._refuse(name, "give a number of iterations of at least 0")
        if self.next_objective is None and self.next_objective_start:
            self._refuse("next_objective_start", "say with --mtpd-next-objective what begins there")
        if self.next_objective is not None and self.next_objective_start <= self._first_distilled:
            self._refuse(
                "next_objective_start",
                f"give an iteration after --mtpd-distill-start {self._first_distilled}, or set --mtpd-objective "
                f"{self.next_objective} from the start",
            )

    @classmethod
    def as_published(cls, **options: Any) -> Self:
        """The paper's choices where the defaults differ: the heads teach the output layer too, and the distillation
        runs from the first iteration."""
        return cls(**{"ce_output_share": 1.0, "kd_output_share": 1.0, "distill_start": 0, **options})

    @property
    def _first_distilled(self) -> int:
        return self.distill_start or 0  # who knows how long training is has filled it in

    def _refuse(self, name: str, remedy: str) -> None:
        raise ValueError(f"{flag(name)} is {getattr(self, name)!r}: {remedy}.")

    def _keep_per_head(self, name: str) -> None:
        """Check one of the weights and keep it as a tuple: a list could be changed behind our back."""
        value = getattr(self, name)
        if value is None:
            return
        values = (value,) if isinstance(value, int | float) else tuple(value) if isinstance(value, Sequence) else ()
        if not values or not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in values):
            self._refuse(name, "give one number of at least 0, or one per head")
        if len(values) > 1 and self.head_decay != 1.0:
            self._refuse(
                name, f"--mtpd-head-decay {self.head_decay} needs one number for all heads; remove one of them"
            )
        object.__setattr__(self, name, tuple(float(v) for v in values))

    def alphas(self, num_heads: int, mtp_loss_scaling_factor: float) -> tuple[float, ...]:
        """Cross-entropy weight of each head. Shape [num_heads]."""
        return self._per_head("alpha", (mtp_loss_scaling_factor / num_heads,), num_heads)

    def betas(self, num_heads: int) -> tuple[float, ...]:
        """Distillation weight of each head, at full strength. Shape [num_heads]."""
        return self._per_head("beta", (1.0 if num_heads == 1 else 0.5,), num_heads)

    def _per_head(self, name: str, default: tuple[float, ...], num_heads: int) -> tuple[float, ...]:
        values: tuple[float, ...] = getattr(self, name) or default
        if len(values) == 1:
            return tuple(values[0] * self.head_decay**k for k in range(num_heads))
        if len(values) != num_heads:
            self._refuse(name, f"the model has {num_heads} heads; give one number, or {num_heads} of them")
        return values

    def at(self, iteration: int) -> Self:
        """These options with the `objective` of an iteration counted from 0."""
        if self.next_objective is None or iteration < self.next_objective_start:
            return self
        return replace(self, objective=self.next_objective, next_objective=None, next_objective_start=0)

    def distill_scale(self, iteration: int) -> float:
        """Factor on every beta at an iteration counted from 0: 0 before `distill_start`, then a ramp to 1.

        The first iteration of a ramp of R has weight 1/R, the R-th has weight 1.
        """
        if iteration < self._first_distilled:
            return 0.0
        if self.distill_ramp == 0:
            return 1.0
        return min(1.0, (iteration - self._first_distilled + 1) / self.distill_ramp)

    @property
    def heads_pass_twice(self) -> bool:
        """Whether cross-entropy and distillation need passes of their own through the heads."""
        return (self.ce_trunk_share, self.ce_embedding_share) != (self.kd_trunk_share, self.kd_embedding_share)


SHARES = tuple(f.name for f in fields(MTPDConfig) if f.name.endswith("_share"))


def flag(name: str) -> str:
    """The command-line flag of a field: `top_n` -> `--mtpd-top-n`."""
    return "--mtpd-" + name.replace("_", "-")
