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
    assert all(getattr(config, name) == 1.0 for name in SHARES)
    assert config.distill_scale(0) == 1.0


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MTPDConfig().top_n = 5  # type: ignore[misc]


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


@pytest.mark.parametrize(("name", "value"), [("top_n", 1), ("lk_eta", 0.0), ("alpha", [0.0]), ("beta", [0.0, 2.0])])
def test_the_edge_of_what_is_allowed(name: str, value: Any):
    assert getattr(MTPDConfig(**{name: value}), name) == value


def test_one_weight_for_all_heads_or_one_for_each():
    config = MTPDConfig(alpha=[0.2], beta=[1, 0.6, 0.36])
    assert config.alphas(3, 99.0) == (0.2, 0.2, 0.2)
    assert config.betas(3) == (1.0, 0.6, 0.36)
    assert MTPDConfig(beta=[0.0]).betas(2) == (0.0, 0.0)  # a zero is a value, not a missing one
    with pytest.raises(
        ValueError, match=r"--mtpd-beta is \[1, 0.6, 0.36\]: the model has 4 heads; give one number, or 4"
    ):
        config.betas(4)
    with pytest.raises(ValueError, match="--mtpd-alpha is"):
        MTPDConfig(alpha=[0.1, 0.2]).alphas(3, 0.1)


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
