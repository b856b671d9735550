"""What changes from iteration to iteration and from head to head: the objective, and weights that decay."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.training import get_args as megatron_args  # noqa: E402

from megatron_mtpd.config import LossImplementation, MTPDConfig  # noqa: E402
from megatron_mtpd.training.forward_step import forward_step  # noqa: E402
from tests.distributed import gloo  # noqa: E402
from tests.distributed.layouts import build, train  # noqa: E402
from tests.distributed.toy import Layout, Toy, samples  # noqa: E402

pytestmark = pytest.mark.distributed


def at_iterations(mtpd: MTPDConfig, *arguments: dict[str, int]) -> list[dict[str, Any]]:
    """On one rank: metrics and gradients of the same batch, with Megatron's arguments as they are then."""
    model = build(Layout(), Toy(mtpd=mtpd))[0][0]
    results = []
    for values in arguments:
        model.zero_grad_buffer()
        vars(megatron_args()).update(values)
        batch = {key: torch.stack([sample[key] for sample in samples(Toy())]) for key in samples(Toy())[0]}
        output, loss_func = forward_step(iter([batch]), model)
        loss, tokens, metrics = loss_func(output)
        (loss / tokens).backward()
        gradients = {name: p.main_grad.clone() for name, p in model.module.named_parameters()}
        results.append({"metrics": metrics, "gradients": gradients})
    return results


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("loss", get_args(LossImplementation))
def test_the_objective_changes_at_its_iteration(loss):
    """Bit for bit the step of the one objective before, of the other from then on, in either order of the calls."""
    first = MTPDConfig.as_published(top_n=10, loss=loss)
    both = replace(first, next_objective="e2e_tv", next_objective_start=5)
    (of_first,), (of_next,) = (
        gloo.run(at_iterations, 1, config, {"curr_iteration": 0})[0]
        for config in (first, replace(first, objective="e2e_tv"))
    )
    assert not same(of_next["gradients"], of_first["gradients"])
    (found,) = gloo.run(
        at_iterations,
        1,
        both,
        *({"curr_iteration": iteration} for iteration in (5, 4, 0, 6)),
        {"curr_iteration": 0, "iteration": 5},  # nothing but evaluation, of a checkpoint of five iterations
    )
    for result, (number, expected) in zip(
        found, [(2, of_next), (1, of_first), (1, of_first), (2, of_next), (2, of_next)], strict=True
    ):
        assert result["metrics"].pop("objective").tolist() == [number, 1]
        assert same(result["metrics"], expected["metrics"]) and same(result["gradients"], expected["gradients"])
    assert "objective" not in of_first["metrics"]


def test_the_distillation_begins_at_its_iteration():
    config = MTPDConfig.as_published(top_n=10, distill_start=2, distill_ramp=2)
    (found,) = gloo.run(at_iterations, 1, config, *({"curr_iteration": iteration} for iteration in (1, 2, 3)))
    for result, beta in zip(found, (0.0, 0.25, 0.5), strict=True):
        ((expected,),) = gloo.run(at_iterations, 1, MTPDConfig.as_published(top_n=10, beta=beta), {"curr_iteration": 0})
        assert same(result["gradients"], expected["gradients"])


@pytest.mark.parametrize("objective", ["topn_kl", "e2e_tv"])
@pytest.mark.parametrize("loss", get_args(LossImplementation))
def test_a_decay_is_the_same_as_weights_per_head(loss, objective):
    """Powers of two, so that the numbers are the same to the last bit."""
    config = MTPDConfig.as_published(top_n=10, loss=loss, objective=objective, alpha=0.5, beta=1.0)
    decayed = train(Layout(), Toy(mtpd=replace(config, head_decay=0.25)))
    listed = train(Layout(), Toy(mtpd=replace(config, alpha=[0.5, 0.125], beta=[1.0, 0.25])))
    assert same(decayed.gradients, listed.gradients)
    assert not same(decayed.gradients, train(Layout(), Toy(mtpd=config)).gradients)
