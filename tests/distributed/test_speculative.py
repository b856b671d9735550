"""Decoding over tensor-parallel ranks, and checkpoints that load at another layout than they were saved at."""

from pathlib import Path

import pytest
import torch

from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.sampling import Sampling
from tests.distributed.checkpoints import save_checkpoint
from tests.distributed.gloo import run
from tests.unit.speculative.toys import VOCABULARY, prompts, toy_model

pytestmark = pytest.mark.distributed


def decode(tensor_parallel, num_heads, slots, number, sampling=None):
    loading.start_distributed(tensor_parallel)
    texts = prompts(number, seed=8)
    decoder = Decoder(toy_model(4), num_heads, slots, 12 + 12 + num_heads + 1, VOCABULARY, sampling)
    done = generate(decoder, [Request(key, text, 12) for key, text in enumerate(texts)], seed=5)
    return sorted((g.key, g.tokens, g.acceptance.num_accepted_tokens_per_pos) for g in done)


@pytest.mark.parametrize("slots", [1, 8])
def test_two_tensor_parallel_ranks_decode_as_one(slots):
    (plain,) = run(decode, 1, 1, 0, slots, 24)
    (one,) = run(decode, 1, 1, 4, slots, 24)
    first, second = run(decode, 2, 2, 4, slots, 24)
    assert first == second == one
    assert [tokens for _, tokens, _ in one] == [tokens for _, tokens, _ in plain]


@pytest.mark.parametrize("sampling", [Sampling(1.0, sampled_drafts=True), Sampling(0.8, top_k=20, top_p=0.9)])
def test_ranks_sample_the_same_tokens(sampling):
    (one,) = run(decode, 1, 1, 2, 8, 16, sampling)
    first, second = run(decode, 2, 2, 2, 8, 16, sampling)
    # Equal up to rounding: a sum over two ranks moves a probability by 1e-7, and 16 x 12 draws hardly ever lie there.
    assert first == second == one


def save(directory, tensor_parallel):
    return logits(save_checkpoint(directory, tensor_parallel))


@torch.no_grad()
def logits(model):
    ids = torch.arange(20).unsqueeze(0)
    main, heads, _ = model.hidden_states_of_all_heads(ids, ids, None)
    return [model.logits(h) for h in (main, *heads)]


def load(directory, tensor_parallel):
    loading.start_distributed(tensor_parallel)
    loaded = loading.load(Path(directory))
    assert loaded.num_heads == 3 and not loaded.model.training
    return logits(loaded.model), loaded.iteration


@pytest.mark.parametrize(("saved", "asked"), [(2, 1), (1, 2)])
def test_a_checkpoint_loads_at_another_tensor_parallel_size(tmp_path, saved, asked):
    truth = run(save, saved, str(tmp_path / "checkpoint"), saved)
    found = run(load, asked, str(tmp_path / "checkpoint"), asked)
    assert all(iteration == 7 for _, iteration in found)
    for depth in range(4):
        whole = torch.cat([part[depth] for part in truth], -1)[..., :95]  # the padding has weights of no meaning
        got = torch.cat([part[depth] for part, _ in found], -1)[..., :95]
        # fp32 sums over two ranks instead of one
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-5)
