"""Every parallel layout and both implementations of the loss train the same model: losses, reports and gradients.

The reference is the eager loss in one process. The weights, the global batch and its micro-batches are the same; only
who computes what differs. A layout may add the same numbers in another order, and nothing else.
"""

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

from megatron_mtpd.config import LossImplementation, MTPDConfig, Objective
from tests.distributed.layouts import Step, train
from tests.distributed.toy import Layout, Toy

pytestmark = pytest.mark.distributed

# Rounding is 6e-8 in fp32; a gradient is a sum of up to 1e3 products behind a dozen layers. Measured, relative to a
# tensor's largest entry: up to 6e-6 with tensor parallelism, 1e-6 without. The losses: up to 5e-7.
GRADIENT_TOLERANCE = 3e-5
METRIC_TOLERANCE = 5e-6

LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(stages=(2, 2)),
    "pp2-uneven": Layout(stages=(3, 1)),
    "pp3": Layout(stages=(2, 1, 1)),
    "dp2": Layout(dp=2),
    "dp2-overlap": Layout(dp=2, overlap=True),
    "dp2-sharded": Layout(dp=2, distributed_optimizer=True),
    "dp2-sharded-overlap": Layout(dp=2, distributed_optimizer=True, overlap=True),
    "tp2-pp2": Layout(tp=2, stages=(2, 2)),
    "tp2-sp-pp2-uneven": Layout(tp=2, sequence_parallel=True, stages=(3, 1)),
    "tp2-dp2": Layout(tp=2, dp=2),
    "tp2-sp-dp2-sharded": Layout(tp=2, sequence_parallel=True, dp=2, distributed_optimizer=True),
}
top10 = partial(MTPDConfig.as_published, top_n=10)
UNEQUAL_SHARES = top10(
    ce_embedding_share=0.75,
    ce_output_share=0.5,
    kd_trunk_share=0.0,
    kd_embedding_share=0.5,
    kd_output_share=0.25,
)
PLAIN, EXPERTS = Toy(), Toy(experts=4)
TOYS = {
    "masked": Toy(masked=True),
    "accumulation": Toy(masked=True, micro_batch_size=1),
    "documents": Toy(documents=True),
    "documents-masked": Toy(documents=True, masked=True),
    "tied": Toy(tied=True),
    "per-token": Toy(masked=True, per_token=True),
    "recompute-full": Toy(recompute="full"),
    "recompute-selective": Toy(recompute="selective"),
    "unequal-shares": Toy(mtpd=UNEQUAL_SHARES),
    "unequal-shares-tied": Toy(mtpd=UNEQUAL_SHARES, tied=True),
    "unequal-shares-recompute": Toy(mtpd=UNEQUAL_SHARES, recompute="full"),
    "clip-apart": Toy(optimizer_steps=2, clip=0.5),
    "clip-together": Toy(optimizer_steps=2, clip=0.5, mtpd=top10(clip_apart=False)),
    "heads-only": Toy(optimizer_steps=2, clip=0.5, mtpd=top10(train="heads")),
    "new-heads": Toy(optimizer_steps=2, clip=0.5, mtpd=top10(train="new-heads", old_heads=1)),
    "biases": Toy(options={"normalization": "LayerNorm", "add_bias_linear": True, "qk_layernorm": True}),
    "repeated-layer": Toy(options={"mtp_use_repeated_layer": True}),
    "mup": Toy(options={"use_mup": True, "mup_base_hidden_size": 16}),
}


def alone(toy: Toy) -> Step:
    """The reference for a toy."""
    return train(Layout(), with_loss(toy, "eager"))


def with_loss(toy: Toy, loss: LossImplementation) -> Toy:
    return replace(toy, mtpd=replace(toy.mtpd, loss=loss))


def check(result: Step, reference: Step, tolerance: float = GRADIENT_TOLERANCE) -> None:
    assert result.metrics.keys() == reference.metrics.keys()
    for name, expected in reference.metrics.items():
        assert result.metrics[name].tolist() == pytest.approx(expected.tolist(), rel=METRIC_TOLERANCE), name
    check_tensors(result.gradients, reference.gradients, tolerance)
    check_tensors(result.weights, reference.weights, tolerance)
    assert result.norms == pytest.approx(reference.norms, rel=METRIC_TOLERANCE)


