"""What reaches which weight: gradient shares, clipping, document ends, and the gradient as the slope of the loss.

All on one rank, by the same step as the layouts.
"""

import itertools
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from megatron_mtpd.config import SHARES, LossImplementation
from tests.distributed import gloo
from tests.distributed.layouts import ADAM_EPS, LEARNING_RATE, build, train
from tests.distributed.test_equivalence import check_tensors, difference, top10
from tests.distributed.toy import HEADS, Layout, Toy, initial_weight, samples

pytestmark = pytest.mark.distributed

ONE = Layout()
CUT: dict[str, Any] = dict.fromkeys(SHARES, 0.0)
# Sums of gradients of several runs against one: a few roundings of fp32, relative to a tensor's largest entry.
TOLERANCE = 1e-5


@pytest.fixture(params=get_args(LossImplementation))
def loss(request):
    return request.param


def gradients(toy: Toy = Toy(), **mtpd: Any):  # noqa: B008  # frozen
    return train(ONE, replace(toy, mtpd=top10(**mtpd))).gradients


def of_heads(tensors):
    return {name: value for name, value in tensors.items() if name.startswith("mtp.")}


def of_main_model(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("mtp.")}


def changed(found, reference):
    return {name for name in reference if difference(found[name], reference[name]) > TOLERANCE}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_all_shares_0_leave_the_main_model_alone(tied, loss):
    toy = Toy(tied=tied)
    main_alone = gradients(toy, alpha=[0.0], beta=[0.0], loss=loss)
    cut, whole = gradients(toy, loss=loss, **CUT), gradients(toy, loss=loss)
    check_tensors(of_main_model(cut), of_main_model(main_alone), TOLERANCE)
    check_tensors(of_heads(cut), of_heads(whole), TOLERANCE)  # the heads themselves learn all the same
    assert changed(of_main_model(whole), of_main_model(main_alone)) == set(of_main_model(whole))


def test_each_share_opens_one_way(loss):
    cut = gradients(loss=loss, **CUT)
    reached = {share: changed(gradients(Toy(), loss=loss, **CUT | {share: 1.0}), cut) for share in SHARES}
    for loss in ("ce", "kd"):
        assert reached[f"{loss}_embedding_share"] == {"embedding.word_embeddings.weight"}
        assert reached[f"{loss}_output_share"] == {"output_layer.weight"}
        trunk = {name for name in of_main_model(cut) if name != "output_layer.weight"}
        assert reached[f"{loss}_trunk_share"] == trunk  # down to the embedding, through the trunk


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shares_are_linear_and_independent(tied, loss):
    """g(shares) = g(0) + sum_i share_i (g(e_i) - g(0)): each way carries its share of its own gradient."""
    toy = Toy(tied=tied)
    shares: dict[str, Any] = dict(zip(SHARES, (0.25, 1.0, 0.5, 0.75, 0.0, 0.125), strict=True))
    cut, mixed = gradients(toy, loss=loss, **CUT), gradients(toy, loss=loss, **shares)
    expected = {name: value.clone() for name, value in cut.items()}
    for share, size in shares.items():
        for name, value in gradients(toy, loss=loss, **CUT | {share: 1.0}).items():
            expected[name] += size * (value - cut[name])
    check_tensors(mixed, expected, TOLERANCE)


