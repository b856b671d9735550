"""DeepSeek-V3 in and out: every bit, every logit of main model and heads, what is refused, and its training flags."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import add_megatron_arguments
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mtpd.checkpoint.hf import blocks
from megatron_mtpd.checkpoint.hf.arguments import shape_of
from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.importing import ARGS_FILE, import_hf
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.metadata import CheckpointError, read_metadata
from megatron_mtpd.model import MTPDModel, MTPDModelBuilder, MTPDModelConfig
from megatron_mtpd.speculative import loading
from tests.unit.checkpoint.hf.deepseek import SIZES, YARN, DeepseekCascade, deepseek
from tests.unit.checkpoint.hf.greedy import toy_prompts
from tests.unit.checkpoint.hf.models import weights

# fp32 logits of size 10, through five layers whose sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-4}
POSITIONS = 50  # far enough for YaRN's slowed channels to turn
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"rope_theta": 50000.0},
    "yarn": {"rope_scaling": YARN},  # the published model's
    "yarn, other scales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "factor": 8}},
    "any expert": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "n_shared_experts": 1},
    "experts everywhere": {"first_k_dense_replace": 0},
}


def training_model(root: Path) -> MTPDModel:
    """The model that training builds of a checkpoint's arguments, with its weights. Decoding has no such attention."""
    _, directory = resolve(root)
    state = dist_checkpointing.load_common_state_dict(str(directory))
    args = loading.decoding_args(state["args"], read_metadata(directory).num_heads, 1)
    config: MTPDModelConfig = MTPDModelConfig.from_args(args)
    model = MTPDModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    sharded = model.sharded_state_dict(prefix="", metadata=state["content_metadata"])
    stored = read_metadata(directory)
    there = {key.partition("/shard_")[0] for key in stored.objects} | stored.tensors.keys()
    assert {part.key for part in sharded.values()} | {"common_state"} == there | {"common_state"}
    model.load_state_dict(dist_checkpointing.load({"model": sharded}, str(directory))["model"], strict=False)
    return model.eval()