def check_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    errors = {name: difference(found[name], wanted[name]) for name in wanted}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error < tolerance}
    assert not wrong


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry that is wanted."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, loss):
    check(train(layout, with_loss(PLAIN, loss)), alone(PLAIN))


@pytest.mark.parametrize("layout", ["tp2-sp-pp2-uneven", "dp2-sharded"])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_options_in_layouts(toy, layout):
    check(train(LAYOUTS[layout], toy), alone(toy))


@pytest.mark.parametrize("toy", ["documents-masked", "tied", "per-token", "unequal-shares", "unequal-shares-tied"])
def test_options_with_the_eager_loss(toy):
    check(train(LAYOUTS["tp2-sp-pp2-uneven"], with_loss(TOYS[toy], "eager")), alone(TOYS[toy]))


def test_a_middle_stage_tells_documents_apart():
    check(train(Layout(tp=2, stages=(2, 1, 1)), TOYS["documents"]), alone(TOYS["documents"]))


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize("objective", get_args(Objective))
def test_objectives_over_vocabulary_shards(objective, loss):
    toy = Toy(mtpd=MTPDConfig.as_published(loss=loss, objective=objective, top_n=10, temperature=1.5), masked=True)
    check(train(LAYOUTS["tp2"], toy), alone(toy))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        Layout(dp=2, ep=2, distributed_optimizer=True),
        Layout(tp=2, sequence_parallel=True, dp=2, ep=2),
        Layout(dp=2, ep=2, stages=(3, 1)),
    ],
    ids=["ep2", "ep2-sharded", "tp2-sp-ep2", "pp2-uneven-ep2"],
)
def test_mixture_of_experts(layout):
    check(train(layout, EXPERTS), alone(EXPERTS))


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize("toy", [PLAIN, TOYS["unequal-shares-recompute"]], ids=["plain", "two-passes"])
def test_overlapped_communication_is_awaited(toy, loss):
    """Weights that are gathered while the step runs, and gradients that come in two parts.

    The loss takes the output layer's weight by itself; recomputed heads that run twice give their gradients twice.
    Three steps: Megatron learns in the first how often a gradient comes.
    """
    toy = replace(with_loss(toy, loss), optimizer_steps=3, clip=0.5)
    check(train(LAYOUTS["dp2-sharded-overlap"], toy), alone(toy))


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("mtpd", [PLAIN.mtpd, UNEQUAL_SHARES], ids=["equal-shares", "unequal-shares"])
def test_recomputation_changes_nothing(mtpd, recompute):
    toy = Toy(mtpd=mtpd)
    check(train(Layout(), replace(toy, recompute=recompute)), alone(toy))


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_per_token_loss_is_that_of_the_whole_batch(layout, micro_batch_size):
    """Whatever the batch is split into, unlike Megatron's own heads, which count the tokens of each micro-batch."""
    toy = TOYS["per-token"]
    result = train(LAYOUTS.get(layout, Layout()), replace(toy, micro_batch_size=micro_batch_size))
    check(result, alone(replace(toy, micro_batch_size=4)))


def test_default_loss_is_the_mean_over_micro_batches():
    """The contrast to the test above: by default each micro-batch counts alike, however few tokens it has."""
    one, four = (alone(Toy(masked=True, micro_batch_size=size)) for size in (1, 4))
    assert max(difference(one.gradients[name], four.gradients[name]) for name in four.gradients) > 0.1


def check_bf16(layout):
    """The error against fp32 is that of bf16 itself, and not more because of the layout.

    bf16 rounds to 4e-3 and layouts round at other places, so entries cannot be compared; what can is each tensor's
    error as a whole, against the one that bf16 makes in one process. Measured ratio: at most 1.3.
    """
    exact, naive, found = alone(PLAIN), alone(Toy(bf16=True)), train(layout, Toy(bf16=True))
    for name, wanted in exact.gradients.items():
        error, bound = ((step.gradients[name] - wanted).norm() for step in (found, naive))
        assert error < 2 * bound + 1e-3 * wanted.norm(), name
    for name, wanted in exact.metrics.items():
        error, bound = ((step.metrics[name] - wanted).abs().max() for step in (found, naive))
        assert error <= 2 * bound + 1e-3 * wanted.abs().max(), name


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-uneven", "dp2-sharded", "tp2-sp-pp2-uneven"])
def test_bf16(layout):
    check_bf16(LAYOUTS[layout])
