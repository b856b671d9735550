"""Drafting and verifying with caches, against whole passes without any."""

import pytest
import torch
from megatron.core.activations import squared_relu

from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.decoder import Decoder
from megatron_mtpd.speculative.generate import Request, generate
from megatron_mtpd.speculative.sampling import Sampling
from tests.unit.speculative.toys import VOCABULARY, hidden_states, plain, prompts, speculative, toy_model


# A pass over a window and one over the whole sequence sum the same numbers in another order: fp32 has 2^-23 = 1.2e-7,
# and the values here are of size 1 to 10 after a norm, through at most 18 layers.
def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.fixture(scope="module")
def model():
    return toy_model(4)


def run(model, texts, num_heads, slots, size=16, **options):
    longest = max(len(text) for text in texts)
    decoder = Decoder(model, num_heads, slots, longest + size + num_heads + 1, VOCABULARY, **options)
    requests = [Request(key, text, size) for key, text in enumerate(texts)]
    return {g.key: g for g in generate(decoder, requests)}


def total(generations):
    first, *rest = (g.acceptance for g in generations.values())
    return sum(rest, first)


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_tokens_and_counts_are_those_of_the_reference(model, num_heads):
    texts = prompts(6)
    expected = [speculative(model, text, 16, num_heads) for text in texts]
    done = run(model, texts, num_heads, slots=4)
    for key, (tokens, counts) in enumerate(expected):
        assert done[key].tokens == tokens
        assert done[key].acceptance == counts
    accepted = sum((counts for _, counts in expected), Acceptance.of_heads(num_heads)).num_accepted_tokens_per_pos
    assert min(accepted) > 0, "the toy must exercise every head"


def test_sixteen_heads_give_the_counts_of_the_reference():
    model = toy_model(16)
    texts = prompts(2, seed=3)
    done = run(model, texts, 16, slots=2, size=24)
    for key, text in enumerate(texts):
        tokens, counts = speculative(model, text, 24, 16)
        assert (done[key].tokens, done[key].acceptance) == (tokens, counts)


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("slots", [1, 8])
def test_greedy_output_is_that_of_plain_decoding(model, num_heads, slots):
    texts = prompts(40, seed=1)
    drafted = run(model, texts, num_heads, slots, size=12)
    undrafted = run(model, texts, 0, slots, size=12)
    assert [drafted[k].tokens for k in range(40)] == [undrafted[k].tokens for k in range(40)]
    assert plain(model, texts[0], 12) == undrafted[0].tokens
    assert sum(g.num_steps for g in drafted.values()) < sum(g.num_steps for g in undrafted.values())


def assert_caches_are_exact(decoder):
    """What holds of every depth is what one pass over the committed tokens gives. How much of it was rolled back."""
    state, rolled_back = decoder.state, 0
    for slot in range(state.slots):
        n = int(state.lengths[slot])
        truth = hidden_states(decoder.model, state.tokens[slot, :n].tolist())
        for depth in range(decoder.num_heads):  # the last head hands its states to nobody
            valid = int(state.valid[depth, slot])
            assert valid >= min(n - 1 - depth, n - 2) - decoder.num_heads
            assert_close(state.stored(depth)[slot, :valid], truth[depth][:valid])
            rolled_back += valid < n - 2
    return rolled_back


def test_caches_equal_the_training_pass_head_by_head(model):
    """After any step."""
    decoder = Decoder(model, 4, 5, 64, VOCABULARY)
    decoder.prefill(0, prompts(5, seed=2))
    rolled_back = 0
    for _ in range(10):
        decoder.step(5)
        rolled_back += assert_caches_are_exact(decoder)
    assert rolled_back > 0


UNGATED = {"gated_linear_unit": False, "add_bias_linear": True}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2, "moe_grouped_gemm": False}


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "LayerNorm", "add_bias_linear": True, "add_qkv_bias": True},
        {"qk_layernorm": True},
        {"qk_layernorm": True, "normalization": "LayerNorm"},
        {"qk_l2_norm": True},
        {**UNGATED, "activation_func": torch.nn.functional.gelu},
        {**UNGATED, "activation_func": squared_relu},
        {"activation_func_clamp_value": 0.3, "glu_linear_offset": 1.0},
        {"rotary_interleaved": True},
        {"rotary_percent": 0.5},
        {"num_query_groups": 4},
        {"num_query_groups": 1},
        {"block": "*E", "moe_shared_expert_intermediate_size": 16, **EXPERTS},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_kind_of_layer_is_that_of_the_training_pass(options):
    decoder = Decoder(toy_model(2, **options), 2, 4, 32, VOCABULARY)
    decoder.prefill(0, prompts(4, seed=2))
    for _ in range(4):
        decoder.step(4)
    assert_caches_are_exact(decoder)


