"""A GGUF file in: the model that it holds, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.importing import import_hf
from tests.unit.checkpoint.hf.models import SIZES, Cascade, hugging_face, weights

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, path: Path) -> None:
    """A Llama's folder as llama.cpp converts it: other names, and rotary channels in pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    heads, keys = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(50000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = ["<end>", "a", "b", "ab"]
    writer.add_token_list([*tokens, *(chr(0x100 + i) for i in range(SIZES["vocab_size"] - len(tokens)))])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (SIZES["vocab_size"] - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in weights(folder).items():
        for part, count in (("q_proj", heads), ("k_proj", keys)):
            if part in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        for theirs, short in NAMES.items():
            name = name.replace(theirs, short)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_is_the_model_that_was_put_into_it(tied: bool, tmp_path: Path) -> None:
    model = hugging_face(tmp_path / "hf", "llama", tied=tied)
    write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    shape = import_hf(tmp_path / "model.gguf", tmp_path / "ours", num_heads=1).shape
    assert (shape.tied, shape.rope_base, shape.dtype) == (tied, 50000, "float32")
    assert shape.norm_eps == pytest.approx(SIZES["rms_norm_eps"])
    export_hf(tmp_path / "ours", tmp_path / "out")
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "hf")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ids = list(range(7, 37))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Cascade(tmp_path / "out").logits(ids)[0], logits, rtol=0.0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<end>" and tokenizer("aba").input_ids == [3, 1]


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.gguf: no such file"):
        import_hf(tmp_path / "model.gguf", tmp_path / "ours")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"model\.gguf: transformers cannot read it"):
        import_hf(tmp_path / "model.gguf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
