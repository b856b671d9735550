"""Resuming, extending and resharding, in any order, give the weights that bookkeeping says."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from tests.unit.checkpoint.runs import Model, load_weights, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")

RESHARD = st.sampled_from([1, 2, 4]).map(lambda tp: ("reshard", tp))
EXTEND = st.integers(1, 5).map(lambda heads: ("extend", heads))
PATTERN = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(lambda pattern: ("pattern", pattern))
OPTIONS = st.tuples(st.sampled_from(["link", "copy", "materialize"]), st.booleans())


@settings(max_examples=15, deadline=None)  # a step takes some 20 ms
@given(st.lists(st.tuples(RESHARD | EXTEND | PATTERN, OPTIONS), min_size=1, max_size=4))
def test_any_sequence_gives_the_same_weights(steps):
    torch.manual_seed(0)
    model = Model(heads=2)
    with tempfile.TemporaryDirectory() as where:
        root = Path(where) / "0"
        save_checkpoint(root, model)
        optimizer = True
        for number, ((kind, value), (mode, keep)) in enumerate(steps, 1):
            directory, target = resolve(root)[1], Path(where) / str(number)
            if kind == "reshard":  # load at one size and save: a resumed run, as far as its checkpoint goes
                model = Model(model.heads, tensors=load_weights(directory, model, tp=value))
                save_checkpoint(target, model, tp=value)
                optimizer = True
            else:
                pattern = [(head - 1) % model.heads + 1 for head in value] if kind == "pattern" else None
                heads = value if kind == "extend" else None
                keep = keep and optimizer
                extend(make_plan(root, heads, pattern, keep_optimizer=keep), target, mode)
                optimizer = keep
                sources = [head - 1 for head in pattern] if pattern else [k % model.heads for k in range(value)]
                tensors = {key: tensor for key, tensor in model.tensors.items() if not key.startswith("mtp.")}
                for head, source in enumerate(sources):
                    tensors |= {f"mtp.layers.{head}.{name}": tensor for name, tensor in model.head(source).items()}
                model = Model(len(sources), tensors=tensors)
            root = target
        directory = resolve(root)[1]
        assert verify(directory) == []
        loaded = load_weights(directory, model, tp=1)
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.tensors.items())
