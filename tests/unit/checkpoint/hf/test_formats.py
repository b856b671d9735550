"""Each format's names, what it refuses, and the files around the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.folder import Entry, Folder, write_weights
from megatron_mtpd.checkpoint.hf.importing import import_hf
from megatron_mtpd.checkpoint.hf.stored import read_header
from megatron_mtpd.checkpoint.metadata import CheckpointError
from tests.unit.checkpoint.hf.models import hugging_face, toy_checkpoint, toy_shape, weights

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 4096,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy") / "ours", toy_shape(2))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_deepseek_has_a_fused_projection_and_no_copy_of_the_output_layer_in_each_head(
    checkpoint: Path, tmp_path: Path
) -> None:
    export_hf(checkpoint, tmp_path / "plain", "transformers")
    export_hf(checkpoint, tmp_path / "deepseek", "deepseek-v3")
    plain, deepseek = weights(tmp_path / "plain"), weights(tmp_path / "deepseek")
    for head in (2, 3):
        prefix = f"model.layers.{head}."
        qkv = torch.cat([plain[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
        assert torch.equal(deepseek[prefix + "self_attn.qkv_proj.weight"], qkv)
        assert not any(prefix + name in deepseek for name in ("shared_head.head.weight", "embed_tokens.weight"))
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "mlp.gate_proj", "input_layernorm"):
            assert torch.equal(deepseek[f"{prefix}{name}.weight"], plain[f"{prefix}{name}.weight"])
    found = config(tmp_path / "deepseek")
    assert found["architectures"] == ["DeepseekV3ForCausalLM"] and found["num_nextn_predict_layers"] == 2
    assert found["first_k_dense_replace"] == 4  # dense to the last head
    assert found["routed_scaling_factor"] == 1.0  # or vLLM would divide the dense layers' output in fp16


def test_deepseek_of_a_tied_model_gets_an_output_layer(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(1, tied=True))
    export_hf(tmp_path / "ours", tmp_path / "out", "deepseek-v3")
    found = weights(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


def test_mimo_has_swapped_halves_and_zero_biases(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "plain", num_heads=1)
    export_hf(checkpoint, tmp_path / "mimo", "mimo", num_heads=1)
    plain, mimo = weights(tmp_path / "plain"), weights(tmp_path / "mimo")
    embedding, hidden = plain["model.layers.2.eh_proj.weight"].chunk(2, 1)
    assert torch.equal(mimo["model.mtp_layers.0.input_proj.weight"], torch.cat([hidden, embedding], 1))
    assert torch.equal(mimo["model.mtp_layers.0.token_layernorm.weight"], plain["model.layers.2.enorm.weight"])
    assert mimo["model.mtp_layers.0.self_attn.k_proj.bias"].shape == (64,)
    assert not mimo["model.layers.0.self_attn.q_proj.bias"].any()
    assert config(tmp_path / "mimo")["architectures"] == ["MiMoForCausalLM"]


@pytest.mark.parametrize(
    ("format", "changes", "reason"),
    [
        ("deepseek-v3", {"qkv_bias": True}, "neither biases"),
        ("deepseek-v3", {"qk_norm": True}, "neither biases"),
        ("deepseek-v3", {"head_dim": 48}, "hidden size / heads wide"),
        ("deepseek-v3", {"rope_factor": 4}, "linearly scaled rotary positions"),
        ("deepseek-v3", {"num_heads": 0}, "has no heads"),
        ("mimo", {}, "it has one head"),
        ("mimo", {"num_heads": 1, "qk_norm": True}, "no norms of query and key"),
        ("mimo", {"num_heads": 1, "head_dim": 48}, "hidden size / heads wide"),
        ("mimo", {"num_heads": 0}, "has no heads"),
        ("transformers", {"num_heads": 0}, "has no heads"),
    ],
)
def test_what_an_engine_would_run_wrong_is_refused(
    format: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(**{"num_heads": 2} | changes))
    with pytest.raises(ValueError, match=rf"--format {format} cannot hold this model: .*{reason}"):
        export_hf(tmp_path / "ours", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_the_model_card_says_how_to_run_it_and_what_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    run = {"num_heads": 2, "num_drafts": 50, "acceptance_length": 1.9, "acceptance_rate": [0.6, 0.5]}
    measured = {
        "runs": [{"num_heads": 0, "num_drafts": 0}, run | {"cumulative_acceptance_rate": [0.6, 0.3]}],
        "num_prompts": 7,
        "teacher_forced": {"main_loss": 2.5},
        "settings": {"temperature": 0.0, "max_new_tokens": 32, "dtype": "float32", "draft_vocab_size": 8192},
        "provenance": {"date": "2026-01-02", "commit": "0123456789abcdef", "hardware": {"cpu": "a CPU"}},
    }
    (tmp_path / "acceptance.json").write_text(json.dumps(measured))
    export_hf(checkpoint, tmp_path / "out", "deepseek-v3", acceptance=tmp_path / "acceptance.json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "VLLM_MLA_DISABLE=1 VLLM_USE_V2_MODEL_RUNNER=1 vllm serve out" in card
    assert '"num_speculative_tokens": 2' in card
    assert "| 2 | 1.900 | 60.0 50.0 | 60.0 30.0 | 50 |" in card
    assert "greedy, drafts of the first 8,192 ids alone" in card
    assert "2.5000 nats" in card and "2026-01-02, commit 0123456789, a CPU" in card

    (tmp_path / "acceptance.json").write_text("{}")
    with pytest.raises(ValueError, match="--acceptance: it is not what"):
        export_hf(checkpoint, tmp_path / "other", acceptance=tmp_path / "acceptance.json")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "export with `--format deepseek-v3` or `--format mimo --num-heads 1` for them"),
        ({"num_heads": 1}, "export with `--format deepseek-v3` or `--format mimo` for them"),
        ({"qkv_bias": True}, "export with `--format mimo --num-heads 1` for them"),
        ({"qk_norm": True}, "no format of theirs can hold this model's"),
    ],
)
def test_the_model_card_names_formats_that_hold_the_model(changes: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(**{"num_heads": 2} | changes))
    export_hf(tmp_path / "ours", tmp_path / "out")
    assert f"do not find heads here: {remedy}." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "num_heads", "command"),
    [
        ("trunk", None, "transformers, vLLM, SGLang: as any LlamaForCausalLM"),
        ("transformers", None, "model.generate(**inputs, use_mtp=True, do_sample=False, max_new_tokens=64)"),
        ("deepseek-v3", 1, '"num_speculative_tokens": 1'),
        ("mimo", 1, "--speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2"),
    ],
)
def test_the_model_card_names_the_engine_and_its_settings(
    format: str, num_heads: int | None, command: str, checkpoint: Path, tmp_path: Path
) -> None:
    export_hf(checkpoint, tmp_path / "out", format, num_heads=num_heads)
    assert command in (tmp_path / "out" / "README.md").read_text()


def test_an_export_of_another_model_than_the_folders_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    with pytest.raises(ValueError, match=r"config\.json describes"):
        export_hf(checkpoint, tmp_path / "out", hf=tmp_path / "hf", vocab_size=96)
    hugging_face(tmp_path / "qwen", "qwen2", tied=False)
    with pytest.raises(ValueError, match=r"qwen2, cannot express the checkpoint's --add-qkv-bias"):
        export_hf(checkpoint, tmp_path / "out", hf=tmp_path / "qwen", vocab_size=96)


def test_nothing_good_is_replaced_without_force(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ValueError, match="--force"):
        export_hf(checkpoint, out)
    assert (out / "precious").exists()
    export_hf(checkpoint, out, force=True)
    assert not (out / "precious").exists() and (out / "config.json").exists()


def test_what_is_read_is_never_what_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    for source, save in (("hf", "hf"), ("hf", "."), ("hf", "hf/ours")):
        with pytest.raises(ValueError, match="one inside the other"):
            import_hf(tmp_path / source, tmp_path / save, force=True)
    with pytest.raises(ValueError, match="one inside the other"):
        export_hf(checkpoint, checkpoint, force=True)
    assert (tmp_path / "hf" / "config.json").exists() and (checkpoint / "release").exists()


def test_damaged_bytes_are_named(tmp_path: Path) -> None:
    root = toy_checkpoint(tmp_path / "ours", toy_shape(1))
    data = root / "release" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        export_hf(root, tmp_path / "out", full=True)
    data.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        export_hf(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "only llama, qwen2, qwen3, mistral"),
        ({"rope_parameters": LLAMA3}, "rope_parameters .*'original_max_position_embeddings': 4096"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"config\.json: transformers refuses it"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}}, "rope_theta 1234.5"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": 300}, "has 200 rows, config.json says 300"),
        ({"intermediate_size": 100}, r"config.json describes \[100, 64\]"),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3"),
    ],
)
def test_what_cannot_be_imported_is_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config(tmp_path / "hf") | changes))
    with pytest.raises(ValueError, match=reason):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_tensor_that_nothing_is_known_of_is_not_dropped(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "qwen2", tied=False)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config(tmp_path / "hf") | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no tensor model\.layers\.0\.self_attn\..*bias"):
        import_hf(tmp_path / "hf", tmp_path / "ours")


def test_a_sliding_window_is_full_attention_up_to_its_length(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "mistral", tied=False)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config(tmp_path / "hf") | {"sliding_window": 32}))
    with pytest.raises(ValueError, match="--max-position-embeddings 32"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    assert import_hf(tmp_path / "hf", tmp_path / "ours", max_positions=32).shape.max_positions == 32


def test_the_files_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(n + 1, 3).bfloat16() for n in range(5)}
    entries = [Entry(name, tuple(t.shape), lambda t=t: [t]) for name, t in tensors.items()]
    write_weights(tmp_path, entries, "bfloat16", lambda count: None, shard_size=40)
    (tmp_path / "config.json").write_text("{}")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder = Folder(tmp_path)
    assert folder.names.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        with safe_open(tmp_path / folder.names[name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), tensor)


def test_what_is_rounded_or_left_out_is_said(checkpoint: Path, tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    tensors = weights(tmp_path / "hf")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    (note,) = import_hf(tmp_path / "hf", tmp_path / "ours").notes
    assert note.startswith("7 tensors, model.layers.0.input_layernorm.weight first, are wider in the folder")
    assert not import_hf(tmp_path / "hf", tmp_path / "asked", dtype="bf16").notes
    assert not import_hf(tmp_path / "hf", tmp_path / "whole", dtype="fp32").notes
    assert "no tokenizer" in export_hf(checkpoint, tmp_path / "out").notes[0]
    assert not export_hf(tmp_path / "ours", tmp_path / "trunk", "trunk", hf=tmp_path / "hf").notes


def test_a_tensor_that_cannot_be_read_is_named_before_anything_is_written(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = weights(tmp_path / "hf")
    name = "model.layers.2.mlp.up_proj.weight"
    for dtype, reason in (
        (torch.float64, "is F64, and only"),
        (torch.float8_e4m3fn, r"is fp8, and config\.json has no quantization_config"),
    ):
        save_file(tensors | {name: tensors[name].to(dtype)}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            import_hf(tmp_path / "hf", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """The library refuses it too: such a tensor would be read with its neighbour's bytes."""
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"shape":[4]', b'"shape":[3]', 1))
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged or incomplete: . is float32 \[3\], and has 16 bytes"
    ):
        read_header(tmp_path / "model.safetensors")


def test_a_single_file_goes_before_an_index_that_was_left_behind(tmp_path: Path) -> None:
    """As in transformers, whose save_pretrained leaves an old index where it was."""
    save_file({"a": torch.zeros(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert Folder(tmp_path).names == {"a": "model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing"):
        _ = Folder(tmp_path).names
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="has no weight_map of names and files"):
        _ = Folder(tmp_path).names


def test_a_damaged_or_missing_file_is_named(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        import_hf(tmp_path / "hf", tmp_path / "ours")
