import inspect
import math
from dataclasses import fields, is_dataclass
from functools import partial

import pytest
import torch

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs  # noqa: E402
from megatron.core.models.hybrid.hybrid_model import HybridModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import MLATransformerConfig, TransformerConfig  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402

from megatron_mtpd.specs import LatentAttention, SDPAttention, hybrid_stack_spec, local_norm  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the local modules are tested on the CPU")

VOCABULARY, SEQUENCE, BATCH = 64, 12, 2
LAYERS = "attention_layer", "mla_layer", "mlp_layer", "moe_layer"


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Process groups of one rank, which is what Megatron's modules want."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def config(**options) -> TransformerConfig:
    defaults = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "mtp_num_layers": 2,
    }
    return TransformerConfig(**defaults | options)


def model(pattern: str = "*-*-/*-/*-", **options) -> HybridModel:
    transformer = config(**options)
    spec = hybrid_stack_spec(transformer)
    return HybridModel(transformer, spec, VOCABULARY, SEQUENCE, pattern, position_embedding_type="rope")


# --- attention ---------------------------------------------------------------------------------------------------


def attention(cls=SDPAttention, **options):
    return cls(config(**options), layer_number=3, attn_mask_type=AttnMaskType.causal, attention_type="self")


def inputs(groups: int = 4, queries: int = SEQUENCE, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, BATCH, 4, 8), (SEQUENCE, BATCH, groups, 8), (SEQUENCE, BATCH, groups, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def causal(queries: int = SEQUENCE) -> torch.Tensor:
    return torch.ones(1, 1, queries, SEQUENCE, dtype=torch.bool).triu(SEQUENCE - queries + 1)


def documents() -> torch.Tensor:
    """Masks [b, 1, s, s] of samples whose documents begin at other places, True where nothing may be seen."""
    begins = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    begins[0, 5] = begins[1, 2] = begins[1, 9] = 1
    of = begins.cumsum(1)
    return causal() | (of[:, None, :, None] != of[:, None, None, :])


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", [None, documents()], ids=["causal", "documents"])
@pytest.mark.parametrize("scaling", [False, True])
def test_attention_is_megatrons(groups, mask, scaling):
    options = {"num_query_groups": groups, "apply_query_key_layer_scaling": scaling}
    ours, theirs = inputs(groups), inputs(groups)
    out = attention(**options)(*ours, mask)
    expected = attention(DotProductAttention, **options)(*theirs, causal() if mask is None else mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    # Sums of at most 12 fp32 terms of size 1 in another order: a few ulps (1.2e-7) of the result, and of each gradient,
    # which sums over the 12 positions and up to 4 heads of a group once more.
    assert out.shape == (SEQUENCE, BATCH, 32)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_softmax_scale_is_honoured():
    scaled = SDPAttention(config(), 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    query, key, value = inputs()
    factor = 0.3 * math.sqrt(8)
    torch.testing.assert_close(scaled(query, key, value, None), attention()(query * factor, key, value, None))


@pytest.mark.parametrize("queries", [1, 5])
def test_late_queries_see_all_keys_before_them(queries):
    """As with a cache of keys and values: the last query stands at the last key."""
    query, key, value = inputs()
    whole = attention()(query, key, value, None)
    torch.testing.assert_close(attention()(query[-queries:], key, value, None), whole[-queries:])


def test_no_mask_sees_everything():
    query, key, value = inputs()
    nothing_hidden = torch.zeros(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
    out = attention()(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(out, attention()(query, key, value, nothing_hidden))


def test_dropout_in_training_alone_and_from_the_forked_stream():
    module, tensors = attention(attention_dropout=0.5), inputs()
    without = attention()(*tensors, None)
    before = torch.get_rng_state()
    first, second = module(*tensors, None), module(*tensors, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(*tensors, None), without)


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--softmax-type off-by-one", {"softmax_type": "off-by-one"}),
        (r"--window-size \(4, 0\)", {"window_size": (4, 0)}),
    ],
)
def test_attention_refuses_by_name(flag, options):
    with pytest.raises(ValueError, match=rf"{flag} needs Transformer Engine"):
        attention(**options)


def test_packed_sequences_are_refused():
    with pytest.raises(ValueError, match=r"Packed sequences .* need Transformer Engine"):
        attention()(*inputs(), None, packed_seq_params=PackedSeqParams())


def test_attention_takes_what_megatrons_takes():
    """Megatron's SelfAttention passes all of these by name."""
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(SDPAttention, method)).parameters
        assert list(ours) == list(inspect.signature(getattr(DotProductAttention, method)).parameters)


# --- norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm(name, cls, sequence_parallel):
    options = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
    made = local_norm(config=config(normalization=name, sequence_parallel=sequence_parallel, **options), hidden_size=8)
    assert type(made) is cls and made.eps == 1e-5
    assert [vars(p)["sequence_parallel"] for p in made.parameters()] == [sequence_parallel] * len(
        list(made.parameters())
    )


def test_norms_that_torch_lacks_are_refused():
    with pytest.raises(ValueError, match="--normalization is L2Norm: choose one of RMSNorm, LayerNorm"):
        local_norm(config(normalization="L2Norm"), 8)
    with pytest.raises(ValueError, match="--apply-layernorm-1p needs Transformer Engine"):
        local_norm(config(layernorm_zero_centered_gamma=True), 8)


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [None, 4])
def test_model_learns_with_heads(experts):
    options = {"num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 16} if experts else {}
    hybrid = model("*E*-/*E/*E" if experts else "*-*-/*-/*-", **options)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(BATCH, SEQUENCE)
    loss = hybrid(tokens, positions, None, labels=tokens, loss_mask=mask).mean()
    loss.backward()
    assert abs(loss.item() - math.log(VOCABULARY)) < 0.5  # small weights: nearly uniform
    without = [name for name, parameter in hybrid.named_parameters() if parameter.grad is None]
    assert all(".experts." in name for name in without), without  # an expert that no token chose


def latent(**options) -> HybridModel:
    """DeepSeek-V3 in small: multi-latent attention, a dense block before the experts, two heads with experts."""
    defaults = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "qk_layernorm": True,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "mtp_num_layers": 2,
    }
    transformer = MLATransformerConfig(**defaults | options)
    spec = hybrid_stack_spec(transformer)
    return HybridModel(transformer, spec, VOCABULARY, SEQUENCE, "+-+E/+E/+E", position_embedding_type="rope")


def test_latent_attention_learns_with_heads():
    hybrid = latent()
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    hybrid(tokens, positions, None, labels=tokens, loss_mask=torch.ones(BATCH, SEQUENCE)).mean().backward()
    without = [name for name, parameter in hybrid.named_parameters() if parameter.grad is None]
    assert all(".experts." in name for name in without), without  # an expert that no token chose


def test_latent_attention_has_the_checkpoint_keys_of_transformer_engine():
    """It fuses the norms of the bottlenecks with the projections behind them, and leaves the block's own apart."""
    made = keys(latent())
    for prefix in ("decoder.layers.2.", "mtp.layers.1.mtp_model_layer.layers.0."):
        found = {key.removeprefix(prefix) for key in made if key.startswith(prefix)}
        linear = "self_attention.linear_"
        assert found == {
            "input_layernorm.weight",
            *(f"{linear}{name}.weight" for name in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")),
            *(f"{linear}{name}_up_proj.layer_norm_weight" for name in ("q", "kv")),
        }


def test_latent_attention_is_refused_under_context_parallelism():
    made = config(context_parallel_size=2)
    with pytest.raises(ValueError, match="--context-parallel-size 2 with --multi-latent-attention needs Transformer"):
        LatentAttention(made, 1, AttnMaskType.causal, "self", k_channels=12, v_channels=6)


DENSE_KEYS = {
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_norm.weight",
    *(
        f"{block}.{key}"
        for layer in range(2)
        for block, key in (
            (f"decoder.layers.{2 * layer}", "self_attention.linear_qkv.layer_norm_weight"),
            (f"decoder.layers.{2 * layer}", "self_attention.linear_qkv.weight"),
            (f"decoder.layers.{2 * layer}", "self_attention.linear_proj.weight"),
            (f"decoder.layers.{2 * layer + 1}", "mlp.linear_fc1.layer_norm_weight"),
            (f"decoder.layers.{2 * layer + 1}", "mlp.linear_fc1.weight"),
            (f"decoder.layers.{2 * layer + 1}", "mlp.linear_fc2.weight"),
        )
    ),
    *(
        f"mtp.layers.{head}.{key}"
        for head in range(2)
        for key in (
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "final_layernorm.weight",
            "mtp_model_layer.layers.0.self_attention.linear_qkv.layer_norm_weight",
            "mtp_model_layer.layers.0.self_attention.linear_qkv.weight",
            "mtp_model_layer.layers.0.self_attention.linear_proj.weight",
            "mtp_model_layer.layers.1.mlp.linear_fc1.layer_norm_weight",
            "mtp_model_layer.layers.1.mlp.linear_fc1.weight",
            "mtp_model_layer.layers.1.mlp.linear_fc2.weight",
        )
    ),
}


def keys(hybrid: HybridModel) -> set[str]:
    return {part.key for part in hybrid.sharded_state_dict().values() if "_extra_state" not in part.key}


def test_checkpoint_keys_are_transformer_engines():
    """Its fused modules hold the norm of their input: `linear_qkv.layer_norm_weight`, not `input_layernorm.weight`."""
    assert keys(model()) == DENSE_KEYS


def test_checkpoint_keys_of_layer_norm_and_experts():
    made = keys(model("*E*-/*E/*E", num_moe_experts=4, moe_router_topk=2, normalization="LayerNorm", qk_layernorm=True))
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.self_attention.k_layernorm.bias",
        "decoder.layers.1.pre_mlp_layernorm.weight",  # Transformer Engine leaves this one apart
        "decoder.layers.3.mlp.linear_fc1.layer_norm_bias",
    } <= made
    assert not [key for key in made if "input_layernorm" in key]


@pytest.mark.parametrize(("symbol", "name"), [("M", "Mamba"), ("G", "gated delta net"), ("D", "sparse attention")])
def test_other_layers_are_refused_by_symbol(symbol, name):
    with pytest.raises(ValueError, match="needs Transformer Engine: install") as refusal:
        model(f"{symbol}-", mtp_num_layers=None)
    assert f"--hybrid-layer-pattern holds '{symbol}' ({name}" in str(refusal.value)


def test_transformer_engines_spec_where_it_runs(monkeypatch):
    last_norm = hybrid_block.TENorm
    monkeypatch.setattr(platform, "uses_transformer_engine", lambda: True)
    theirs = hybrid_layer_specs.hybrid_stack_spec
    assert hybrid_stack_spec(config(transformer_impl="transformer_engine")) is theirs
    assert hybrid_block.TENorm is last_norm
    assert hybrid_stack_spec(config(transformer_impl="local")) is not theirs


def norm_keys(layer: ModuleSpec) -> set[str]:
    """The checkpoint keys of a layer's norms, those apart and those fused with the linear layer behind them."""
    found: set[str] = set()

    def visit(submodules, prefix=""):
        for field in fields(submodules):
            part, name = getattr(submodules, field.name), prefix + field.name
            inner = part.keywords.get("submodules") if isinstance(part, partial) else getattr(part, "submodules", None)
            if is_dataclass(inner) and not isinstance(inner, type):
                visit(inner, f"{name}.")
            elif part is hybrid_layer_specs.TELayerNormColumnParallelLinear:
                found.add(f"{name}.layer_norm_weight")
            elif part in (hybrid_layer_specs.TENorm, local_norm):
                found.add(f"{name}.weight")

    visit(layer.submodules)
    moved = getattr(layer.submodules, "sharded_state_dict_keys_map", {}).items()
    return {next((new + key.removeprefix(old) for old, new in moved if key.startswith(old)), key) for key in found}


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_both_specs_have_the_same_norms_under_the_same_keys(monkeypatch, qk_layernorm):
    monkeypatch.setattr(platform, "uses_transformer_engine", lambda: True)
    theirs, ours = (
        hybrid_stack_spec(config(transformer_impl=kind, qk_layernorm=qk_layernorm)).submodules
        for kind in ("transformer_engine", "local")
    )
    expected = {layer: norm_keys(getattr(theirs, layer)) for layer in LAYERS}
    if qk_layernorm:
        # Where the spec has no such norm Megatron's attentions take their own: apart, or fused with the up-projections.
        expected["attention_layer"] |= {f"self_attention.{x}_layernorm.weight" for x in "qk"}
        fused = resolved(theirs.mla_layer, "transformer_engine", qk_layernorm)
        assert fused == {f"linear_{x}_up_proj.layer_norm_weight" for x in ("q", "kv")}
        expected["mla_layer"] |= {f"self_attention.{key}" for key in fused}
    assert {layer: norm_keys(getattr(ours, layer)) for layer in LAYERS} == expected
    assert len(expected["mlp_layer"]) == len(expected["moe_layer"]) == 1
    for spec in (theirs, ours):
        (head,) = spec.mtp_block_spec.submodules.layer_specs
        assert norm_keys(head) == {"enorm.weight", "hnorm.weight", "layer_norm.weight"}


def resolved(layer: ModuleSpec, kind: str, qk_layernorm: bool) -> set[str]:
    """The projections of multi-latent attention that Megatron replaces by ones with a norm, as checkpoint keys."""
    options = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8}
    made = MLATransformerConfig(**options, transformer_impl=kind, qk_layernorm=qk_layernorm, normalization="RMSNorm")
    found = QKNormConfigResolver(made, layer.submodules.self_attention.submodules).resolve()
    fused = hybrid_layer_specs.TELayerNormColumnParallelLinear
    return {f"{name}.layer_norm_weight" for name, module in found.items() if module is fused}


def test_local_spec_ends_in_a_local_norm():
    assert isinstance(model().decoder.final_norm, torch.nn.RMSNorm)
