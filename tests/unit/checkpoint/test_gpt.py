"""A checkpoint of Megatron's GPTModel, loaded into our model: its weights where they belong, fresh heads left alone."""

import logging
import math
from argparse import Namespace

import pytest

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402

from megatron_mtpd.checkpoint.gpt import LayerMaps, pairs_heads, retarget, trunk_pattern  # noqa: E402
from tests.unit.checkpoint.test_megatron_models import (  # noqa: E402
    LENGTH,
    VOCABULARY,
    gpt,
    hybrid,
    model_parallel,
    save,
)

__all__ = ["model_parallel"]
pytestmark = pytest.mark.usefixtures("one_rank", "model_parallel")


def empty(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    return model


def load(model, root, saved_heads):
    """As training does: the tensors that our model asks for, looked up under GPTModel's names."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": False})
    retarget(state, model.hybrid_layer_pattern, Namespace(mtp_num_layers=saved_heads))
    loaded = dist_checkpointing.load(state, str(root / "iter_0000005"), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict({key: value for key, value in loaded.items() if value is not None}, strict=False)


def loss(model):
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY
    positions = torch.arange(LENGTH).expand(2, -1)
    mask = torch.ones(2, LENGTH)
    model.eval()
    seen = []
    for layer in model.mtp.layers if getattr(model, "mtp", None) else []:
        layer.register_forward_hook(lambda _module, _input, output: seen.append(output[0]))
    main = model(tokens, positions, None, labels=tokens.roll(-1, 1), loss_mask=mask)
    return [main, *seen]


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_our_model_computes_what_theirs_did(heads, tmp_path):
    """Losses of the main head and hidden states of every head."""
    theirs = gpt(heads)
    save(theirs, tmp_path / "run", heads, None)
    ours = empty(hybrid(heads, tied=False))
    load(ours, tmp_path / "run", heads)
    for found, expected in zip(loss(ours), loss(theirs), strict=True):
        assert torch.equal(found, expected)


def test_heads_that_the_checkpoint_has_not_stay_as_they_were(tmp_path, caplog):
    save(gpt(1), tmp_path / "run", 1, None)
    ours = hybrid(3, tied=False)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    with caplog.at_level(logging.WARNING):
        load(ours, tmp_path / "run", 1)
    assert "The checkpoint has 1 heads: heads 2, 3 start from scratch." in caplog.text
    kept = {name for name, parameter in ours.named_parameters() if torch.equal(parameter, before[name])}
    random = {name for name in before if not name.endswith("norm.weight")}  # norms begin as ones in both
    assert kept & random == {name for name in random if name.startswith(("mtp.layers.1.", "mtp.layers.2."))}


def test_megatrons_own_question_is_asked_of_the_trunk():
    asked = []

    def original(args, ckpt_args, model):
        from megatron.core.dist_checkpointing.gpt_checkpoint_interop import gpt_compatible_layer_maps

        asked.append(args.hybrid_layer_pattern)
        return gpt_compatible_layer_maps(args.hybrid_layer_pattern), True

    args = Namespace(hybrid_layer_pattern="*-|*-/*-/*-")
    maps, optimizer = pairs_heads(original)(args, Namespace(mtp_num_layers=None), [])
    assert asked == ["*-|*-"]
    assert args.hybrid_layer_pattern == "*-|*-/*-/*-"
    assert isinstance(maps, LayerMaps)
    assert (maps.num_gpt_layers, maps.num_heads, optimizer) == (2, 0, True)
    same = pairs_heads(lambda *_: (None, False))
    assert same(args, Namespace(), []) == (None, False)  # a checkpoint of a HybridModel


def test_a_trunk_without_counterpart_is_refused():
    with pytest.raises(ValueError, match="mixes dense"):
        retarget({}, "*-*E/*E", Namespace(mtp_num_layers=1))
    assert trunk_pattern("*-/*-") == "*-"
    assert trunk_pattern(None) is None
