"""FP8 without a GPU: which layers are chosen, which flags pass, and what stays in high precision.

Transformer Engine is only said to be there; no kernel runs. What runs on a GPU is in tests/gpu.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.fp8_utils import is_first_last_bf16_layer, is_mxfp8_output_proj_active  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as transformer_engine_spec  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import TransformerConfig, multi_token_prediction  # noqa: E402

from megatron_mtpd import model as model_module  # noqa: E402
from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.losses.eager import mtpd_loss  # noqa: E402
from megatron_mtpd.losses.fused import fused_mtpd_loss  # noqa: E402
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
    monkeypatch.setattr(platform.torch.cuda, "get_device_capability", lambda *device: (9, 0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_hopper_gpu_has_every_recipe_but_mxfp8(with_transformer_engine, recipe):
    flags = f"--fp8-format {RECIPES[recipe]} --fp8-recipe {recipe} --fp8-param-gather --transformer-impl"
    with pytest.raises(ValueError, match="mxfp8") if recipe == "mxfp8" else nullcontext():
        platform.check_flags([*flags.split(), "transformer_engine"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_local_layers_are_refused_in_fp8_and_never_taken(with_transformer_engine, recipe, monkeypatch):
    fp8 = config(fp8=RECIPES[recipe], fp8_recipe=recipe)
    assert hybrid_stack_spec(fp8) is transformer_engine_spec
    monkeypatch.setattr(platform, "uses_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=f"--fp8-format {RECIPES[recipe]} needs a GPU and Transformer Engine"):
        platform.check_flags(["--fp8-format", RECIPES[recipe], "--fp8-recipe", recipe])


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


def built(transformer: TransformerConfig, **options):
    model_config = MTPDModelConfig(
        transformer=transformer,
        hybrid_layer_pattern="*-*-/*-/*-",
        vocab_size=64,
        seq_length=8,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        **options,
    )
    return model_config.get_builder_cls()(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def test_output_layer_stays_in_high_precision(one_process):
    """It is Megatron's own linear layer in every recipe, and the loss reads its weight as it is."""
    fp8 = config(fp8="e4m3", fp8_recipe="mxfp8", transformer_impl="local")
    assert not is_mxfp8_output_proj_active(fp8)
    model = built(fp8)
    assert type(model.output_layer) is ColumnParallelLinear
    assert model.output_layer.weight.dtype == torch.bfloat16


class Autocast:
    """In the place of Transformer Engine's: a region in which its linear layers would run in FP8."""

    depth = 0

    def __enter__(self):
        Autocast.depth += 1

    def __exit__(self, *error):
        Autocast.depth -= 1


def get_fp8_context(config, layer_no=-1, is_init=False):
    """As Megatron's with Transformer Engine."""
    return nullcontext() if is_init or is_first_last_bf16_layer(config, layer_no) else Autocast()


@pytest.mark.parametrize("loss", ["fused", "eager"])
@pytest.mark.parametrize("recipe", [*RECIPES, "first and last in bf16"])
def test_what_runs_in_fp8(one_process, monkeypatch, recipe, loss):
    """Every linear layer of trunk and heads, but those that are asked for in bf16; not the output layer or the loss."""
    for module in (hybrid_block, multi_token_prediction):
        monkeypatch.setattr(module, "get_fp8_context", get_fp8_context)
    options = {"fp8": RECIPES.get(recipe, "hybrid"), "fp8_recipe": recipe, "transformer_impl": "local"}
    options |= {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if recipe not in RECIPES:
        options |= {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True}
        options |= {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1}
    model = built(config(**options), mtpd=MTPDConfig(loss=loss, top_n=10))
    in_fp8: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.register_forward_pre_hook(lambda *_, name=name: in_fp8.update({name: Autocast.depth > 0}))
    of_loss = []
    monkeypatch.setattr(model_module, f"{'fused_' * (loss == 'fused')}mtpd_loss", spied(of_loss, loss))
    tokens = torch.arange(16).view(2, 8)
    mask = torch.ones(2, 8)
    model(tokens, torch.arange(8).expand(2, -1), None, labels=tokens, loss_mask=mask)
    assert of_loss == [False]
    assert not in_fp8.pop("output_layer", False)
    kept = {name for name, is_fp8 in in_fp8.items() if not is_fp8}
    assert sum(name.startswith("mtp.") for name in in_fp8) == 2 * 5, "two heads: projection, two and two"
    if recipe in RECIPES:
        assert not kept
    else:
        assert {name.split(".")[2] for name in kept} == {"0", "1", "3"}, "layers of the pattern, from 0"
        assert all(name.startswith("decoder.") for name in kept), "the heads are in FP8 all the same"


def spied(calls: list[bool], loss: str):
    original = fused_mtpd_loss if loss == "fused" else mtpd_loss

    def spy(*args, **kwargs):
        calls.append(Autocast.depth > 0)
        return original(*args, **kwargs)

    return spy
