import pytest

from megatron_mtpd.speculative.cost import StepCost, fit


def test_the_fit_finds_the_cost_that_made_the_times():
    truth = StepCost(base=10.0, head=2.0, position=0.25)
    found = fit({k: truth.seconds(k) for k in (0, 1, 4, 8)})
    assert (found.base, found.head, found.position) == pytest.approx((10.0, 2.0, 0.25))
    assert found.seconds(16) == pytest.approx(truth.seconds(16))


def test_two_times_make_a_line_and_no_part_is_negative():
    line = fit({0: 10.0, 4: 18.0})
    assert (line.seconds(0), line.seconds(2), line.seconds(4)) == pytest.approx((10.0, 14.0, 18.0))
    concave = fit({0: 10.0, 1: 14.0, 4: 15.0})
    assert min(concave.base, concave.head, concave.position) >= 0
    with pytest.raises(ValueError, match="at least two"):
        fit({4: 1.0})


def test_the_best_number_of_heads_by_hand():
    cost = StepCost(base=1.0, head=0.3, position=0.0)
    rates = [0.8, 0.5, 0.2, 0.1]
    # tokens over time: 1, 1.8 / 1.3, 2.3 / 1.6, 2.5 / 1.9, 2.6 / 2.2
    assert cost.tokens_per_second(rates, 2) == pytest.approx(2.3 / 1.6)
    assert cost.best_num_heads(rates) == 2
    assert cost.best_num_heads([0.1, 0.05]) == 0
    assert StepCost(1.0, 0.0, 0.0).best_num_heads(rates) == 4
