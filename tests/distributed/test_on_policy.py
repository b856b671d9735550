"""`--mtpd-on-policy-fraction`: what each head is fed, what reaches the weights, and that layouts agree on it.

The drafts are computed here once more, from the hidden states of the heads and all their logits.
"""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from megatron_mtpd.config import LossImplementation
from megatron_mtpd.losses.drafts import draft_tokens, on_policy_positions
from tests.distributed import gloo, layouts, toy
from tests.distributed.layouts import build, train
from tests.distributed.test_equivalence import LAYOUTS, UNEQUAL_SHARES, alone, check, with_loss
from tests.distributed.toy import SAMPLES, SEQUENCE, VOCABULARY, Layout, Toy, samples

pytestmark = pytest.mark.distributed

ONE = Layout()
HALF = replace(Toy().mtpd, on_policy_fraction=0.5)
WHOLE = replace(Toy().mtpd, on_policy_fraction=1.0)
SHARES = {name: getattr(UNEQUAL_SHARES, name) for name in ("ce_embedding_share", "kd_trunk_share")}


def batch() -> dict[str, torch.Tensor]:
    parts = samples(Toy())
    return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}


def built(case: Toy, num_heads: int, iteration: int = 0) -> Any:
    toy.HEADS = layouts.HEADS = num_heads  # of this process, which ends with the function
    core = build(ONE, case)[0][0].module
    core.iteration = iteration
    return core


def fed(mtpd, num_heads: int, iteration: int = 0, options: dict | None = None, training: bool = True) -> dict:
    """On one rank: the tokens whose embedding each head takes, in order, and each head's own best token."""
    core = built(Toy(mtpd=mtpd, options=options or {}), num_heads, iteration)
    core.train(training)
    looked_up, hidden, embedded = [], [], []
    core.embedding.register_forward_pre_hook(lambda _, a, k: looked_up.append(k["input_ids"]), with_kwargs=True)
    for layer in core.mtp.layers:
        layer.enorm.register_forward_pre_hook(lambda _, a: embedded.append(a[0].detach()))
        layer.register_forward_hook(lambda _, a, output: hidden.append(output[0].detach()))
    parts = batch()
    core(parts["tokens"], parts["position_ids"], None, labels=parts["labels"], loss_mask=parts["loss_mask"])
    table, weight = core.embedding.word_embeddings.weight, core.output_layer.weight
    return {
        "tokens": looked_up[1:],  # the first are the main model's
        "best": [(h @ weight.t()).argmax(-1).t() for h in hidden],
        "embedded": all(torch.equal(e, table[t].transpose(0, 1)) for e, t in zip(embedded, looked_up[1:], strict=True)),
    }


def text(k: int) -> torch.Tensor:
    """Token i + k at position i, as far as there is one."""
    return batch()["tokens"][:, k:]


def expected_of_head(k: int, best: torch.Tensor, is_fed: torch.Tensor) -> torch.Tensor:
    return torch.where(is_fed[: SEQUENCE - k], best[:, : SEQUENCE - k], text(k))


@pytest.mark.parametrize(
    ("mtpd", "iteration", "options"),
    [
        (WHOLE, 0, {}),
        (HALF, 0, {}),
        (HALF, 7, {}),
        (replace(HALF, loss="eager"), 0, {}),
        (replace(HALF, **SHARES), 0, {}),  # two passes of the heads
        (HALF, 0, {"mtp_use_repeated_layer": True}),
    ],
    ids=["whole", "half", "later", "eager", "two-passes", "repeated-layer"],
)
def test_heads_are_fed_the_draft_of_the_head_before(mtpd, iteration, options):
    (found,) = gloo.run(fed, 1, mtpd, 3, iteration, options)
    is_fed = on_policy_positions(SEQUENCE, mtpd.on_policy_fraction, iteration)
    assert is_fed.sum() > 0 and (mtpd.on_policy_fraction == 1.0 or is_fed.sum() < SEQUENCE)
    assert torch.equal(found["tokens"][0][:, :-1], text(1)), "head 1 is fed the main model's token: the text's"
    for k in (2, 3):
        tokens, drafts = found["tokens"][k - 1][:, : SEQUENCE - k], found["best"][k - 2]
        assert torch.equal(tokens, expected_of_head(k, drafts, is_fed)), k
        assert not torch.equal(tokens, text(k)), "the toy's drafts are often wrong, else nothing is tested"
    assert found["embedded"]
    assert len(found["tokens"]) == (6 if mtpd.heads_pass_twice else 3)
    for first, second in zip(found["tokens"][:3], found["tokens"][3:], strict=False):
        assert torch.equal(first, second), "both passes are of the same drafts"


def test_evaluation_is_of_the_text():
    (found,) = gloo.run(fed, 1, WHOLE, 3, training=False)
    assert all(torch.equal(found["tokens"][k - 1][:, : SEQUENCE - k], text(k)) for k in (1, 2, 3))


