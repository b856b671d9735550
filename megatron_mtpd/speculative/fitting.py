"""Heads for a trained model in closed form: linear maps that tell most of the main model's next hidden states.

Head k at position i is to say what the main head says at i + k, and has the same output layer: it needs the main
model's hidden state h_{i+k}. It sees the embedding of x_{i+k} and the hidden state of the depth before at i, and is a
sum that is then normed:

    u = [enorm(embedding(x_{i+k})); hnorm(h^{k-1}_i)],   h^0 = h
    y = eh_proj u + linear_proj a + linear_fc2 m,   h^k_i = final_layernorm(y),

where a is what its attention gives, and m what the first projection and the activation of its MLP give. So each of the
three last projections is a linear regression, one after the other, on what those before it leave: with those behind it
at zero, a and m depend on what is fitted already. What makes a and m, attention's own projections and the MLP's first,
stays as it is: copies of the trunk's last layer have more to tell than random weights.

The target of y is h_{i+k} before the weight of the trunk's final norm, which becomes the head's; the inputs are the
model's own on some text. Ridge regression of targets T on inputs X has the solution

    W = (X^T X + ridge * mean(diag(X^T X)) * I)^-1 X^T T,

from sums over the text. Heads follow each other, because head k + 1 takes what head k gives. The ridge with the least
error on text held out, a tenth of it, is taken. Nothing is trained; training goes on from there.

Deliberately absent: experts, whose last projections become zero, and learn from there; writing a checkpoint (see
`checkpoint.replacing`); and the trunk, which stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.layers import Part

RIDGES = tuple(10.0**power for power in range(-5, 2))
HELD_OUT = 10
"""One text in so many is held out."""
FITTED = ("eh_proj", "self_attention.linear_proj", "mlp.linear_fc2")
"""The ends of the names of the linear maps, in the order that they are fitted in. One that a head has more than once,
or not at all, is left out."""
ZEROED = ("linear_proj.", "linear_fc2.")
"""The last projections of a layer's blocks, in the names of parameters and of a checkpoint's tensors: zero where they
are not fitted."""


@dataclass
class Fit:
    """The maps of one head, by their names in `FITTED`."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """fp32 [out, in] on the CPU."""
    ridge: dict[str, float] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    """Of the held-out targets' sum of squares, the share that this map and those before it explain; 1 is all."""


@dataclass
class _Sums:
    """X^T X, X^T T and the sum of T^2, fp64, added up over rows and then over data-parallel ranks."""

    inputs: Tensor
    both: Tensor
    targets: Tensor

    @classmethod
    def of(cls, size: int, out: int, device: torch.device) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zeros(size, size), zeros(size, out), zeros(1))

    def add(self, x: Tensor, t: Tensor) -> None:
        """Rows of inputs [n, in] and targets [n, out]."""
        x, t = x.float(), t.float()
        self.inputs += x.t() @ x
        self.both += x.t() @ t
        self.targets += t.square().sum()

    def reduce(self) -> None:
        for tensor in (self.inputs, self.both, self.targets):
            dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group())

    def solved(self, ridge: float) -> Tensor:
        """[in, out]. Raises ValueError where the text does not determine it."""
        matrix = self.inputs.clone()
        matrix.diagonal().add_(ridge * self.inputs.diagonal().mean())
        try:
            factor = torch.linalg.cholesky(matrix)
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
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], object]]] = lambda *_: nullcontext(int),
) -> list[Fit]:
    """Fit all heads of a model to texts, token ids, and give it the result. The model is one that decodes.

    Every data-parallel rank brings its own texts, and all get the same heads. Every `HELD_OUT`-th text is held out.
    `progress` is given the name of a part of the work and how many tokens it will pass over, and gives what is called
    with each number of tokens done.
    Raises ValueError without enough text, and for heads that share one layer.
    """
    num_heads = model.config.mtp_num_layers or 0
    if model.config.mtp_use_repeated_layer:
        raise ValueError("Trained with --mtp-use-repeated-layer: heads that are one cannot be fitted each.")
    texts = usable(texts, num_heads)
    if len(texts) < HELD_OUT:
        raise ValueError(
            f"{len(texts)} texts of more than {num_heads + 1} tokens: give at least {HELD_OUT} on each replica."
        )
    decoder = Decoder(model, num_heads, batch_size, max(map(len, texts)), vocab_size)
    main: list[Tensor] = []
    with progress("main model", sum(map(len, texts))) as advance:
        for first in range(0, len(texts), batch_size):
            batch = texts[first : first + batch_size]
            found = decoder.hidden_states(batch)
            main += [found[: len(text), row].clone() for row, text in enumerate(batch)]
            advance(sum(map(len, batch)))
    passes = sum(len(_modules(layer)) + 1 for layer in model.mtp.layers) - 1
    before, fits = main, []
    with progress("heads", passes * sum(map(len, texts))) as advance:
        for head in range(1, num_heads + 1):
            text = _Text(decoder, head, texts, before, main, advance)
            fits.append(_fit_head(model.mtp.layers[head - 1], text, model.decoder.final_norm))
            if head < num_heads:
                before = [states.clone() for _, states in text.passes()]
    return fits


