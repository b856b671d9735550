"""Checkpoints of Megatron's own models with heads, trained without this package: extended, described, loaded again."""

import argparse
import inspect
import math

import pytest
import torch

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.inspection import describe
from megatron_mtpd.checkpoint.iterations import write_tracker
from megatron_mtpd.checkpoint.looping import make_plan

pytestmark = pytest.mark.usefixtures("one_rank", "model_parallel")

VOCABULARY, LENGTH, HIDDEN = 32, 8, 16


@pytest.fixture(scope="module")
def model_parallel(one_rank):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()


def config(heads, **more):
    from megatron.core.transformer import TransformerConfig

    shared = {"num_layers": 2, "mtp_num_layers": heads, "hidden_size": HIDDEN, "ffn_hidden_size": 32}
    shared |= {"num_attention_heads": 2, "normalization": "RMSNorm", "add_bias_linear": False}
    shared |= {"use_cpu_initialization": True, "gated_linear_unit": True, "transformer_impl": "local"}
    return TransformerConfig(**shared | more)


def gpt(heads):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    from megatron_mtpd.specs import SDPAttention, hybrid_stack_spec

    cfg = config(heads)
    hybrid_stack_spec(cfg)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SDPAttention  # Megatron's own makes masks on a GPU
    mtp = get_gpt_mtp_block_spec(cfg, spec, use_transformer_engine=False) if heads else None
    return GPTModel(cfg, spec, VOCABULARY, LENGTH, position_embedding_type="rope", mtp_block_spec=mtp)


def hybrid(heads, tied=True, **more):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

    from megatron_mtpd.specs import hybrid_stack_spec

    block = "*E" if more else "*-"
    cfg = config(heads, **more)
    cfg.num_layers = 4
    model_config = HybridModelConfig(
        transformer=cfg,
        hybrid_layer_pattern=block * 2 + ("/" + block) * heads,
        hybrid_stack_spec=hybrid_stack_spec(cfg),
        vocab_size=VOCABULARY,
        seq_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    return HybridModelBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_token_dispatcher_type": "alltoall",
}
MODELS = {"GPTModel": gpt, "HybridModel": hybrid, "HybridModel with experts": lambda heads: hybrid(heads, **EXPERTS)}


def save(model, root, heads, pattern):
    from megatron.core import dist_checkpointing

    arguments = argparse.Namespace(mtp_num_layers=heads, hybrid_layer_pattern=pattern, mtp_use_repeated_layer=False)
    (root / "iter_0000005").mkdir(parents=True)
    # A default of Megatron's training loop: the layers of a GPTModel are stored as one tensor.
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": False})
    # As it comes out of Megatron, without what our platform adds.
    inspect.unwrap(dist_checkpointing.save)(
        {"args": arguments, "iteration": 5, "checkpoint_version": 3.0, **state}, str(root / "iter_0000005")
    )
    write_tracker(root, 5)


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_megatrons_own_models(name, tmp_path):
    """Every weight that Megatron loads into the larger model is its source's; nothing is missing or left over."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    old = MODELS[name](2)
    save(old, tmp_path / "run", 2, getattr(old, "hybrid_layer_pattern", None))
    extend(make_plan(tmp_path / "run", 5), tmp_path / "out", verified=True)

    new = MODELS[name](5)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.fill_(math.nan)
    state = new.sharded_state_dict(metadata={"non_homogeneous_layers": False})
    names = list(state)
    loaded = dist_checkpointing.load(state, str(tmp_path / "out" / "release"), strict=StrictHandling.RAISE_ALL)
    new.load_state_dict({key: loaded[key] for key in names}, strict=False)  # without empty extra states
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    heads = [name for name in after if name.startswith("mtp.layers.")]
    assert len(heads) == 5 * sum(name.startswith("mtp.layers.0.") for name in before) > 0
    for key, value in after.items():
        source = key
        if key in heads:
            number, rest = key.removeprefix("mtp.layers.").split(".", 1)
            source = f"mtp.layers.{int(number) % 2}.{rest}"
        assert torch.equal(value, before[source]), key

    found = describe(tmp_path / "out")
    assert found["problems"] == []
    assert found["heads"] == 5
    assert found["parameters"]["total"] == sum(parameter.numel() for parameter in new.parameters())
    assert found["aliases"] == {3: 1, 4: 2, 5: 1}
    assert found["arguments"]["mtp_num_layers"] == 5
    assert found["arguments"]["mtpd_old_heads"] == 2
    if name != "GPTModel":
        block = "/*E" if "experts" in name else "/*-"
        assert found["layer_pattern"].endswith(block * 5)