def test_fraction_0_is_bit_for_bit_what_it_was():
    """Also with the hooks in place: of so small a fraction no position is drawn."""
    plain, none = Toy(optimizer_steps=2, clip=0.5), replace(Toy().mtpd, on_policy_fraction=1e-12)
    assert replace(Toy().mtpd, on_policy_fraction=0.0) == Toy().mtpd
    expected, found = train(ONE, plain), train(ONE, replace(plain, mtpd=none))
    for kind in ("metrics", "gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            assert torch.equal(getattr(found, kind)[name], value), name
    drafted = train(ONE, replace(plain, mtpd=WHOLE))
    name = "embedding.word_embeddings.weight"
    assert not torch.equal(drafted.gradients[name], expected.gradients[name])


def gradients(mtpd, given: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """On one rank: of a batch, with the tokens of head 2's input given as numbers or as the model has them."""
    core = built(Toy(mtpd=mtpd), 2)
    calls = []

    def give(_module, args, kwargs):
        calls.append(kwargs["input_ids"])
        if given is not None and len(calls) == 3:  # after those of the main model and of head 1
            kwargs = {**kwargs, "input_ids": given}
        return args, kwargs

    core.embedding.register_forward_pre_hook(give, with_kwargs=True)
    parts = batch()
    losses = core(parts["tokens"], parts["position_ids"], None, labels=parts["labels"], loss_mask=parts["loss_mask"])
    (losses * parts["loss_mask"]).sum().backward()
    return {name: p.main_grad.clone() for name, p in core.named_parameters()}


def test_no_gradient_passes_through_a_draft():
    """The gradients are those of a head 2 that is given the same tokens from outside, bit for bit."""
    (tokens,) = (found["tokens"][1] for found in gloo.run(fed, 1, WHOLE, 2))
    (expected,) = gloo.run(gradients, 1, Toy().mtpd, tokens)
    (found,) = gloo.run(gradients, 1, WHOLE)
    (of_text,) = gloo.run(gradients, 1, Toy().mtpd)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert any(not torch.equal(of_text[name], value) for name, value in expected.items())


# Layouts -------------------------------------------------------------------------------------------------------------

PLAIN = Toy(mtpd=HALF)


@pytest.mark.parametrize("loss", get_args(LossImplementation))
@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-pp2", "tp2-sp-dp2-sharded"])
def test_layouts_draft_alike(layout, loss):
    check(train(LAYOUTS[layout], with_loss(PLAIN, loss)), alone(PLAIN))


@pytest.mark.parametrize(
    "case",
    [
        Toy(mtpd=replace(UNEQUAL_SHARES, on_policy_fraction=0.5), tied=True, recompute="full"),
        Toy(mtpd=replace(HALF, train="new-heads", old_heads=1), optimizer_steps=2, clip=0.5),
        Toy(mtpd=HALF, experts=4),
        Toy(mtpd=HALF, documents=True, masked=True, micro_batch_size=1),
    ],
    ids=["two-passes-tied-recomputed", "new-heads", "experts", "documents"],
)
def test_options_draft_alike(case):
    check(train(LAYOUTS["tp2-sp-pp2-uneven"], case), alone(case))


@pytest.mark.parametrize(
    "layout", [Layout(cp=2), Layout(cp=2, tp=2, sequence_parallel=True)], ids=["cp2", "cp2-tp2-sp"]
)
def test_parts_of_a_sequence_draft_alike(layout):
    check(train(layout, PLAIN), alone(PLAIN))


def test_the_weights_that_draft_are_awaited():
    """They are gathered while the step runs; a draft takes the output layer's before the layer runs."""
    case = replace(PLAIN, optimizer_steps=3, clip=0.5)
    check(train(LAYOUTS["dp2-sharded-overlap"], case), alone(case))


def drafts_on_slices(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    rank, group = dist.get_rank(), dist.group.WORLD
    part, split = weight.chunk(2)[rank], hidden.chunk(2)[rank]
    return [
        draft_tokens(hidden, part, group, chunk_rows=5),
        draft_tokens(split, part, group, sequence_parallel=True, chunk_rows=5),
    ]


def test_drafts_of_slices_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SEQUENCE, SAMPLES, 8, generator=generator)
    weight = torch.randn(VOCABULARY, 8, generator=generator)
    weight[VOCABULARY // 2 :: 3] = weight[: VOCABULARY // 2 : 3]  # equals on both ranks: the lowest id counts
    hidden[3, 1] = float("nan")
    expected = draft_tokens(hidden, weight)
    is_number = ~hidden.isnan().any(-1)
    assert torch.equal(expected[is_number], (hidden @ weight.t()).argmax(-1)[is_number])
    (first, split), (other, other_split) = gloo.run(drafts_on_slices, 2, hidden, weight)
    for found in (first, split):
        assert torch.equal(found[is_number], expected[is_number])
        assert 0 <= found[~is_number].item() < VOCABULARY
    assert torch.equal(first, other) and torch.equal(split, other_split)
