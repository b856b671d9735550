"""MTPDConfig: defaults of the paper, what is refused and how, weights of heads, schedule, words for every field."""

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtpd import config as config_module
from megatron_mtpd.config import SHARES, MTPDConfig, flag

NAN, INF = float("nan"), float("inf")


def test_defaults_are_the_papers():
    config = MTPDConfig()
    assert (config.objective, config.top_n, config.temperature) == ("topn_kl", 10_000, 1.0)
    assert config.betas(1) == (1.0,)
    assert config.betas(4) == (0.5,) * 4
    assert config.alphas(4, 0.3) == (0.3 / 4,) * 4  # Megatron's own rule
    assert not config.cross_documents and not config.heads_pass_twice
    kept_from = {"ce_output_share", "kd_output_share"}  # ours, see examples/frontier; as_published has the paper's
    assert {name for name in SHARES if getattr(config, name) == 0.0} == kept_from
    paper = MTPDConfig.as_published()
    assert all(getattr(paper, name) == 1.0 for name in SHARES) and paper.distill_scale(0) == 1.0
    assert config.distill_scale(0) == 1.0
    assert config.at(10**9) == config  # no other objective follows
    assert config.on_policy_fraction == 0.0


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MTPDConfig().top_n = 5  # type: ignore[misc]
    given = [0.5, 0.25]
    config = MTPDConfig(beta=given)
    given[0] = 9.0
    assert config.betas(2) == (0.5, 0.25) and config == MTPDConfig(beta=(0.5, 0.25))
    assert len({config, MTPDConfig(beta=(0.5, 0.25))}) == 1  # it can be a key


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("objective", "topk_kl", "choose one of topn_kl, kl, reverse_kl, tv, lk, e2e_tv"),
        ("train", "head", "choose one of"),
        ("old_heads", 2, "--mtpd-train new-heads"),  # with train="all"
        ("old_heads", -1, "at least 1"),
        ("top_n", 0, "at least 1"),
        ("top_n", -3, "at least 1"),
        ("temperature", 0.0, "positive"),
        ("temperature", -1.0, "positive"),
        ("temperature", NAN, "positive"),
        ("temperature", INF, "positive"),
        ("lk_eta", -0.1, "at least 0"),
        ("lk_eta", NAN, "at least 0"),
        ("alpha", [], "one per head"),
        ("alpha", [0.1, -0.1], "at least 0"),
        ("alpha", [NAN], "at least 0"),
        ("beta", [], "one per head"),
        ("beta", [-1.0], "at least 0"),
        ("beta", [INF], "at least 0"),
        ("beta", -0.5, "at least 0"),
        ("beta", NAN, "at least 0"),
        ("alpha", "0.5", "one per head"),
        ("alpha", {0.5}, "one per head"),
        ("beta", [0.5, None], "one per head"),
        ("head_decay", 0.0, "above 0"),
        ("head_decay", 1.5, "up to 1"),
        ("head_decay", NAN, "above 0"),
        ("on_policy_fraction", -0.1, "between 0 (the text alone) and 1"),
        ("on_policy_fraction", 1.1, "between 0 (the text alone) and 1"),
        ("on_policy_fraction", NAN, "between 0 (the text alone) and 1"),
        ("next_objective", "e2e-tv", "choose one of topn_kl, kl, reverse_kl, tv, lk, e2e_tv"),
        ("next_objective", "", "choose one of"),
        ("next_objective_start", -1, "at least 0"),
        ("next_objective_start", 5, "--mtpd-next-objective"),  # of none
        ("distill_start", -1, "at least 0"),
        ("distill_ramp", -1, "at least 0"),
        *[(name, value, "between 0 (cut) and 1 (whole)") for name in SHARES for value in (-0.01, 1.01, NAN)],
    ],
)
def test_a_bad_value_is_refused_by_flag_value_and_remedy(name: str, value: Any, remedy: str):
    with pytest.raises(ValueError, match="--mtpd-") as error:
        MTPDConfig(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{flag(name)} is {value!r}: ") and remedy in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_n", 1),
        ("lk_eta", 0.0),
        ("alpha", (0.0,)),
        ("beta", (0.0, 2.0)),
        ("head_decay", 1.0),
        ("on_policy_fraction", 1.0),
    ],
)
def test_the_edge_of_what_is_allowed(name: str, value: Any):
    assert getattr(MTPDConfig(**{name: value}), name) == value


