"""Import, export, and what both sides compute in between."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.importing import import_hf
from megatron_mtpd.checkpoint.hf.torch_dist import read_tensor
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.metadata import read_metadata
from megatron_mtpd.speculative import loading
from tests.unit.checkpoint.hf.models import MODELS, Cascade, hugging_face, toy_checkpoint, toy_shape, weights

# fp32 logits of size 10, through three layers whose sums are taken in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-4}


def our_logits(root: Path, ids: list[int], vocabulary: int) -> list[torch.Tensor]:
    """Of the main model and the heads, [positions, vocabulary], by the training pass of the loaded model."""
    model = loading.load(root).model
    with torch.no_grad():
        if not model.config.mtp_num_layers:
            return [model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, :, :vocabulary]]
        main, heads, _ = model.hidden_states_of_all_heads(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        return [model.logits(hidden)[:, 0, :vocabulary] for hidden in (main, *heads)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit_and_computes_the_same(
    name: str, tied: bool, tmp_path: Path, one_process: None
) -> None:
    model = hugging_face(tmp_path / "hf", name, tied)
    import_hf(tmp_path / "hf", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", "trunk", hf=tmp_path / "hf")

    original, back = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[key], back[key]) for key in original)
    configs = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("hf", "back")]
    assert configs[1] == configs[0] | {"_name_or_path": str(tmp_path / "back")}

    ids = torch.randint(0, 200, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    (ours,) = our_logits(tmp_path / "ours", ids, 200)
    assert theirs.abs().max() > 1  # there is something to compare
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("init", ["last-layer", "random"])
@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama-3", False), ("qwen2", False), ("qwen3", False)])
def test_heads_compute_what_their_exported_tensors_say(
    name: str, tied: bool, init: str, tmp_path: Path, one_process: None
) -> None:
    hugging_face(tmp_path / "hf", name, tied)
    import_hf(tmp_path / "hf", tmp_path / "ours", num_heads=3, init=init)
    export_hf(tmp_path / "ours", tmp_path / "out")
    ids = torch.randint(0, 200, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ours, theirs = our_logits(tmp_path / "ours", ids, 200), Cascade(tmp_path / "out").logits(ids)
    assert len(ours) == len(theirs) == 4
    for head in range(4):
        torch.testing.assert_close(ours[head][: len(ids) - head], theirs[head], **CLOSE)
    with torch.no_grad():  # without the heads' code it is an ordinary model
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours[0], plain, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_mimos_head_computes_the_same_by_its_own_formula(name: str, tmp_path: Path, one_process: None) -> None:
    """Xiaomi's modeling_mimo: input_proj [hidden_layernorm(hidden), token_layernorm(embedding)], where SGLang's hidden
    state is behind the final norm; the main model is Qwen2, whose biases are zero where there were none."""
    hugging_face(tmp_path / "hf", name, tied=False)
    import_hf(tmp_path / "hf", tmp_path / "ours", num_heads=1, init="random")
    export_hf(tmp_path / "ours", tmp_path / "out", "mimo")
    ids = torch.randint(0, 200, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = our_logits(tmp_path / "ours", ids, 200)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        hidden = theirs.model(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(ours[0], theirs.lm_head(hidden), **CLOSE)
        math, head = Cascade(tmp_path / "out"), "model.mtp_layers.0."
        embedded = math.tensors["model.embed_tokens.weight"][torch.tensor(ids[1:])]
        both = [math.norm(head + "hidden_layernorm", hidden[:-1]), math.norm(head + "token_layernorm", embedded)]
        joined = torch.cat(both, -1) @ math.tensors[head + "input_proj.weight"].T
        logits = theirs.lm_head(math.norm(head + "final_layernorm", math.block(head, joined)))
    torch.testing.assert_close(ours[1][:-1], logits, **CLOSE)


def test_heads_come_back_too(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "ours", toy_shape(3))
    export_hf(tmp_path / "ours", tmp_path / "out")
    done = import_hf(tmp_path / "out", tmp_path / "again")
    assert done.shape == toy_shape(3)
    before, after = (read_metadata(resolve(tmp_path / name)[1]) for name in ("ours", "again"))
    assert before.tensors.keys() == after.tensors.keys()
    for key in before.tensors:
        a, b = read_tensor(before, key), read_tensor(after, key)
        real = 96 if a.shape[0] == 128 and ("embedding" in key or "output" in key) else None  # else padding
        assert torch.equal(a[:real], b[:real]), key


def test_a_checkpoint_that_was_imported_is_a_good_one(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False)
    import_hf(tmp_path / "hf", tmp_path / "ours", num_heads=2)
    _, directory = resolve(tmp_path / "ours")
    assert verify(directory, full=True) == []
    assert read_metadata(directory).num_heads == 2


def test_bf16_stays_bf16_and_can_be_asked_for(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False).bfloat16().save_pretrained(tmp_path / "hf16")
    import_hf(tmp_path / "hf16", tmp_path / "a")
    import_hf(tmp_path / "hf", tmp_path / "b", dtype="bf16")
    for name in "ab":
        export_hf(tmp_path / name, tmp_path / f"{name}-out", "trunk")
        out = weights(tmp_path / f"{name}-out")
        assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
        assert all(torch.equal(out[key], tensor) for key, tensor in weights(tmp_path / "hf16").items())


def test_sharded_folders_and_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    hugging_face(tmp_path / "hf", "llama", tied=False, max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    for name in ("tokenizer.json", "tokenizer_config.json", "tekken.json", "LICENSE"):
        (tmp_path / "hf" / name).write_text("{}")
    import_hf(tmp_path / "hf", tmp_path / "ours", num_heads=1)
    export_hf(tmp_path / "ours", tmp_path / "out", shard_size=100_000)
    out = tmp_path / "out"
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name in ("tokenizer.json", "tokenizer_config.json", "tekken.json", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.model.norm.weight, weights(tmp_path / "hf")["model.norm.weight"])
