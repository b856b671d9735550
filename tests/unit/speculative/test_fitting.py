"""Heads in closed form, against a regression that is set up from whole passes."""

from pathlib import Path

import pytest
import torch

from megatron_mtpd.speculative.fit import Options
from megatron_mtpd.speculative.fitting import HELD_OUT, RIDGES, fit_heads, held_out
from megatron_mtpd.speculative.teacher_forced import measure
from tests.unit.speculative.toys import VOCABULARY, hidden_states, prompts, toy_model

HEADS = 3


def texts(number=120, longest=24):
    return [text for text in prompts(number, seed=4, longest=longest) if len(text) > HEADS + 1]


def fitted(model, some):
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    fits = fit_heads(model, some, VOCABULARY, batch_size=7)
    return before, fits


def normalised(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def rows(model, some, depth, head):
    """Inputs and targets of a head, in fp64, where `depth` is what it takes from the depth before, by text."""
    layer, found = model.mtp.layers[head - 1], []
    for text, before in zip(some, depth, strict=True):
        embedded = model.embedding.word_embeddings.weight[torch.tensor(text[head:])]
        x = torch.cat([layer.enorm(embedded), layer.hnorm(before[: len(text) - head])], -1)
        main = hidden_states(model, text)[0]
        found.append((x.double(), (main[head:] / model.decoder.final_norm.weight).double()))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@torch.no_grad()
def test_the_maps_are_the_ridge_regressions_of_the_main_models_next_hidden_states():
    model, some = toy_model(HEADS), texts()
    _, fits = fitted(model, some)
    kept = [text for number, text in enumerate(some) if number % HELD_OUT != HELD_OUT - 1]
    assert len(kept) + len(held_out(some)) == len(some)
    for head, fit in enumerate(fits, 1):
        before = [hidden_states(model, text)[head - 1] for text in kept]  # head 2 takes what the fitted head 1 gives
        x, t = rows(model, kept, before, head)
        gram = x.t() @ x
        gram += fit.ridge * gram.diagonal().mean() * torch.eye(len(gram))
        expected = torch.linalg.solve(gram, x.t() @ t).t()
        assert fit.ridge in RIDGES
        torch.testing.assert_close(fit.weight.double(), expected, rtol=1e-3, atol=1e-3)
        x, t = rows(model, held_out(some), [hidden_states(model, text)[head - 1] for text in held_out(some)], head)
        left = (t - x @ fit.weight.double().t()).square().sum() / t.square().sum()
        assert fit.explained == pytest.approx(1 - float(left), abs=1e-4)


@torch.no_grad()
def test_the_models_heads_are_the_maps_and_its_trunk_is_what_it_was():
    model, some = toy_model(HEADS), texts()
    before, fits = fitted(model, some)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not value.equal(after[name])}
    assert changed and all(name.startswith("mtp.layers.") for name in changed)
    assert {name.split(".", 3)[3].split(".weight")[0].rpartition(".")[2] for name in changed} == {
        *("eh_proj", "linear_proj", "linear_fc2", "final_layernorm")
    }
    text = some[0]
    main, *heads = hidden_states(model, text)
    for head, fit in enumerate(fits, 1):
        x, _ = rows(model, [text], [[main, *heads][head - 1]], head)
        expected = normalised(x.float() @ fit.weight.t()) * model.decoder.final_norm.weight
        torch.testing.assert_close(heads[head - 1][: len(text) - head], expected, rtol=2e-4, atol=2e-4)


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
    assert min(fit.explained for fit in fits) > 0.9999
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