def test_a_decoder_sees_parameters_that_have_changed_in_place():
    model = toy_model(2)
    decoder = Decoder(model, 2, 4, 32, VOCABULARY)
    decoder.prefill(0, prompts(4, seed=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    decoder.prefill(0, prompts(4, seed=2))
    decoder.step(4)
    assert_caches_are_exact(decoder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_output_gate": True}, "--attention-output-gate"),
        ({"apply_residual_connection_post_layernorm": True}, "--apply-residual-connection-post-layernorm"),
        ({"fp32_residual_connection": True, "params_dtype": torch.bfloat16}, "--fp32-residual-connection"),
    ],
)
def test_models_that_would_be_decoded_wrongly_are_refused(change, said):
    model = toy_model(1)
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=said):
        Decoder(model, 1, 1, 32, VOCABULARY)
    model = toy_model(1)
    model.position_embedding_type = "learned_absolute"
    with pytest.raises(ValueError, match="learned_absolute"):
        Decoder(model, 1, 1, 32, VOCABULARY)


def test_layers_that_cannot_be_read_are_refused():
    model = toy_model(1)
    model.decoder.layers[0].self_attention.linear_qkv = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"has a Linear: decoding needs one built by"):
        Decoder(model, 1, 1, 32, VOCABULARY)
    model.decoder.layers[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="has a Identity, which decoding does not support"):
        Decoder(model, 1, 1, 32, VOCABULARY)


def test_drafts_come_from_the_hidden_states_of_a_training_pass(model, monkeypatch):
    """Each head's state at the position where it drafts, against a pass over committed tokens and drafts."""
    texts = prompts(3, seed=4)
    decoder = Decoder(model, 4, 3, 64, VOCABULARY)
    decoder.prefill(0, texts)
    seen = []
    logits = decoder._logits
    monkeypatch.setattr(decoder, "_logits", lambda hidden: (seen.append(hidden.clone()), logits(hidden))[1])
    for _ in range(6):
        lengths = decoder.state.lengths.tolist()
        seen.clear()
        decoder.step(3)
        # tokens behind the new length are overwritten by verification: take the drafts from the heads' choices
        with torch.inference_mode():
            drafts = torch.stack([model.logits(h)[0].argmax(-1) for h in seen[:4]], 1).tolist()
        for row, n in enumerate(lengths):
            tokens = decoder.state.tokens[row, :n].tolist() + drafts[row]
            truth = hidden_states(model, tokens)
            for k in range(1, 5):
                assert_close(seen[k - 1][0, row], truth[k][n - 2])


def test_every_head_counts(model):
    """A head that is broken is accepted no more, and nothing behind it is."""
    texts = prompts(6)
    before = total(run(model, texts, 4, 4))
    weight = model.mtp.layers[1].eh_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.normal_(generator=torch.Generator().manual_seed(0))
        after = total(run(model, texts, 4, 4))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    cumulative = [a / after.num_drafts for a in after.num_accepted_tokens_per_pos]
    assert cumulative[0] == pytest.approx(before.num_accepted_tokens_per_pos[0] / before.num_drafts, abs=0.15)
    assert cumulative[1] < 0.5 * before.num_accepted_tokens_per_pos[1] / before.num_drafts


def test_drafting_stops_at_low_confidence_and_the_output_stays(model):
    texts = prompts(6)
    always, sometimes = run(model, texts, 4, 3), run(model, texts, 4, 3, min_confidence=0.5)
    assert [g.tokens for g in sometimes.values()] and all(always[k].tokens == sometimes[k].tokens for k in always)
    few, many = total(sometimes), total(always)
    assert 0 < few.num_draft_tokens < many.num_draft_tokens
    assert few.num_accepted_tokens / few.num_draft_tokens > many.num_accepted_tokens / many.num_draft_tokens
    never = run(model, texts, 4, 3, min_confidence=1.0)
    assert all(never[k].tokens == always[k].tokens for k in always) and not total(never).num_drafts