@dataclass(frozen=True)
class _Text:
    """What a head, counted from 1, is fitted to: texts, and what the depth before and the main model say to them."""

    decoder: Decoder
    head: int
    texts: Sequence[list[int]]
    before: Sequence[Tensor]
    """[s, h] of each text."""
    main: Sequence[Tensor]
    """The same of the main model."""
    advance: Callable[[int], object]

    def passes(self, *watched: torch.nn.Module) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Of each text, at the positions that have a target: what the modules are given, and what the head gives,
        [s - head, ...]."""
        size, parts = self.decoder.state.slots, self.decoder.heads[self.head - 1].parts
        for first in range(0, len(self.texts), size):
            last = min(first + size, len(self.texts))
            with _watching([parts[module] for module in watched]) as seen:
                states = self.decoder.head_states(self.head, self.texts[first:last], self.before[first:last])
            for row in range(last - first):
                self.advance(len(self.texts[first + row]))
                length = len(self.texts[first + row]) - self.head
                yield [x[:length, row] for x in seen], states[:length, row]

    def rows(self, module: Any, final_layernorm: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each text: the inputs of a module of the head, and what is left of the targets."""
        for number, ((x, y), _) in enumerate(self.passes(module, final_layernorm)):
            if isinstance(module, RowParallelLinear) and module.tp_group is not None and module.tp_group.size() > 1:
                x = gather_from_tensor_model_parallel_region(x, group=module.tp_group)
            target = _unweighted(self.main[number][self.head :], self.decoder.model.decoder.final_norm)
            yield x, target - y.float()


def _fit_head(layer: Any, text: _Text, final_norm: Any) -> Fit:
    """Fit a head, and make it what was found."""
    fit, modules = Fit(), _modules(layer)
    for name, parameter in layer.named_parameters():
        if name == "eh_proj.weight" or any(part in name for part in ZEROED):
            parameter.zero_()
    layer.final_layernorm.load_state_dict(final_norm.state_dict())
    whole = 0.0
    for name, module in modules.items():
        sums: list[_Sums] = []
        for number, (x, left) in enumerate(text.rows(module, layer.final_layernorm)):
            sums = sums or [_Sums.of(x.shape[-1], left.shape[-1], x.device) for _ in range(2)]
            sums[_is_held_out(number)].add(x, left)
        for part in sums:
            part.reduce()
        errors = [(sums[1].error(solution := sums[0].solved(ridge)), ridge, solution) for ridge in RIDGES]
        error, fit.ridge[name], solution = min(errors, key=lambda found: found[0])
        whole = whole or float(sums[1].targets)  # before the first map all of the targets is left
        fit.explained[name] = 1 - error / whole
        fit.weights[name] = solution.t().float().cpu()
        _put(module.weight, fit.weights[name])
    return fit


def _modules(layer: Any) -> dict[str, Any]:
    """The linear maps to fit, by their names in `FITTED`."""
    found = {}
    for end in FITTED:
        named = [module for name, module in layer.named_modules() if f".{name}".endswith(f".{end}")]
        if len(named) == 1:
            found[end] = named[0]
    return found


def _put(parameter: Any, weight: Tensor) -> None:
    """Make a parameter this rank's part of a weight [out, in]."""
    if getattr(parameter, "tensor_model_parallel", False):
        group = parallel_state.get_tensor_model_parallel_group()
        weight = weight.chunk(group.size(), parameter.partition_dim)[group.rank()]
    parameter.copy_(weight)


def usable(texts: Sequence[list[int]], num_heads: int) -> list[list[int]]:
    """The texts that have a target for every head."""
    return [text for text in texts if len(text) > num_heads + 1]


def held_out(texts: Sequence[list[int]]) -> list[list[int]]:
    """Those of the usable texts that no head was fitted to."""
    return [text for number, text in enumerate(texts) if _is_held_out(number)]


def _is_held_out(number: int) -> bool:
    return number % HELD_OUT == HELD_OUT - 1


@contextmanager
def _watching(parts: Sequence[Part]) -> Iterator[list[Tensor]]:
    """What each of the parts is given within the block."""
    seen = [torch.empty(0) for _ in parts]
    for index, part in enumerate(parts):
        part.watch = partial(seen.__setitem__, index)
    try:
        yield seen
    finally:
        for part in parts:
            part.watch = None


def _unweighted(hidden: Tensor, norm: Any) -> Tensor:
    """fp32, before the norm's weight and bias. A channel that the weight switches off has nothing to tell: zero."""
    weight = norm.weight.float()
    hidden = hidden.float() - norm.bias.float() if getattr(norm, "bias", None) is not None else hidden.float()
    on = weight.abs() > 1e-3 * weight.abs().mean()
    return torch.where(on, hidden / torch.where(on, weight, 1.0), 0.0)
