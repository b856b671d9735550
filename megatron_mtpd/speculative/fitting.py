"""Heads for a trained model in closed form: the linear map that tells most of the main model's next hidden states.

Head k at position i is to say what the main head says at i + k, and has the same output layer: it needs the main
model's hidden state h_{i+k}. It sees the embedding of x_{i+k} and the hidden state of the depth before at i. With the
outputs of its layer's blocks at zero, the layer is an identity, and a head is

    h^k_i = final_layernorm(eh_proj [enorm(embedding(x_{i+k})); hnorm(h^{k-1}_i)]),   h^0 = h.

So `eh_proj` is a linear regression. Its target is h_{i+k} before the weight of the trunk's final norm, which becomes
the head's; its inputs are the model's own on some text; ridge regression has the solution

    W = (X^T X + ridge * mean(diag(X^T X)) * I)^-1 X^T T,

from sums over the text. Heads follow each other, because head k + 1 takes what head k gives. The ridge with the least
error on text held out, a tenth of it, is taken. Nothing is trained: the blocks of the layer start as they are, and
learn from there, because only their last projections are zero.

Deliberately absent: writing a checkpoint (see `checkpoint.replacing`), and the trunk, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative.decoder import Decoder

RIDGES = tuple(10.0**power for power in range(-5, 2))
HELD_OUT = 10
"""One text in so many is held out."""
ZEROED = ("linear_proj.", "linear_fc2.")
"""The last projections of a layer's blocks, in the names of parameters and of a checkpoint's tensors."""


class Fit(NamedTuple):
    """The map of one head."""

    weight: Tensor
    """`eh_proj`'s, fp32 [h, 2h] on the CPU, the embedding's half first."""
    ridge: float
    explained: float
    """Of the held-out targets' sum of squares, the share that the map explains; 1 is all."""


@dataclass
class _Sums:
    """X^T X, X^T T and the sum of T^2, fp64, added up over rows and then over data-parallel ranks."""

    inputs: Tensor
    both: Tensor
    targets: Tensor

    @classmethod
    def of(cls, size: int, device: torch.device) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(2 * size, 2 * size), zeros(2 * size, size), zeros(1))

    def add(self, x: Tensor, t: Tensor) -> None:
        """Rows of inputs [n, 2h] and targets [n, h]."""
        x, t = x.float(), t.float()
        self.inputs += x.t() @ x
        self.both += x.t() @ t
        self.targets += t.square().sum()

    def reduce(self) -> None:
        for tensor in (self.inputs, self.both, self.targets):
            dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())

    def solved(self, ridge: float) -> Tensor:
        """[2h, h]. Raises ValueError where the text does not determine it."""
        scale = self.inputs.diagonal().mean()
        try:
            factor = torch.linalg.cholesky(self.inputs + ridge * scale * torch.eye(len(self.inputs)).to(self.inputs))
        except torch.linalg.LinAlgError as error:
            raise ValueError("The hidden states of this text do not determine a map: give more text.") from error
        return torch.cholesky_solve(self.both, factor)

    def error(self, solution: Tensor) -> float:
        """Sum of squares that a solution leaves."""
        return float(self.targets - 2 * (solution * self.both).sum() + (solution * (self.inputs @ solution)).sum())


