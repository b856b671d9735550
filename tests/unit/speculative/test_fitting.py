"""Heads in closed form, against a regression that is set up from whole passes."""

from pathlib import Path

import pytest
import torch

from megatron_mtpd.speculative.fit import Options
from megatron_mtpd.speculative.fitting import FITTED, HELD_OUT, RIDGES, fit_heads, held_out
from megatron_mtpd.speculative.teacher_forced import measure
from tests.unit.speculative.toys import VOCABULARY, hidden_states, prompts, toy_model

HEADS = 3


def texts(number=120, longest=24):
    return [text for text in prompts(number, seed=4, longest=longest) if len(text) > HEADS + 1]


def fitted(model, some):
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    fits = fit_heads(model, some, VOCABULARY, batch_size=7)
    return before, fits


def rows(model, some, head):
    """Of all texts, in fp64: what the maps of a head are given, by their names, what it gives before its final norm,
    and what it ought to give."""
    layer = model.mtp.layers[head - 1]
    modules = {end: module for end in FITTED for name, module in layer.named_modules() if name.endswith(end)}
    found, seen = [], {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, module in [*modules.items(), ("final_layernorm", layer.final_layernorm)]
    ]
    for text in some:
        main, *_ = hidden_states(model, text)
        target = (main[head:] / model.decoder.final_norm.weight).double()
        names = (*FITTED, "final_layernorm")
        found.append(([seen[name][: len(text) - head, 0].double() for name in names], target))
    for hook in hooks:
        hook.remove()
    columns = zip(*(inputs for inputs, _ in found), strict=True)
    *inputs, given = [torch.cat(parts) for parts in columns]
    return dict(zip(FITTED, inputs, strict=True)), given, torch.cat([target for _, target in found])


@torch.no_grad()
def test_the_maps_are_ridge_regressions_of_the_main_models_next_hidden_states_on_what_is_left():
    """One after the other: a model with the maps up to one has the inputs of that, and what those before it leave."""
    model, some = toy_model(HEADS), texts()
    _, fits = fitted(model, some)
    kept = [text for number, text in enumerate(some) if number % HELD_OUT != HELD_OUT - 1]
    assert len(kept) + len(held_out(some)) == len(some)
    for head, fit in enumerate(fits, 1):
        assert list(fit.weights) == list(fit.ridge) == list(fit.explained) == list(FITTED)
        for name in FITTED:
            x, given, t = rows(model, kept, head)
            before = sum((x[n] @ fit.weights[n].double().t() for n in FITTED[: FITTED.index(name)]), torch.zeros(()))
            gram = x[name].t() @ x[name]
            gram += fit.ridge[name] * gram.diagonal().mean() * torch.eye(len(gram))
            expected = torch.linalg.solve(gram, x[name].t() @ (t - before)).t()
            assert fit.ridge[name] in RIDGES
            torch.testing.assert_close(fit.weights[name].double(), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(given, before + x[name] @ fit.weights[name].double().t(), rtol=1e-4, atol=1e-4)
        _, given, t = rows(model, held_out(some), head)
        assert fit.explained[name] == pytest.approx(1 - float((t - given).square().sum() / t.square().sum()), abs=1e-4)
    assert all(fit.explained[FITTED[0]] < fit.explained[FITTED[2]] for fit in fits), "the blocks must tell more"


@torch.no_grad()
def test_the_models_heads_are_the_maps_and_its_trunk_is_what_it_was():
    model, some = toy_model(HEADS), texts()
    before, fits = fitted(model, some)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    expected = {f"mtp.layers.{head}.final_layernorm.weight" for head in range(HEADS)}
    for head, fit in enumerate(fits):
        for end, weight in fit.weights.items():
            (name,) = (name for name in before if name.startswith(f"mtp.layers.{head}.") and f"{end}.weight" in name)
            assert after[name].equal(weight)
            expected.add(name)
    assert changed == expected
    for head in range(HEADS):
        assert after[f"mtp.layers.{head}.final_layernorm.weight"].equal(after["decoder.final_norm.weight"])


@torch.no_grad()
def test_experts_become_zero_and_the_rest_is_fitted():
    options = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
    model = toy_model(HEADS, block="*E", moe_token_dispatcher_type="alltoall", **options)
    _, fits = fitted(model, texts())
    assert all(list(fit.weights) == list(FITTED[:2]) for fit in fits)
    experts = [p for name, p in model.mtp.named_parameters() if "linear_fc2" in name]
    assert experts and not any(p.any() for p in experts)
    assert all(p.any() for name, p in model.decoder.named_parameters() if "linear_fc2" in name)


@torch.no_grad()
def test_blocks_that_a_head_has_more_than_once_become_zero():
    model = toy_model(2, block="*-*-")
    _, fits = fitted(model, texts())
    assert all(list(fit.weights) == [FITTED[0]] for fit in fits)
    last = [p for name, p in model.mtp.named_parameters() if "linear_fc2" in name or "linear_proj" in name]
    assert len(last) == 2 * 4 and not any(p.any() for p in last)


@torch.no_grad()
def test_a_trunk_that_a_linear_map_can_tell_is_told():
    """A model without layers says what its last token alone makes it say, and the heads are given that token."""
    model = toy_model(HEADS)
    for name, parameter in model.decoder.named_parameters():
        if "linear_proj" in name or "linear_fc2" in name:
            parameter.zero_()
    some = texts()
    assert measure(model, held_out(some)).report()["cumulative_acceptance_rate"][-1] < 0.5
    _, fits = fitted(model, some)
    assert min(fit.explained[FITTED[0]] for fit in fits) > 0.9999
    assert measure(model, held_out(some)).report()["cumulative_acceptance_rate"] == [1.0] * HEADS


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=f"9 texts of more than {HEADS + 1} tokens: give at least {HELD_OUT}"):
        fit_heads(toy_model(HEADS), [*([1, 2, 3, 4, 5, 6],) * 9, [1, 2]], VOCABULARY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": 0}, "--tokens is 0: give at least 1"),
        ({"seq_length": 4}, "--seq-length is 4: give at least 8"),
        ({"batch_size": 0}, "--batch-size is 0: give at least 1"),
        ({"save": Path(__file__).parent}, "is not empty: name another directory, or give --force"),
    ],
)
def test_refused_options(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Options(**{"load": tmp_path, "save": tmp_path / "new", "data_path": ["x"]} | values)
