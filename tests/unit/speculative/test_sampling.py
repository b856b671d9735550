"""Sampling: what is kept, what is drawn, and that drafts leave the distribution of the output as it is."""

import pytest
import torch

from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.sampling import Sampling, draw, verify
from tests.unit.speculative.toys import toy_model

# Chi-square at 10 or more degrees of freedom exceeds dof + 5 * sqrt(2 dof) with a probability below 1e-4; the seeds are
# fixed, so that a test that passes once always passes.


def chi_square_is_small(counts, expected):
    keep = expected > 5
    statistic = ((counts[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    degrees = int(keep.sum()) - 1
    return statistic < degrees + 5 * (2 * degrees) ** 0.5


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rows(number, vocabulary, seed):
    return torch.randn(number, vocabulary, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(-1)


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0])
    p = Sampling(temperature=1.0, top_k=3).probabilities(logits)
    torch.testing.assert_close(p[:4], logits[:4].softmax(-1))  # the tie at the third is kept
    assert p[4] == 0
    full = (logits / 0.5).softmax(-1)
    assert full[0] < 0.85 < full[:2].sum()
    p = Sampling(temperature=0.5, top_p=0.85).probabilities(logits)
    torch.testing.assert_close(p[:2], full[:2] / full[:2].sum())
    assert (p[2:] == 0).all()
    assert Sampling(temperature=1.0, top_p=1e-9).probabilities(logits)[0] == 1


def test_draw_follows_the_weights_and_never_takes_zero():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0])
    drawn = draw(weights.expand(20_000, -1), uniforms(20_000))
    counts = drawn.bincount(minlength=6).double()
    assert (counts[weights == 0] == 0).all()
    # standard deviation of a share of 1/2 in 20,000 draws: 0.0035; five of them
    torch.testing.assert_close(counts / 20_000, (weights / weights.sum()).double(), atol=0.018, rtol=0)
    assert draw(weights.expand(1, -1), torch.tensor([0.0]).double()).item() == 1


@pytest.mark.parametrize("sampled", [False, True])
def test_verified_tokens_follow_the_main_head(sampled):
    """The first token of a verified draft is distributed as p_1, the second, where the first was accepted, as p_2."""
    number, vocabulary = 60_000, 12
    p = torch.stack([random_rows(1, vocabulary, seed)[0] for seed in (1, 2, 3)]).expand(number, -1, -1)
    q = torch.stack([random_rows(1, vocabulary, seed)[0] for seed in (4, 5)]).expand(number, -1, -1)
    if sampled:
        drafts = torch.stack([draw(q[:, j], uniforms(number, seed=10 + j)) for j in (0, 1)], 1)
    else:
        drafts = q.argmax(-1)
    accepted, following = verify(
        p, q if sampled else None, drafts, torch.full((number,), 2), uniforms(number, 3, seed=7)
    )
    tokens = torch.cat([drafts, following.unsqueeze(1)], 1).scatter(1, accepted.unsqueeze(1), following.unsqueeze(1))
    assert {0, 1, 2} == set(accepted.tolist())
    for position in range(3):
        rows = accepted >= position
        counts = tokens[rows, position].bincount(minlength=vocabulary).double()
        assert chi_square_is_small(counts, p[0, position].double() * counts.sum())
    expected = torch.minimum(p[0, 0], q[0, 0]).sum() if sampled else p[0, 0, drafts[0, 0]]
    # standard deviation of a share in 60,000 draws: at most 0.002; five of them
    assert (accepted >= 1).double().mean().item() == pytest.approx(expected.item(), abs=0.01)


def test_padding_drafts_do_not_count():
    p = torch.full((4, 3, 5), 0.2)
    accepted, _ = verify(p, None, torch.zeros(4, 2, dtype=torch.int64), torch.tensor([0, 1, 2, 0]), uniforms(4, 3) * 0)
    assert accepted.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}])
def test_output_of_the_decoder_is_distributed_as_without_drafts(options, sampled):
    """Pairs of tokens behind one prompt: exact probabilities by whole passes against many drafted continuations."""
    sampling = Sampling(**options, sampled_drafts=sampled)
    number, vocabulary, prompt = 6_000, 8, [1, 5, 2]
    model = toy_model(2, vocabulary=vocabulary)
    with torch.no_grad():
        for parameter in model.output_layer.parameters():
            parameter.mul_(0.25)  # flat enough for every token to occur

    def following(tokens):
        with torch.no_grad():
            main, _, _ = model.hidden_states_of_all_heads(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            return sampling.probabilities(model.logits(main)[-1, 0])

    first = following(prompt)
    second = torch.stack([following([*prompt, t]) for t in range(vocabulary)])
    third = torch.stack(
        [torch.stack([following([*prompt, t, u]) for u in range(vocabulary)]) for t in range(vocabulary)]
    )
    expected = (first[:, None, None] * second[:, :, None] * third).double().flatten() * number

    decoder = Decoder(model, 2, 500, 16, vocabulary, sampling)
    done = list(generate(decoder, [Request(key, prompt, 3) for key in range(number)], seed=3))
    tokens = torch.tensor([g.tokens for g in done])
    counts = (tokens[:, 0] * vocabulary**2 + tokens[:, 1] * vocabulary + tokens[:, 2]).bincount(minlength=vocabulary**3)
    assert sum(g.acceptance.num_accepted_tokens for g in done) > 0.05 * number
    assert (counts[expected == 0] == 0).all()
    assert chi_square_is_small(counts.double(), expected)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"sampled_drafts": True}, {"top_p": 0.5}]
)
def test_values_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        Sampling(**options)
