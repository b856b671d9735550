"""`--use-rope-scaling`, which Megatron overlooks for hybrid models. What it computes: `test_round_trip`."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_mtpd.checkpoint.hf.arguments import arguments
from megatron_mtpd.model import MTPDModelConfig
from megatron_mtpd.speculative.loading import decoding_args
from tests.unit.checkpoint.hf.models import toy_shape


@pytest.fixture
def args(one_process: None) -> Namespace:
    return decoding_args(arguments(toy_shape(1, rope_scaling_factor=32.0), torch.float32, None), 1, 1)


def test_the_flag_reaches_the_model(args: Namespace) -> None:
    assert MTPDModelConfig.from_args(args).rope_scaling_factor == 32.0
    args.use_rope_scaling = False
    assert MTPDModelConfig.from_args(args).rope_scaling_factor is None


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("position_embedding_type", "none", "--position-embedding-type none"),
        ("rotary_seq_len_interpolation_factor", 4, "--rotary-seq-len-interpolation-factor 4"),
        ("multi_latent_attention", True, "--multi-latent-attention"),
    ],
)
def test_without_plain_rotary_positions_it_is_refused(
    name: str, value: Any, flag: str, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mtpd.model.hybrid_config_from_args", lambda args, model_config_cls: None)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"--use-rope-scaling .* {flag}"):
        MTPDModelConfig.from_args(args)
