"""FP8 without a GPU: which layers are chosen, which flags pass, and what stays in high precision.

Transformer Engine is only said to be there; no kernel runs. What runs on a GPU is in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.fp8_utils import is_first_last_bf16_layer, is_mxfp8_output_proj_active  # noqa: E402
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_spec  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_mtpd.model import MTPDModelConfig  # noqa: E402
from megatron_mtpd.specs import hybrid_stack_spec  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="says that a GPU is there where none is")

RECIPES = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


def config(**options) -> TransformerConfig:
    defaults = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "mtp_num_layers": 2,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "transformer_impl": "transformer_engine",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**defaults | options)


@pytest.fixture
def with_transformer_engine(monkeypatch):
    monkeypatch.setattr(platform, "uses_transformer_engine", lambda: True)
    monkeypatch.setattr(platform.torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_of_every_recipe_pass(with_transformer_engine, recipe):
    flags = f"--fp8-format {RECIPES[recipe]} --fp8-recipe {recipe} --fp8-param-gather --transformer-impl"
    platform.check_flags([*flags.split(), "transformer_engine"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_layers_are_those_of_transformer_engine(with_transformer_engine, recipe):
    fp8 = config(fp8=RECIPES[recipe], fp8_recipe=recipe)
    assert fp8.fp8_recipe == recipe
    assert hybrid_stack_spec(fp8) is transformer_engine_spec


def test_first_and_last_layers_in_bf16_are_those_of_the_main_model():
    """Heads have no number among the layers: Megatron runs them in FP8 whatever these flags say."""
    options = {"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    fp8 = config(fp8="hybrid", fp8_recipe="tensorwise", first_last_layers_bf16=True, **options)
    assert [is_first_last_bf16_layer(fp8, layer) for layer in (-1, 0, 1, 2, 3)] == [False, True, False, True, True]


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def test_output_layer_stays_in_high_precision(one_process):
    """It is Megatron's own linear layer in every recipe, and the loss reads its weight as it is."""
    fp8 = config(fp8="e4m3", fp8_recipe="mxfp8", transformer_impl="local")
    assert not is_mxfp8_output_proj_active(fp8)
    model_config = MTPDModelConfig(
        transformer=fp8,
        hybrid_layer_pattern="*-*-/*-/*-",
        vocab_size=64,
        seq_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model = model_config.get_builder_cls()(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert type(model.output_layer) is ColumnParallelLinear
    assert model.output_layer.weight.dtype == torch.bfloat16