def test_confidence_leaves_the_caches_exact(model):
    """Heads that did not run catch up: their drafts are those of the reference when they are used again."""
    texts = prompts(4, seed=5)
    decoder = Decoder(model, 4, 4, 64, VOCABULARY, min_confidence=0.6)
    decoder.prefill(0, texts)
    for _ in range(8):
        decoder.step(4)
    lagging = decoder.state.valid[4].tolist()
    for slot in range(4):
        n = int(decoder.state.lengths[slot])
        truth = hidden_states(model, decoder.state.tokens[slot, :n].tolist())
        for depth in range(4):
            valid = int(decoder.state.valid[depth, slot])
            assert_close(decoder.state.stored(depth)[slot, :valid], truth[depth][:valid])
    assert min(lagging) >= 0


def test_position_0_mask_changes_drafts_not_output(model):
    texts = prompts(20, seed=6, longest=2)
    masked, unmasked = run(model, texts, 4, 4, mask_position_0=True), run(model, texts, 4, 4)
    assert all(masked[k].tokens == unmasked[k].tokens for k in masked)
    assert total(masked) != total(unmasked)


@pytest.mark.parametrize("among", [1, 40, VOCABULARY])
def test_heads_that_draft_among_few_tokens_draft_as_the_reference(model, among):
    texts = prompts(6)
    done = run(model, texts, 4, 4, draft_vocab_size=among)
    for key, text in enumerate(texts):
        assert (done[key].tokens, done[key].acceptance) == speculative(model, text, 16, 4, among)
    if among == 40:
        assert 0 < total(done).num_accepted_tokens < total(run(model, texts, 4, 4)).num_accepted_tokens


def test_sampled_drafts_among_few_tokens_are_verified_as_such(model):
    """Their distribution has no probability elsewhere, and the verification knows: no draft from 40 on, and tokens
    from 40 on in the output."""
    texts, drafts = prompts(6), []
    sampling = Sampling(1.0, sampled_drafts=True)
    decoder = Decoder(model, 2, 6, 64, VOCABULARY, sampling, draft_vocab_size=40)
    decoder.prefill(0, texts, torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    draft, random = decoder._draft, torch.Generator().manual_seed(2)

    def recorded(*args):
        drafts.append(draft(*args))
        return drafts[-1]

    decoder._draft = recorded
    tokens = [decoder.step(6, torch.rand(6, 5, dtype=torch.float64, generator=random)).tokens for _ in range(16)]
    for _, chosen, offered in drafts:
        assert int(chosen.max()) < 40
        assert offered.shape[-1] == VOCABULARY and not offered[..., 40:].any()
        torch.testing.assert_close(offered.sum(-1), torch.ones_like(offered[..., 0]))
    assert max(token for step in tokens for row in step for token in row) >= 40


def test_padding_of_the_vocabulary_is_never_chosen():
    model = toy_model(2, frequent=5)  # token 95 is a frequent one
    texts = prompts(3)
    decoder = Decoder(model, 2, 3, 40, vocab_size=95)
    done = generate(decoder, [Request(k, t, 10) for k, t in enumerate(texts)])
    assert all(max(g.tokens) < 95 for g in done)
    assert any(95 in g.tokens for g in run(model, texts, 2, 3).values())


def test_experts_and_shared_heads_decode_as_the_reference():
    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
        "moe_token_dispatcher_type": "alltoall",
    }
    for model in (toy_model(2, block="*E", **options), toy_model(3, mtp_use_repeated_layer=True)):
        heads = model.config.mtp_num_layers
        done = run(model, prompts(3), heads, 3)
        for key, text in enumerate(prompts(3)):
            assert (done[key].tokens, done[key].acceptance) == speculative(model, text, 16, heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "--num-heads 5: the model has 4"),
        ({"min_confidence": 1.5}, "--min-confidence is 1.5"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size 0: the vocabulary has 96 ids"),
        ({"draft_vocab_size": 97}, "--draft-vocab-size 97: the vocabulary has 96 ids"),
    ],
)
def test_options_that_cannot_work_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Decoder(model, **({"num_heads": 1, "slots": 1, "capacity": 8, "vocab_size": VOCABULARY} | options))
