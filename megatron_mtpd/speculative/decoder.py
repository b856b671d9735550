"""Draft with the heads, verify with the main model: one step of a batch, with caches that are exact.

Positions. A sequence has n committed tokens x_0 .. x_{n-1}. The main model has run on positions 0 .. n-2; the last
token is known, but not yet processed. Head k at position i takes the hidden state of depth k-1 at i (depth 0: the main
model, after its final norm) and the embedding of x_{i+k}, with the rotary embedding of i, and predicts x_{i+k+1}. So
all heads draft at position n-2: head 1 from x_{n-1} the draft d_1 of x_n, head 2 from d_1 the draft d_2 of x_{n+1}, and
so on. The main model then runs on x_{n-1}, d_1 .. d_K at positions n-1 .. n+K-1 at once. If it accepts a drafts, a + 1
tokens are committed: those, and its own next one.

Which entries of a head's cache hold. Entry i of head k was computed from x_{i+k}, so it holds as long as that token
does: with n committed tokens, entries i <= n-1-k. In training, head k at n-2 sees the entries up to n-2, each from the
token that follows; the last k-1 of them need tokens that are only drafted. So when head k drafts it (re)computes all
positions from its first entry that does not hold up to n-2, with the drafts of *this* step. What it sees is then
exactly a forward pass over the committed tokens and the drafts. After a drafts are accepted, n' = n + a + 1 tokens are
committed, and the entries from accepted drafts hold too: the first min(n-1, n'-1-k) of them. Their hidden states are
kept for depth k+1, which may have to reach back one position further than depth k.

Worked example, K = 3, committed x_0 .. x_5 (n = 6; all heads draft at position 4). `t` is a draft's token:

    entry i of      0    1    2    3    4        holds   computed now
    head 1 takes    x_1  x_2  x_3  x_4  x_5      0..4    4            drafts d_1 = t_6
    head 2 takes    x_2  x_3  x_4  x_5  t_6      0..3    4 (3 held)   drafts d_2 = t_7
    head 3 takes    x_3  x_4  x_5  t_6  t_7      0..2    3, 4         drafts d_3 = t_8

d_1 is accepted, d_2 is not: n' = 8, x_6 = t_6, x_7 != t_7. Heads 1 and 2 keep entries 0..4 (head 2 took t_6 = x_6),
head 3 keeps 0..3: its entry 4 took t_7. The next draft is at position 6: heads 1 and 2 compute 5, 6, head 3 computes 4,
5, 6.

Rounding. Plain decoding is the same code without heads. A pass over K+1 positions may use other matrix kernels than one
over 1, so that logits differ in the last bits; the tokens differ only where the two largest logits are that close.

Deliberately absent: queues of prompts (`generate`), pipeline parallelism, CUDA graphs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from torch import Tensor
from torch.nn.functional import embedding, pad

from megatron_mtpd.losses.vocab_parallel import vocab_argmax, vocab_logsumexp, vocab_max, vocab_offset
from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative import layers
from megatron_mtpd.speculative.attention import Window
from megatron_mtpd.speculative.packed import PackedWeight, shared_packed
from megatron_mtpd.speculative.sampling import Sampling, draw, verify
from megatron_mtpd.speculative.state import State

POSITIONS = ("rope", "yarn", "none")


class Step(NamedTuple):
    """What a step did, for each active slot."""

    tokens: list[list[int]]
    """The tokens committed: the accepted drafts and one more."""
    num_drafted: list[int]


def check_drafting(min_confidence: float, draft_vocab_size: int | None, vocab_size: int) -> None:
    """Raises ValueError for options of a `Decoder` that cannot work, whatever the model."""
    if not 0 <= min_confidence <= 1:
        raise ValueError(f"--min-confidence is {min_confidence}: give a probability between 0 and 1.")
    if draft_vocab_size is not None and not 1 <= draft_vocab_size <= vocab_size:
        raise ValueError(
            f"--draft-vocab-size {draft_vocab_size}: the vocabulary has {vocab_size} ids; give 1 to {vocab_size}."
        )


class Decoder:
    """Runs the main model and the first `num_heads` heads over the active slots of a `State`.

    Args:
        model: of local modules (`specs.local_spec`), in evaluation mode, the whole model on this tensor-parallel group.
            Its parameters are read where they are, and may change by in-place operations that torch counts. What an
            optimizer writes through `.data` or a flat buffer is not seen on a CPU: load what it has saved.
        num_heads: heads to draft with; 0 is plain decoding.
        slots, capacity: sequences at once, and the most tokens of each, with room for a step's drafts behind.
        vocab_size: ids from here on are padding of the embedding and never chosen.
        sampling: how tokens are chosen.
        min_confidence: a row stops drafting when a head gives its draft a probability (at temperature 1, among the ids
            that it drafts) below this; that draft is dropped. 0: always draft with all heads.
        mask_position_0: zero the token's embedding in the heads at position 0, as vLLM's DeepSeek heads do; training
            does not.
        draft_vocab_size: heads draft among the ids below this alone, so that their output layer costs as much less;
            None: all. A byte-pair vocabulary is in the order of its merges, so these are its most frequent tokens
            (FR-Spec, arXiv 2502.14856, ranks them by count). The output does not change, the acceptance does. With
            tensor parallelism the first ranks hold these ids: from V / tp ids on nothing is saved.

    Raises ValueError for a model or options that cannot work.
    """

    def __init__(
        self,
        model: MTPDModel,
        num_heads: int,
        slots: int,
        capacity: int,
        vocab_size: int,
        sampling: Sampling | None = None,
        min_confidence: float = 0.0,
        mask_position_0: bool = False,
        draft_vocab_size: int | None = None,
    ) -> None:
        available = (model.config.mtp_num_layers or 0) if model.mtp_process else 0
        if not 0 <= num_heads <= available:
            raise ValueError(
                f"--num-heads {num_heads}: the model has {available} heads; give 0 (plain) to {available}."
            )
        check_drafting(min_confidence, draft_vocab_size, vocab_size)
        layers.refuse(model.config)
        if model.position_embedding_type not in POSITIONS:
            raise ValueError(
                f"--position-embedding-type {model.position_embedding_type}: decoding has {', '.join(POSITIONS)}."
            )
        if model.training:
            raise ValueError("The model is in training mode: call model.eval() before decoding.")
        self.model, self.num_heads, self.vocab_size = model, num_heads, vocab_size
        self.sampling = sampling or Sampling()
        self.min_confidence, self.mask_position_0 = min_confidence, mask_position_0
        self.draft_vocab_size = draft_vocab_size
        tp_group = model.pg_collection.tp
        self.tp_group = tp_group if model.parallel_output and tp_group.size() > 1 else None
        self.device = next(model.parameters()).device
        repeated = model.config.mtp_use_repeated_layer
        self.main = layers.Stack(model.decoder.layers, model.decoder.final_norm)
        self.heads = [layers.Head(model.mtp.layers[0 if repeated else k]) for k in range(num_heads)]
        num_caches = [depth.num_caches for depth in (self.main, *self.heads)]
        self.state = State(slots, capacity, num_caches, self.device)
        self._rotary = self._rotary_table(capacity + 1)
        self._draft_output = PackedWeight()
        self.draft_seconds = 0.0
        """Of all steps so far, the time that went into drafting."""

    def _rotary_table(self, length: int) -> layers.RotaryTable | None:
        model = self.model
        if model.position_embedding_type == "none":
            return None
        if model.position_embedding_type == "yarn":
            angles, _ = model.rotary_pos_emb(length)
        else:
            angles = model.rotary_pos_emb.get_emb(length)
        dtype = next(model.parameters()).dtype
        return layers.RotaryTable(
            angles, _yarn_get_concentration_factor_from_config(model.config), model.config.rotary_interleaved, dtype
        )

    # One depth over one window --------------------------------------------------------------------------------

    def _run(self, depth: int, window: Window) -> Tensor:
        """Hidden states [s, b, h] of a depth, after its final norm; its caches are extended."""
        state = self.state
        rotary = self._rotary and self._rotary.at(window.positions)
        ids = state.tokens[window.slots].gather(1, (window.positions + depth).clamp(max=state.capacity))
        embedded = self._embedded(ids)
        if depth == 0:
            out = self.main(embedded, rotary, state.caches[0], window)
        else:
            if self.mask_position_0:
                embedded = embedded.masked_fill((window.positions.t() == 0).unsqueeze(-1), 0.0)
            head = self.heads[depth - 1]
            combined = head.combined(state.hidden_at(depth - 1, window), embedded)
            out = head(combined, rotary, state.caches[depth], window)
        state.store_hidden(depth, window, out)
        return out

    def _embedded(self, ids: Tensor) -> Tensor:
        """Embeddings of [b, s] tokens, [s, b, h]."""
        config = self.model.config
        if self.tp_group is not None or config.use_mup or config.fp32_residual_connection:
            return self.model.embedding(input_ids=ids, position_ids=ids)  # rotary models look at no positions here
        return embedding(ids.t(), self.model.embedding.word_embeddings.weight)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[s, b, h] -> fp32 [s, b, V / tp], padding of the vocabulary at -inf."""
        weight, first = self._output_weight()
        return self._masked(shared_packed(weight).linear(hidden, weight), self.vocab_size - first)

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        """The same with the ids that are not drafted at -inf, or left out where nobody needs them."""
        if self.draft_vocab_size is None:
            return self._logits(hidden)
        weight, first = self._output_weight()
        width, drafted = weight.shape[0], self.draft_vocab_size - first
        computed = min(max(drafted, 1), width)  # one at least, at -inf then
        logits = self._masked(self._draft_output.linear(hidden, weight[:computed]), drafted)
        if self.tp_group is None and not self.sampling.sampled_drafts:
            return logits
        return pad(logits, (0, width - computed), value=float("-inf"))

    def _output_weight(self) -> tuple[Tensor, int]:
        """[V / tp, h], and the id of its first row."""
        weight = self.model._output_weight()
        return weight, vocab_offset(weight.t(), self.tp_group)

    def _masked(self, logits: Tensor, size: int) -> Tensor:
        """Scaled, in fp32, those from `size` on at -inf."""
        logits = self.model._scale_logits(logits).float()
        if size < logits.shape[-1]:
            logits[..., max(size, 0) :] = float("-inf")
        return logits

    def _argmax(self, logits: Tensor) -> Tensor:
        """The lowest id among the largest logits, [..., V / tp] -> [...]."""
        if self.tp_group is None and not logits.is_cuda:  # there torch.argmax takes the first, in one pass
            return logits.argmax(-1)
        return vocab_argmax(logits, self.tp_group)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """[..., V / tp] -> [..., V] of the whole vocabulary, on every rank."""
        if self.tp_group is not None:
            parts = [torch.empty_like(logits) for _ in range(self.tp_group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.tp_group)
            logits = torch.cat(parts, -1)
        return self.sampling.probabilities(logits)

    def _agree(self, choice: Tensor) -> Tensor:
        """The first rank's choice on all ranks: on a GPU, equal sums need not round equally."""
        if self.tp_group is not None:
            dist.broadcast(choice, group=self.tp_group, group_src=0)
        return choice

    # Prompts ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def hidden_states(self, texts: list[list[int]], first_slot: int = 0) -> Tensor:
        """The main model's after its final norm, [s, b, h], of texts that are put into the slots from `first_slot` on.

        Behind the end of a shorter text it has no meaning.
        """
        window = self._whole(texts, first_slot, 0)
        self.state.valid[:, window.slots] = 0
        return self._run(0, window)

    @torch.inference_mode()
    def head_states(self, head: int, texts: Sequence[list[int]], before: Sequence[Tensor]) -> Tensor:
        """A head's after its final norm, [s - head, b, h], heads counted from 1, where `before` are those of the depth
        before, [s, h] of each text. The head must be one of `num_heads`.

        At i it takes the text's token i + head; behind the last of a shorter text it has no meaning.
        """
        window = self._whole(texts, 0, head)
        for row, states in enumerate(before):
            self.state.store(head - 1, states, row)
        return self._run(head, window)

    def _whole(self, texts: Sequence[list[int]], first_slot: int, head: int) -> Window:
        """Texts, put into the slots from `first_slot` on: the positions at which a head has a token to take."""
        lengths = torch.tensor([len(text) for text in texts])
        for slot, text in enumerate(texts, first_slot):
            self.state.tokens[slot, : len(text)] = torch.tensor(text, device=self.device)
        slots = slice(first_slot, first_slot + len(texts))
        return self.state.window(slots, torch.zeros_like(lengths), lengths - head)

    @torch.inference_mode()
    def prefill(self, first_slot: int, prompts: list[list[int]], uniform: Tensor | None = None) -> list[int]:
        """Put prompts into the slots from `first_slot` on, and commit one token behind each. Returns these.

        `uniform`: fp64 [b] on the CPU, for sampling. Every prompt has at least one token.
        """
        state, slots = self.state, slice(first_slot, first_slot + len(prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        hidden = self.hidden_states(prompts, first_slot)
        rows = torch.arange(len(prompts), device=self.device)
        logits = self._logits(hidden[lengths.to(self.device) - 1, rows].unsqueeze(0))[0]
        if self.sampling.greedy:
            chosen = self._argmax(logits)
        else:
            assert uniform is not None, "sampling needs random numbers"
            chosen = self._agree(draw(self._probabilities(logits), uniform.to(self.device)))
        state.tokens[slots].scatter_(1, lengths.to(self.device).unsqueeze(1), chosen.unsqueeze(1))
        state.lengths[slots] = lengths + 1
        state.valid[0, slots] = lengths
        for k in range(1, self.num_heads + 1):  # now, while these rows are alone: what follows is short
            stop = (lengths + 1 - max(k, 2)).clamp(min=0)  # the last position is left to the draft
            if bool(stop.any()):
                self._run(k, state.window(slots, torch.zeros_like(stop), stop))
            state.valid[k, slots] = stop
        return chosen.tolist()

    # Steps ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, active: int, uniform: Tensor | None = None) -> Step:
        """Draft, verify and commit for the first `active` slots.

        `uniform`: fp64 [active, 2 * num_heads + 1] on the CPU, for sampling: drafts, acceptances, next token.
        """
        uniform = None if uniform is None else uniform.to(self.device)
        begin = self._mark()
        num_drafted, drafts, offered = self._draft(active, uniform)
        end = self._mark()
        tokens, num_accepted = self._verify(active, num_drafted, drafts, offered, uniform)
        host = torch.cat([tokens, num_accepted.unsqueeze(1), num_drafted.unsqueeze(1)], 1).tolist()
        # The line above has waited for the device, so that both marks have passed.
        self.draft_seconds += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        committed = [row[: row[-2] + 1] for row in host]
        self._commit(active, torch.tensor([len(row) for row in committed]), drafts.shape[1])
        return Step(committed, [row[-1] for row in host])

    def _mark(self) -> Any:
        """A point in time; on a GPU an event, which nobody waits for."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _draft(self, active: int, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """How many drafts of each row count [b], the drafts [b, k], and what they were drawn from [b, k, V]."""
        state, slots = self.state, slice(0, active)
        lengths = state.lengths[slots]
        end = lengths.to(self.device)
        rows = torch.arange(active, device=self.device)
        num_drafted = torch.zeros(active, dtype=torch.int64, device=self.device)
        drafting = torch.ones(active, dtype=torch.bool, device=self.device)
        drafts, offered = [], []
        for k in range(1, self.num_heads + 1):
            start = state.valid[k, slots]
            hidden = self._run(k, state.window(slots, start, lengths - 1))
            last = (lengths - 2 - start).to(self.device)
            logits = self._draft_logits(hidden[last, rows].unsqueeze(0))[0]
            if self.sampling.sampled_drafts:
                assert uniform is not None, "sampling needs random numbers"
                offered.append(self._probabilities(logits))
                draft = self._agree(draw(offered[-1], uniform[:, k - 1]))
            else:
                draft = self._argmax(logits)
            if self.min_confidence:
                drafting &= self._confident(logits)
            num_drafted += drafting
            drafts.append(draft)
            state.tokens[slots].scatter_(1, (end + k - 1).unsqueeze(1), draft.unsqueeze(1))
            if self.min_confidence and not bool(drafting.any()):
                break  # this head has run, and its cache is ahead of the heads behind it: they catch up when used
        if not drafts:
            return num_drafted, torch.zeros(active, 0, dtype=torch.int64, device=self.device), None
        return num_drafted, torch.stack(drafts, 1), torch.stack(offered, 1) if offered else None

    def _confident(self, logits: Tensor) -> Tensor:
        top = vocab_max(logits, self.tp_group)
        return (top - vocab_logsumexp(logits, self.tp_group)).exp() >= self.min_confidence

    def _verify(
        self, active: int, num_drafted: Tensor, drafts: Tensor, offered: Tensor | None, uniform: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens to commit [b, k + 1], of which the first `num_accepted` [b] and one more count."""
        state, slots, size = self.state, slice(0, active), drafts.shape[1]
        lengths = state.lengths[slots]
        hidden = self._run(0, state.window(slots, lengths - 1, lengths + size))
        logits = self._logits(hidden).transpose(0, 1)
        if self.sampling.greedy:
            tokens = self._argmax(logits)
            counts = torch.arange(size, device=self.device) < num_drafted.unsqueeze(1)
            num_accepted = ((tokens[:, :size] == drafts) & counts).long().cumprod(1).sum(1)
        else:
            assert uniform is not None, "sampling needs random numbers"
            p = self._probabilities(logits)
            used = uniform[:, [*range(self.num_heads, self.num_heads + size), 2 * self.num_heads]]
            num_accepted, following = verify(p, offered, drafts, num_drafted, used)
            tokens = torch.cat([drafts, following.unsqueeze(1)], 1)
            tokens.scatter_(1, num_accepted.unsqueeze(1), following.unsqueeze(1))
            choice = self._agree(torch.cat([tokens, num_accepted.unsqueeze(1)], 1))
            tokens, num_accepted = choice[:, :-1], choice[:, -1]
        positions = lengths.to(self.device).unsqueeze(1) + torch.arange(size + 1, device=self.device)
        state.tokens[slots].scatter_(1, positions, tokens)
        return tokens, num_accepted

    def _commit(self, active: int, committed: Tensor, depths_run: int) -> None:
        """Move the lengths, and with them what holds of every cache."""
        state, slots = self.state, slice(0, active)
        before = state.lengths[slots].clone()
        after = before + committed
        state.lengths[slots] = after
        state.valid[0, slots] = after - 1
        for k in range(1, depths_run + 1):
            state.valid[k, slots] = torch.minimum(before - 1, after - 1 - k).clamp(min=0)