@torch.no_grad()
def fit_heads(
    model: MTPDModel,
    texts: Sequence[list[int]],
    vocab_size: int,
    batch_size: int = 8,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[Fit]:
    """Fit all heads of a model to texts, token ids, and give it the result. The model is one that decodes.

    Every data-parallel rank brings its own texts, and all get the same heads. Every `HELD_OUT`-th text is held out.
    Raises ValueError without enough text.
    """
    num_heads = model.config.mtp_num_layers or 0
    texts = usable(texts, num_heads)
    if len(texts) < HELD_OUT:
        raise ValueError(
            f"{len(texts)} texts of more than {num_heads + 1} tokens: give at least {HELD_OUT} on each replica."
        )
    hidden = list(_hidden_states(model, texts, vocab_size, batch_size, progress))
    final_norm: Any = model.decoder.final_norm
    fits, depth = [], hidden
    for head in range(num_heads):
        layer: Any = model.mtp.layers[head]
        device = hidden[0].device
        sums = [_Sums.of(model.config.hidden_size, device) for _ in range(2)]
        for number, (text, before, main) in enumerate(zip(texts, depth, hidden, strict=True)):
            x = _inputs(model, layer, text, before, head + 1)
            sums[_is_held_out(number)].add(x, _unweighted(main[head + 1 :], final_norm))
        for part in sums:
            part.reduce()
        errors = [(sums[1].error(solution := sums[0].solved(ridge)), ridge, solution) for ridge in RIDGES]
        error, ridge, solution = min(errors, key=lambda found: found[0])
        fits.append(Fit(solution.t().float().cpu(), ridge, 1 - error / float(sums[1].targets)))
        _put(layer, fits[-1].weight, final_norm)
        if head + 1 == num_heads:
            break
        weight = solution.to(hidden[0].dtype)
        depth = [
            layer.final_layernorm(_inputs(model, layer, text, before, head + 1) @ weight)
            for text, before in zip(texts, depth, strict=True)
        ]
    return fits


def usable(texts: Sequence[list[int]], num_heads: int) -> list[list[int]]:
    """The texts that have a target for every head."""
    return [text for text in texts if len(text) > num_heads + 1]


def held_out(texts: Sequence[list[int]]) -> list[list[int]]:
    """Those of the usable texts that no head was fitted to."""
    return [text for number, text in enumerate(texts) if _is_held_out(number)]


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


def _hidden_states(
    model: MTPDModel, texts: Sequence[list[int]], vocab_size: int, batch_size: int, progress: Callable[[int], object]
) -> Iterator[Tensor]:
    """The main model's of each text, [s, h], after its final norm."""
    longest = max(len(text) for text in texts)
    decoder = Decoder(model, 0, batch_size, longest + 1, vocab_size)
    for first in range(0, len(texts), batch_size):
        batch = list(texts[first : first + batch_size])
        found = decoder.hidden_states(batch)
        for row, text in enumerate(batch):
            yield found[: len(text), row].clone()
        progress(sum(len(text) for text in batch))


def _inputs(model: MTPDModel, layer: Any, text: list[int], before: Tensor, head: int) -> Tensor:
    """What `eh_proj` of a head, counted from 1, is given at all positions that have a target, [s - head, 2h]."""
    ids = torch.tensor([text[head:]], device=before.device)
    embedded = model.embedding(input_ids=ids, position_ids=torch.zeros_like(ids))[:, 0]
    return torch.cat([layer.enorm(embedded), layer.hnorm(before[: len(text) - head])], -1)


def _unweighted(hidden: Tensor, norm: Any) -> Tensor:
    """Before the norm's weight and bias. A channel that the weight switches off has nothing to tell: zero."""
    weight = norm.weight.float()
    hidden = hidden.float() - norm.bias.float() if getattr(norm, "bias", None) is not None else hidden.float()
    on = weight.abs() > 1e-3 * weight.abs().mean()
    return torch.where(on, hidden / torch.where(on, weight, 1.0), 0.0)


def _put(layer: Any, weight: Tensor, final_norm: Any) -> None:
    """Make a head of the model what was fitted."""
    rows, rank = layer.eh_proj.weight.shape[0], parallel_state.get_tensor_model_parallel_rank()
    layer.eh_proj.weight.copy_(weight[rank * rows : (rank + 1) * rows])
    for name, parameter in layer.named_parameters():
        if any(part in name for part in ZEROED):
            parameter.zero_()
    layer.final_layernorm.load_state_dict(final_norm.state_dict())