def our_logits(root: Path, ids: list[int]) -> list[torch.Tensor]:
    model = training_model(root)
    with torch.no_grad():
        main, heads, _ = model.hidden_states_of_all_heads(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        return [model.logits(hidden)[:, 0, : SIZES["vocab_size"]] for hidden in (main, *heads)]


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back_bit_for_bit_and_computes_the_same(
    name: str, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 5_000)  # so that most tensors are of several
    model = deepseek(tmp_path / "hf", **MODELS[name])
    assert import_hf(tmp_path / "hf", tmp_path / "ours").shape.num_heads == 2
    export_hf(tmp_path / "ours", tmp_path / "back", hf=tmp_path / "hf")

    original, back = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert original.keys() == back.keys()
    for key in original:
        assert original[key].dtype == back[key].dtype and torch.equal(original[key], back[key]), key
    configs = [AutoConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("hf", "back")]
    assert configs[0] == {name: configs[1][name] for name in configs[0]} | {"_name_or_path": str(tmp_path / "hf")}

    ids = torch.randint(0, 200, (POSITIONS,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    ours, reference = our_logits(tmp_path / "ours", ids), DeepseekCascade(tmp_path / "hf").logits(ids)
    assert theirs.abs().max() > 1 and len(ours) == len(reference) == 3
    torch.testing.assert_close(ours[0], theirs, **CLOSE)
    for head in range(3):
        torch.testing.assert_close(ours[head][: POSITIONS - head], reference[head], **CLOSE)


def test_without_its_own_heads_it_gets_new_ones(tmp_path: Path, one_process: None) -> None:
    deepseek(tmp_path / "hf", num_heads=0)
    for init in ("last-layer", "random"):
        import_hf(tmp_path / "hf", tmp_path / init, num_heads=2, init=init)
        export_hf(tmp_path / init, tmp_path / f"{init}-out", hf=tmp_path / "hf")
        ids = list(range(7, 27))
        reference = DeepseekCascade(tmp_path / f"{init}-out").logits(ids)
        for head, ours in enumerate(our_logits(tmp_path / init, ids)):
            torch.testing.assert_close(ours[: len(ids) - head], reference[head], **CLOSE)
    made = weights(tmp_path / "random-out")
    assert not made["model.layers.3.mlp.gate.e_score_correction_bias"].any()
    assert verify(resolve(tmp_path / "random")[1], full=True) == []
    # The folder of the main model alone says that it has no heads: unsaid, there would be one.
    export_hf(tmp_path / "random", tmp_path / "trunk", "trunk", hf=tmp_path / "hf")
    assert AutoConfig.from_pretrained(tmp_path / "trunk").num_mtp_layers == 0


def guessing(folder: Path) -> None:
    """Make the heads guess right now and then: a few tokens become frequent, for main model and heads alike."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name == "lm_head.weight" or name.endswith("shared_head.head.weight"):
                tensor[::100] *= 8.0
        save_file(tensors, file, {"format": "pt"})


def test_transformers_accepts_the_drafts_that_the_heads_mathematics_give(tmp_path: Path, matches: list[int]) -> None:
    deepseek(tmp_path / "hf", rope_scaling=YARN)
    guessing(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "out", hf=tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    cascade, seen, new = DeepseekCascade(tmp_path / "hf"), set(), 24
    for prompt in toy_prompts(8, 2):
        ids = torch.tensor([prompt])
        fixed = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
        fixed["attention_mask"] = torch.ones_like(ids)
        tokens = model.generate(ids, **fixed)
        matches.clear()
        assert torch.equal(model.generate(ids, use_mtp=True, **fixed), tokens)
        text = tokens[0].tolist()
        best = [logits.argmax(-1).tolist() for logits in cascade.logits(text)[1:]]
        last, expected = len(prompt), []  # the last token that is known when a step begins
        while last + 3 < len(text):
            right = [best[k][last - 1] == text[last + 1 + k] for k in range(2)]
            expected.append(2 if all(right) else int(right[0]))
            last += 1 + expected[-1]
        assert matches[1 : 1 + len(expected)] == expected
        seen |= set(expected)
    assert seen == {0, 1, 2}, "too few different numbers of accepted drafts to tell heads apart"


def test_without_the_folder_a_configuration_is_made(tmp_path: Path) -> None:
    deepseek(tmp_path / "hf", rope_scaling=YARN)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "out")
    here, there = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hf", "out"))
    unsaid = {"rope_parameters", "_name_or_path", "initializer_range", "bos_token_id", "eos_token_id"}
    assert {name: there[name] for name in here if name not in unsaid} == {
        name: value for name, value in here.items() if name not in unsaid
    }
    assert {**here["rope_parameters"], "type": None} == {**there["rope_parameters"], "type": None}


def test_weights_in_fp8_become_what_they_stand_for(tmp_path: Path) -> None:
    """One scale for each 16 by 16 weights; 24 rows and 96 columns are no multiples of it."""
    deepseek(tmp_path / "plain", num_heads=0)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    quantised, meant = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            quantised[name] = meant[name] = tensor if "bias" in name else tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        scale = torch.rand(-(-rows // 16), -(-columns // 16)) + 0.5
        quantised[name], quantised[name + "_scale_inv"] = tensor.to(torch.float8_e4m3fn), scale
        wide = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        meant[name] = (quantised[name].float() * wide).bfloat16()
    (tmp_path / "hf").mkdir()
    save_file(quantised, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))

    assert import_hf(tmp_path / "hf", tmp_path / "ours").shape.dtype == "bfloat16"
    export_hf(tmp_path / "ours", tmp_path / "out", "trunk", hf=tmp_path / "hf")
    back = weights(tmp_path / "out")
    assert back.keys() == meant.keys()
    assert all(torch.equal(back[name], meant[name]) and back[name].dtype == meant[name].dtype for name in meant)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())

    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    for changed, reason in (
        ({}, f"has no tensor {scale}"),
        ({scale: torch.ones(6, 3)}, r"is \[6, 3\], and .*needs \[6, 4\]"),
    ):
        broken = {name: tensor for name, tensor in quantised.items() if name != scale} | changed
        save_file(broken, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=reason):
            import_hf(tmp_path / "hf", tmp_path / "again")
        assert not (tmp_path / "again").exists()

    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantization_config .*gptq.* take the model's weights in bf16"):
        import_hf(tmp_path / "hf", tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_interleave": False}, "rope_interleave False"),
        ({"q_lora_rank": None}, "q_lora_rank None"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        ({"norm_topk_prob": False}, "norm_topk_prob False"),
        ({"topk_group": 1}, "topk_group 1"),  # Megatron would rate a group by its best four
        ({"n_shared_experts": 0}, "n_shared_experts 0"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace 3"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'linear'"),
        ({"rope_parameters": YARN | {"rope_type": "yarn", "beta_fast": 16, "rope_theta": 1e4}}, "'beta_fast': 16"),
        ({"rope_parameters": YARN | {"rope_type": "yarn", "mscale": 0, "rope_theta": 1e4}}, "'mscale': 0"),
    ],
)
def test_what_megatron_computes_differently_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    deepseek(tmp_path / "hf", num_heads=0)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"config.json has .*{reason}"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_heads_with_an_output_layer_of_their_own_are_refused(tmp_path: Path) -> None:
    deepseek(tmp_path / "hf")
    file = tmp_path / "hf" / "model-00002-of-00002.safetensors"
    heads = load_file(file)
    heads["model.layers.4.shared_head.head.weight"][199, 63] += 1.0
    save_file(heads, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.4\.shared_head\.head\.weight is not lm_head\.weight"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert import_hf(tmp_path / "hf", tmp_path / "ours", num_heads=0).shape.num_heads == 0


def test_other_formats_and_our_decoder_refuse_it_by_name(tmp_path: Path, one_process: None) -> None:
    deepseek(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ours")
    for form in ("deepseek-v3", "mimo"):
        with pytest.raises(ValueError, match=f"--format {form} is for dense models .*--format transformers"):
            export_hf(tmp_path / "ours", tmp_path / "out", form, hf=tmp_path / "hf")
    with pytest.raises(ValueError, match="--multi-latent-attention, which decoding does not support"):
        loading.load(tmp_path / "ours")


def test_a_checkpoint_of_other_experts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mtpd.checkpoint.hf import arguments

    deepseek(tmp_path / "hf", num_heads=1)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    shape = arguments.shape_of
    for name, value, flag in (
        ("moe_router_score_function", "softmax", "--moe-router-score-function softmax"),
        ("qk_layernorm", False, "--qk-layernorm False"),
        ("hybrid_layer_pattern", "+E+-+E/+E", "--hybrid-layer-pattern"),
        ("hybrid_layer_pattern", "+-+E+E/+-", "--hybrid-layer-pattern"),
    ):
        monkeypatch.setattr(
            "megatron_mtpd.checkpoint.hf.exporting.shape_of",
            lambda args, *rest, name=name, value=value: shape(args | {name: value}, *rest),
        )
        with pytest.raises(CheckpointError, match=flag):
            export_hf(tmp_path / "ours", tmp_path / "out", hf=tmp_path / "hf")


def test_the_flags_describe_the_model(tmp_path: Path) -> None:
    deepseek(tmp_path / "hf", num_heads=1, **MODELS["yarn, other scales"])
    shape = import_hf(tmp_path / "hf", tmp_path / "ours").shape
    lines = (tmp_path / "ours" / ARGS_FILE).read_text().splitlines()
    flags = [word for line in lines if not line.startswith("#") for word in line.split()]
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags)
    assert shape_of(vars(args), 1, "float32", "the flags") == shape
