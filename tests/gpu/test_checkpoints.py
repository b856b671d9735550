"""What a run leaves is what the next command needs: resumed, extended by heads, exported, and decoded with.

In a dry run bf16 stands in for FP8, whose layers then have no state.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_mtpd import platform
from megatron_mtpd.checkpoint.common_state import read_payload
from megatron_mtpd.checkpoint.iterations import directory_of, resolve
from megatron_mtpd.checkpoint.metadata import read_metadata
from tests.gpu.machine import HAS_TE, ON_GPU
from tests.gpu.runs import EXPORTED, FEW, RESUMED_UNTIL, SAVED, shown

platform.setup()  # the states below name classes of Megatron's

pytestmark = pytest.mark.gpu

METRICS = ("lm loss", "cross_entropy/head_1", "cross_entropy/head_2")
# The first iterations after a resume see the same weights and scales: what differs is the order of some sums, in bf16.
LAST_BITS = 1e-3


def fp8_states(directory: Path) -> dict[str, torch.Tensor]:
    """The state of each layer that has one, by its key in the checkpoint: the bytes of a pickle."""
    contents = read_metadata(directory)
    found = {}
    for key, payload in contents.objects.items():
        if "._extra_state" in key:
            shards = torch.load(io.BytesIO(read_payload(directory, payload)), weights_only=True)
            if states := [state for state in shards if state is not None and state.numel()]:
                (found[key],) = states
    return found


def opened(state: torch.Tensor) -> dict[str, Any]:
    return pickle.loads(state.numpy().tobytes())  # our own run's


@pytest.mark.needs_te(capability=(8, 9), or_dry=True)
@pytest.mark.runs("FP8 delayed", "resumed")
def test_fp8_goes_on_where_it_stopped(runs, report):
    """Without its amax histories a run would quantise with a scale of 1, which is far off for weights and gradients."""
    whole, resumed = runs["FP8 delayed"], runs["resumed"]
    worst = {3: 0.0, RESUMED_UNTIL - SAVED: 0.0}
    for metric in METRICS:
        expected, found = whole.curve(metric)[SAVED:RESUMED_UNTIL], resumed.curve(metric)
        assert len(found) == len(expected) == RESUMED_UNTIL - SAVED
        off = [abs(x / y - 1) for x, y in zip(found, expected, strict=True)]
        worst = {length: max(worst[length], *off[:length]) for length in worst}
    off = ", ".join(f"{difference:.1e} in {length} iterations" for length, difference in worst.items())
    report(f"{shown('FP8 delayed')}, resumed: largest difference of a loss", f"{off} (bar {LAST_BITS} in 3)")
    assert worst[3] < LAST_BITS
    assert max(worst.values()) < 0.02


@pytest.mark.needs_te(capability=(8, 9))
@pytest.mark.runs("FP8 delayed")
def test_fp8_checkpoints_hold_scales_and_histories(runs, report):
    states = fp8_states(directory_of(runs["FP8 delayed"].checkpoints, SAVED))
    for part in ("decoder.layers.", "mtp.layers.0.", "mtp.layers.1."):
        assert any(key.startswith(part) for key in states), part
    for key, state in states.items():
        values = opened(state)
        for way in ("fwd", "bwd"):
            assert values[f"amax_history_{way}"].any(), (key, way)
            scales = values[f"scale_{way}"]
            assert scales.isfinite().all() and (scales > 0).all() and (scales != 1).any(), (key, way)
    report("FP8 delayed: layers whose scales and histories a checkpoint holds", len(states))


@pytest.mark.needs_te(capability=(8, 9), or_dry=True)
@pytest.mark.runs("FP8 delayed", "new heads")
def test_new_heads_start_as_their_source_and_learn(runs, report):
    source = fp8_states(resolve(runs["FP8 delayed"].checkpoints)[1])
    extended, trained = runs["new heads"]
    before, after = fp8_states(resolve(extended)[1]), fp8_states(resolve(trained.checkpoints)[1])
    assert bool(source) == HAS_TE
    for head in range(4):
        old, new = f"mtp.layers.{head % 2}.", f"mtp.layers.{head}."
        expected = {key.replace(old, new): state for key, state in source.items() if key.startswith(old)}
        assert expected.keys() == {key for key in before if key.startswith(new)}
        assert all(torch.equal(before[key], state) for key, state in expected.items())
        if HAS_TE and head > 1:
            assert any(not torch.equal(after[key], before[key]) for key in expected), "histories move on"
    main, first, last = (trained.curve(name) for name in ("lm loss", "cross_entropy/head_3", "cross_entropy/head_4"))
    assert len(main) == FEW
    report(
        f"{shown('FP8 delayed')}, heads 3 and 4: cross-entropy, first and last of {FEW} iterations",
        ", ".join(f"{curve[0]:.3f} to {curve[-1]:.3f}" for curve in (first, last)),
    )
    if ON_GPU:
        start, end = (runs["FP8 delayed"].curve()[place] for place in (0, -1))
        assert main[0] < (start + end) / 2, "the trunk is the trained one"
        assert first[-1] < first[0] and last[-1] < last[0]


@pytest.mark.needs_te(capability=(8, 9), or_dry=True)
@pytest.mark.parametrize("name", [pytest.param(f, marks=pytest.mark.runs(f"{f}, exported")) for f in EXPORTED])
def test_fp8_is_exported_as_bf16(runs, report, name):
    tensors = load_file(runs[f"{name}, exported"] / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())
    report(f"{shown(name)}: exported tensors, finite and bf16", len(tensors))


@pytest.mark.runs("bf16", "drafts")
def test_drafting_changes_no_token(runs, report):
    """In fp32, where sums in another order do not change which token is the likeliest."""
    found = runs["drafts"]
    assert found["complete"] and not found["failed_prompts"]
    plain, *drafting = found["runs"]
    assert plain["num_heads"] == 0 and [run["num_heads"] for run in drafting] == [1, 2]
    for run in drafting:
        a_step = (run["num_tokens"] - run["num_prompts"]) / run["num_steps"]  # the first token is the prompt's
        report(
            f"decoding with {run['num_heads']} heads: outputs equal to plain decoding, tokens a step",
            f"{run['outputs_equal_to_plain']}, {a_step:.2f}",
        )
        assert a_step > 1 or not ON_GPU, "drafts are accepted"
        assert run["outputs_equal_to_plain"] == f"{found['num_prompts']} of {found['num_prompts']}"
