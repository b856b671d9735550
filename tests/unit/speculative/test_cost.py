import pytest
import torch

from megatron_mtpd.speculative.cost import StepCost, drafted_positions, fit, tokens_per_step
from megatron_mtpd.speculative.decoder import Decoder
from tests.unit.speculative.toys import VOCABULARY, prompts, toy_model

RATES = [0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]


@pytest.mark.parametrize("truth", [StepCost(10.0, 0.5, 2.0, 0.25), StepCost(1.0, 0.0, 0.3, 0.0)])
def test_the_fit_finds_the_cost_that_made_the_times(truth):
    measured = (0, 1, 4, 8)
    draft = {k: truth.draft_seconds(RATES, k) for k in measured}
    found = fit(draft, {k: truth.verify_seconds(k) for k in measured}, RATES)
    for name in ("base", "token", "head", "position"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), abs=1e-9), name
    assert found.best_num_heads(RATES) == truth.best_num_heads(RATES)


def test_few_measurements_still_give_a_cost_and_no_part_is_negative():
    found = fit({0: 0.0, 4: 8.0}, {0: 10.0, 4: 12.0}, RATES)
    assert found.draft_seconds(RATES, 4) == pytest.approx(8.0) and found.draft_seconds(RATES, 0) == 0
    assert [found.verify_seconds(k) for k in (0, 2, 4)] == pytest.approx([10.0, 11.0, 12.0])
    falling = fit({0: 0.0, 1: 4.0, 4: 5.0}, {0: 10.0, 1: 9.0, 4: 8.0}, RATES)
    assert min(falling.base, falling.token, falling.head, falling.position) >= 0
    with pytest.raises(ValueError, match="at least two"):
        fit({4: 1.0}, {4: 1.0}, RATES)


def test_the_best_number_of_heads_by_hand():
    cost = StepCost(base=1.0, token=0.1, head=0.2, position=0.0)
    rates = [0.8, 0.5, 0.2, 0.1]
    # tokens over time: 1, 1.8 / 1.3, 2.3 / 1.6, 2.5 / 1.9, 2.6 / 2.2
    assert cost.tokens_per_second(rates, 2) == pytest.approx(2.3 / 1.6)
    assert cost.best_num_heads(rates) == 2
    assert cost.best_num_heads([0.1, 0.05]) == 0
    assert StepCost(1.0, 0.0, 0.0, 0.0).best_num_heads(rates) == 4


@pytest.mark.parametrize("num_heads", [1, 3, 4])
def test_yield_and_drafted_positions_are_those_of_the_decoder(num_heads, monkeypatch):
    """Counted in the decoder's passes, against what the acceptance of the same steps says. Both are exact sums."""
    decoder = Decoder(toy_model(4), num_heads, 1, 96, VOCABULARY)
    computed, committed, steps, accepted = 0, 0, 0, torch.zeros(num_heads)
    run = decoder._run

    def counted(depth, window):
        nonlocal computed
        computed += window.positions.numel() if depth and counting else 0
        return run(depth, window)

    monkeypatch.setattr(decoder, "_run", counted)
    for prompt in prompts(8):
        counting = False
        decoder.prefill(0, [[*range(5, 15), *prompt]])  # long enough for every head to have something to hold
        before = decoder.step(1).tokens[0]  # the first step computes what the prompt has left over
        counting = True
        for _ in range(12):
            # What a step drafts depends on what the step before it accepted, so the first of a chain has its rate.
            for j in range(1, len(before)):
                accepted[j - 1] += 1
            steps, committed = steps + 1, committed + len(before)
            before = decoder.step(1).tokens[0]
    rates = (accepted / steps).tolist()
    assert 0 < rates[-1] < 1
    assert computed / steps == pytest.approx(drafted_positions(rates, num_heads), rel=1e-6)
    assert committed / steps == pytest.approx(tokens_per_step(rates, num_heads), rel=1e-6)
