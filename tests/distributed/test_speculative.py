"""Decoding over tensor-parallel ranks, and checkpoints that load at another layout than they were saved at."""

import os
from pathlib import Path

import pytest
import torch

from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.sampling import Sampling
from tests.distributed.checkpoints import FLAGS, HEADS, pretrain, save_checkpoint
from tests.distributed.gloo import run
from tests.unit.speculative.toys import VOCABULARY, prompts, toy_model

pytestmark = pytest.mark.distributed


# One by one over two ranks, a hundred messages a step are what takes the time: all 200 prompts take a minute more.
ONE_BY_ONE = int(os.environ.get("PROMPTS_ONE_BY_ONE", "50"))


def decode(tensor_parallel, num_heads, slots, number, sampling=None, model=None, **options):
    loading.start_distributed(tensor_parallel)
    texts = prompts(number, seed=8)
    toy = toy_model(4, **(model or {}))
    decoder = Decoder(toy, num_heads, slots, 12 + 12 + num_heads + 1, VOCABULARY, sampling, **options)
    done = generate(decoder, [Request(key, text, 12) for key, text in enumerate(texts)], seed=5)
    return sorted((g.key, g.tokens, g.acceptance.num_accepted_tokens_per_pos) for g in done)


def decode_greedily(tensor_parallel):
    """Tokens of the prompts, and counts, by batch size and number of heads; 0 is plain decoding."""
    loading.start_distributed(tensor_parallel)
    found = {}
    model = toy_model(16, blocks=1)
    for slots, size, number in ((1, 4, 200 if tensor_parallel == 1 else ONE_BY_ONE), (8, 9, 200)):
        texts = prompts(200, seed=8)[:number]
        for num_heads in (0, 1, 4, 16):
            decoder = Decoder(model, num_heads, slots, 12 + size + num_heads + 1, VOCABULARY)
            done = sorted(generate(decoder, [Request(key, text, size) for key, text in enumerate(texts)]), key=by_key)
            counts = sum((g.acceptance for g in done), Acceptance.of_heads(num_heads))
            found[slots, num_heads] = [g.tokens for g in done], counts
    return found


def by_key(generation):
    return generation.key


def test_greedy_output_of_200_prompts_is_that_of_plain_decoding_on_any_layout():
    """In fp32, for 1, 4 and 16 heads, batches of 1 and 8, and 1 and 2 tensor-parallel ranks."""
    (one,) = run(decode_greedily, 1, 1, timeout=300)
    first, second = run(decode_greedily, 2, 2, timeout=300)
    assert first == second
    plain, _ = one[8, 0]
    assert len(plain) == 200 and {len(tokens) for tokens in plain} == {9}
    for found in (one, first):
        for (slots, _), (tokens, _) in found.items():
            assert tokens == [text[: 4 if slots == 1 else 9] for text in plain[: len(tokens)]]
            assert len(tokens) >= (ONE_BY_ONE if slots == 1 else 200)
    accepted = one[8, 16][1].num_accepted_tokens_per_pos
    assert accepted[0] > 200 and accepted[7] > 0, "the toy must accept drafts, also of late heads"


@pytest.mark.parametrize("sampling", [Sampling(1.0, sampled_drafts=True), Sampling(0.8, top_k=20, top_p=0.9)])
def test_ranks_sample_the_same_tokens(sampling):
    (one,) = run(decode, 1, 1, 2, 8, 16, sampling)
    first, second = run(decode, 2, 2, 2, 8, 16, sampling)
    # Equal up to rounding: a sum over two ranks moves a probability by 1e-7, and 16 x 12 draws hardly ever lie there.
    assert first == second == one


@pytest.mark.parametrize(("among", "sampling"), [(70, Sampling()), (20, Sampling(1.0, sampled_drafts=True))])
def test_heads_draft_among_the_same_few_tokens_on_any_layout(among, sampling):
    """Of the second rank's 48 ids 70 has some, 20 none."""
    options = {"draft_vocab_size": among}
    (one,) = run(decode, 1, 1, 4, 8, 16, sampling, **options)
    first, second = run(decode, 2, 2, 4, 8, 16, sampling, **options)
    assert first == second == one
    assert sum(sum(accepted) for _, _, accepted in one) > 0


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


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {"add_bias_linear": True, "add_qkv_bias": True}), (4, {}), (4, {"qk_layernorm": True})],
    ids=["biases", "a group on two ranks", "a group on two ranks, with norms"],
)
def test_kinds_of_layers_that_tensor_parallelism_cuts_otherwise(ranks, options):
    (one,) = run(decode, 1, 1, 2, 4, 8, None, model=options)
    assert run(decode, ranks, ranks, 2, 4, 8, None, model=options) == [one] * ranks


def gelu(*flags):
    """What a trained model's MLPs take for GELU, and what Megatron's training took, of the same values."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    loading.start_distributed(1)
    pretrain.sys.argv = ["test"]
    gated = ("--swiglu", "--disable-bias-linear")
    args = pretrain.parse([word for word in FLAGS.split() if word not in gated] + list(flags))
    mlp = loading.build(loading.decoding_args(args, HEADS, 1)).decoder.layers[1].mlp
    x = torch.linspace(-3, 3, 50)
    trained = bias_gelu(torch.zeros(()), x) if args.bias_gelu_fusion else torch.nn.functional.gelu(x)
    return mlp.activation_func(x), trained


def test_gelu_is_the_one_that_training_computed():
    """Megatron's fused kernel, its default, approximates it by tanh, and its other one does not."""
    ((fused, trained),) = run(gelu, 1)
    torch.testing.assert_close(fused, trained)
    ((exact, trained),) = run(gelu, 1, "--no-bias-gelu-fusion")
    torch.testing.assert_close(exact, trained)
    assert (fused - exact).abs().max() > 1e-4