def test_one_weight_for_all_heads_or_one_for_each():
    config = MTPDConfig(alpha=[0.2], beta=[1, 0.6, 0.36])
    assert config.alphas(3, 99.0) == (0.2, 0.2, 0.2)
    assert config.betas(3) == (1.0, 0.6, 0.36)
    assert MTPDConfig(beta=[0.0]).betas(2) == (0.0, 0.0)  # a zero is a value, not a missing one
    assert MTPDConfig(beta=0).betas(2) == (0.0, 0.0)
    assert MTPDConfig(beta=0.5) == MTPDConfig(beta=[0.5])
    with pytest.raises(
        ValueError, match=r"--mtpd-beta is \(1.0, 0.6, 0.36\): the model has 4 heads; give one number, or 4"
    ):
        config.betas(4)
    with pytest.raises(ValueError, match="--mtpd-alpha is"):
        MTPDConfig(alpha=[0.1, 0.2]).alphas(3, 0.1)


def test_weights_decay_from_head_to_head():
    config = MTPDConfig(alpha=0.2, head_decay=0.5)
    assert config.alphas(4, 99.0) == (0.2, 0.1, 0.05, 0.025)
    assert config.betas(3) == (0.5, 0.25, 0.125)  # of the default as well
    assert config.betas(1) == (1.0,)
    assert config.alphas(3, 99.0) == config.alphas(4, 99.0)[:3]
    with pytest.raises(ValueError, match=r"--mtpd-beta is \[0.5, 0.25\]: --mtpd-head-decay 0.6 needs one number"):
        MTPDConfig(beta=[0.5, 0.25], head_decay=0.6)
    assert MTPDConfig(beta=[0.5, 0.25], head_decay=1.0).betas(2) == (0.5, 0.25)


def test_the_next_objective_begins_at_its_iteration():
    config = MTPDConfig(next_objective="e2e_tv", next_objective_start=1000, distill_ramp=2000, beta=0.3)
    assert [config.at(i).objective for i in (0, 999, 1000, 1001)] == ["topn_kl", "topn_kl", "e2e_tv", "e2e_tv"]
    then = config.at(1000)
    assert then == MTPDConfig(objective="e2e_tv", distill_ramp=2000, beta=0.3)  # nothing else changes
    assert then.at(0) == then


@pytest.mark.parametrize("start", [0, 9, 10])
def test_a_first_objective_that_would_never_count_is_refused(start: int):
    with pytest.raises(ValueError, match=f"--mtpd-next-objective-start is {start}: .* --mtpd-distill-start 10"):
        MTPDConfig(next_objective="tv", next_objective_start=start, distill_start=10)
    MTPDConfig(next_objective="tv", next_objective_start=11, distill_start=10)


def test_the_schedule_by_hand():
    config = MTPDConfig(distill_start=10, distill_ramp=4)
    assert [config.distill_scale(i) for i in (0, 9, 10, 11, 12, 13, 14, 1000)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [MTPDConfig(distill_start=3).distill_scale(i) for i in (2, 3)] == [0, 1]
    assert [MTPDConfig(distill_ramp=2).distill_scale(i) for i in (0, 1, 2)] == [0.5, 1, 1]


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.integers(0, 50), st.integers(0, 50))
def test_the_schedule_rises_once_from_0_to_1(start, ramp):
    scales = [MTPDConfig(distill_start=start, distill_ramp=ramp).distill_scale(i) for i in range(start + ramp + 2)]
    assert all(scale == 0 for scale in scales[:start])
    assert all(scale > 0 for scale in scales[start:])
    assert scales == sorted(scales) and scales[-1] == 1
    assert len([scale for scale in scales if 0 < scale < 1]) == max(0, ramp - 1)


@pytest.mark.parametrize("place", ["trunk", "embedding", "output"])
def test_two_passes_where_gradients_part_before_the_output_layer(place):
    of_ce: dict[str, Any] = {f"ce_{place}_share": 0.5}
    of_both: dict[str, Any] = {**of_ce, f"kd_{place}_share": 0.5}
    apart, together = MTPDConfig(**of_ce), MTPDConfig(**of_both)
    assert apart.heads_pass_twice == (place != "output")
    assert not together.heads_pass_twice


def test_every_field_has_its_flag_and_its_words():
    assert flag("kd_output_share") == "--mtpd-kd-output-share"
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(config_module)).body
        if isinstance(node, ast.ClassDef) and node.name == "MTPDConfig"
    ]
    documented = {
        statement.target.id
        for statement, words in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(words, ast.Expr)
        and isinstance(words.value, ast.Constant)
    }
    assert documented == {f.name for f in dataclasses.fields(MTPDConfig)}
