"""`--mtpd-train`: what is frozen stays, bit for bit, and costs nothing; what is trained learns as if all were."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.training.trainable import freeze
from tests.distributed import gloo
from tests.distributed.layouts import build, train
from tests.distributed.test_equivalence import check_tensors
from tests.distributed.toy import Layout, Toy, initial_weight

pytestmark = pytest.mark.distributed

HEADS_ONLY = Toy(mtpd=MTPDConfig.as_published(top_n=10, train="heads"))
NEW_HEADS = Toy(mtpd=MTPDConfig.as_published(top_n=10, train="new-heads", old_heads=1))
LAYOUTS = {
    "one": Layout(),
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(stages=(2, 2)),
    "dp2-distributed-optimizer": Layout(dp=2, distributed_optimizer=True),
}


def is_trained(toy, name):
    return name.startswith("mtp.layers.1." if toy.mtpd.train == "new-heads" else "mtp.")


@pytest.mark.parametrize("toy", [HEADS_ONLY, NEW_HEADS], ids=["heads", "new-heads"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_frozen_weights_are_identical_and_trained_ones_move(layout, toy):
    after = train(layout, replace(toy, optimizer_steps=2)).weights
    assert any(is_trained(toy, name) for name in after)
    for name, weight in after.items():
        before = initial_weight(toy, name, weight.shape)
        assert torch.equal(weight, before) != is_trained(toy, name), name


@pytest.mark.parametrize("toy", [HEADS_ONLY, NEW_HEADS], ids=["heads", "new-heads"])
def test_the_trained_heads_get_the_gradient_of_training_all(toy):
    frozen = train(Layout(), toy)
    whole = train(Layout(), replace(toy, mtpd=MTPDConfig.as_published(top_n=10)))
    expected = {name: value for name, value in whole.gradients.items() if is_trained(toy, name)}
    assert set(frozen.gradients) == set(expected), "frozen parameters have no gradient buffer"
    # The same sums in the same order but for what is not computed: roundings of fp32.
    check_tensors(frozen.gradients, expected, 1e-6)
    for name, pair in whole.metrics.items():
        torch.testing.assert_close(frozen.metrics[name], pair, rtol=1e-6, atol=1e-6)


def parts_of_a_frozen_model():
    model, _ = build(Layout(), replace(NEW_HEADS, optimizer_steps=1))
    core: Any = model[0].module
    core.train()
    seen = []
    core.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    tokens = torch.arange(16).view(1, 16)
    main, for_ce, _ = core.hidden_states_of_all_heads(tokens, tokens, None)
    return {
        "decoder keeps a graph": seen,
        "the loss has a gradient for": [hidden.requires_grad for hidden in (main, *for_ce)],
        "in training mode": [core.decoder.training, *(head.training for head in core.mtp.layers)],
    }


def test_frozen_parts_keep_no_graph_and_stay_in_evaluation_mode():
    (found,) = gloo.run(parts_of_a_frozen_model, 1)
    assert found["decoder keeps a graph"] == [False]
    assert found["in training mode"] == [False, False, True]
    assert found["the loss has a gradient for"] == [False, False, True]


def test_no_head_left_to_train_is_refused():
    class Model:
        mtp_process = pre_process = True
        mtp = type("Block", (), {"layers": []})

    with pytest.raises(ValueError, match="--mtpd-old-heads is 2"):
        freeze([Model()], MTPDConfig.as_published(train="new-heads", old_heads=2))  # type: ignore[list-item]