def passes_of_the_output_layer() -> int:
    core = build(ONE, Toy(mtpd=top10(loss="eager", ce_output_share=0.5)))[0][0].module
    calls = []
    core.output_layer.register_forward_pre_hook(lambda _module, _inputs: calls.append(1))
    batch = {key: value[None] for key, value in samples(Toy())[0].items()}
    with torch.no_grad():
        core(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return len(calls)


def test_without_gradients_shares_cost_nothing():
    assert gloo.run(passes_of_the_output_layer, 1) == [1 + HEADS]


@pytest.mark.parametrize(
    ("options", "kept"), [({"train": "heads"}, "mtp."), ({"train": "new-heads", "old_heads": 1}, "mtp.layers.1.")]
)
def test_what_is_frozen_has_no_gradient_and_the_rest_keeps_its_own(options, kept, loss):
    found, whole = gradients(loss=loss, **options), gradients(loss=loss)
    check_tensors(found, {name: value for name, value in whole.items() if name.startswith(kept)}, TOLERANCE)


@pytest.mark.parametrize(("silent", "weight"), [("ce", "alpha"), ("kd", "beta")])
def test_the_shares_of_a_loss_without_weight_do_nothing(silent, weight):
    off: dict[str, Any] = {f"{silent}_{way}_share": 0.0 for way in ("trunk", "embedding", "output")}
    check_tensors(gradients(Toy(), **{weight: [0.0]}, **off), gradients(Toy(), **{weight: [0.0]}), TOLERANCE)


def test_weights_are_per_head_and_linear(loss):
    """g = g_main + sum_k alpha_k g(CE_k) + beta_k g(D_k)."""
    nothing = gradients(loss=loss, alpha=[0.0], beta=[0.0])
    weights: dict[str, Any] = {"alpha": [0.5, 2.0], "beta": [1.5, 0.25]}
    expected = {name: value.clone() for name, value in nothing.items()}
    for kind, head in itertools.product(weights, range(HEADS)):
        unit: dict[str, Any] = {"alpha": [0.0], "beta": [0.0]} | {kind: [float(k == head) for k in range(HEADS)]}
        for name, value in gradients(loss=loss, **unit).items():
            expected[name] += weights[kind][head] * (value - nothing[name])
    check_tensors(gradients(loss=loss, **weights), expected, TOLERANCE)


@pytest.mark.parametrize("objective", ["topn_kl", "e2e_tv"])
def test_the_gradient_is_the_slope_of_the_reported_loss(objective, loss):
    """Along a line through the heads' weights, where the teacher stands still: central differences.

    The step balances two errors: kinks of the objective and its third derivative, and losses of 10 with 7 digits.
    Measured at 3e-4: below 1e-4; at 1e-3 and at 3e-5: 1e-3 and more.
    """
    mtpd = top10(loss=loss, objective=objective, alpha=[0.3, 0.7], beta=[0.9, 0.4])
    toy, step = Toy(mtpd=mtpd, micro_batch_size=4, masked=True), 3e-4
    slope = sum(
        float(
            (
                value
                * (initial_weight(replace(toy, nudge=1.0), name, value.shape) - initial_weight(toy, name, value.shape))
            ).sum()
        )
        for name, value in train(ONE, toy).gradients.items()
    )
    assert slope == pytest.approx((loss_at(toy, step) - loss_at(toy, -step)) / (2 * step), rel=1e-3)


def loss_at(toy, nudge):
    metrics = {name: pair.double() for name, pair in train(ONE, replace(toy, nudge=nudge)).metrics.items()}
    mtpd = toy.mtpd
    total = sum(mtpd.alpha[k] * metrics[f"ce/{k + 1}"][0] / metrics[f"ce/{k + 1}"][1] for k in range(HEADS))
    if mtpd.objective == "e2e_tv":  # one term for all heads, over the drafts of head 1
        return float(total + sum(mtpd.beta) * metrics["kd/1"][0] / metrics["kd/1"][1])
    return float(
        total + sum(mtpd.beta[k] * metrics[f"kd/{k + 1}"][0] / metrics[f"kd/{k + 1}"][1] for k in range(HEADS))
    )


def test_nothing_crosses_a_document_end(loss):
    """Other text in a document without loss changes nothing, to the last bit; unless heads may cross documents."""
    for crosses in (False, True):
        toy = Toy(documents=True, mtpd=top10(loss=loss, cross_documents=crosses))
        one, other = (train(ONE, replace(toy, first_document=text)) for text in (1, 5))
        equal = all(torch.equal(one.metrics[name], other.metrics[name]) for name in one.metrics)
        assert equal is not crosses
        assert torch.equal(one.gradients["output_layer.weight"], other.gradients["output_layer.weight"]) is not crosses


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
def test_clipping(apart):
    """Heads and main model by norms of their own, or all by one: the norms, and what the optimizer makes of them."""
    toy = Toy(mtpd=top10(clip_apart=apart), optimizer_steps=1, clip=1.0)
    result = train(ONE, toy)
    groups = {"trunk": of_main_model, "mtp": of_heads} if apart else {"trunk": dict}
    assert result.norms.keys() == groups.keys()
    for group, members in groups.items():
        clipped = members(result.gradients)
        norm = float(sum(value.double().square().sum() for value in clipped.values()) ** 0.5)
        assert result.norms[group] == pytest.approx(norm, rel=1e-5)
        assert norm > 1.5 * toy.clip, "the test needs gradients that are clipped"
        for name, value in clipped.items():
            gradient = value * toy.clip / norm
            step = LEARNING_RATE * gradient / (gradient.abs() + ADAM_EPS)  # Adam's first
            expected = initial_weight(toy, name, value.shape) - step
            torch.testing.assert_close(result.weights[name], expected, rtol=0, atol=1e-6)  # weights of up to 4
