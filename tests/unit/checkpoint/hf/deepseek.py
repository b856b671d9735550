"""A small DeepSeek-V3 with heads, as a folder of Hugging Face; and what the heads compute, in plain PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.unit.checkpoint.hf.models import weights

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "vocab_size": 200,  # no multiple of 128: our embedding is padded
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough for the layers to matter in the logits
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def deepseek(folder: Path, num_heads: int = 2, **options: Any) -> DeepseekV3ForCausalLM:
    """Save one with random weights, biases of the routers and norms included. Its heads are in a file of their own."""
    torch.manual_seed(1)
    config = DeepseekV3Config(**SIZES | {"num_nextn_predict_layers": num_heads} | options)
    model = DeepseekV3ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or (tensor.dim() == 1 and "inv_freq" not in name):
                tensor += torch.randn(tensor.shape) * 0.2
    model.save_pretrained(folder)
    if num_heads:
        _add_heads(folder, config.num_hidden_layers, num_heads)
    return model.eval()


def _add_heads(folder: Path, layers: int, num_heads: int) -> None:
    """Heads like the last layer in another mood."""
    main = weights(folder)
    heads, last = {}, f"model.layers.{layers - 1}."
    for head in range(num_heads):
        prefix = f"model.layers.{layers + head}."
        for name, tensor in main.items():
            if name.startswith(last):
                heads[prefix + name.removeprefix(last)] = tensor + torch.randn(tensor.shape) * 0.1
        hidden = main["model.norm.weight"].numel()
        for name in ("enorm", "hnorm", "shared_head.norm"):
            heads[f"{prefix}{name}.weight"] = torch.rand(hidden) + 0.5
        heads[prefix + "eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.2
        heads[prefix + "embed_tokens.weight"] = main["model.embed_tokens.weight"].clone()
        heads[prefix + "shared_head.head.weight"] = main["lm_head.weight"].clone()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file(heads, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    files = dict.fromkeys(main, "model-00001-of-00002.safetensors")
    files |= dict.fromkeys(heads, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


class DeepseekCascade:
    """Main model and heads from the tensors of a folder alone, everything in fp32; after the report of DeepSeek-V3."""

    def __init__(self, folder: Path) -> None:
        self.tensors = weights(folder)
        self.c = json.loads((folder / "config.json").read_text())
        rope = self.c.get("rope_parameters") or {}
        rope = rope | (self.c.get("rope_scaling") or {})
        size = self.c["qk_rope_head_dim"]
        self.frequencies = rope.get("rope_theta", self.c.get("rope_theta", 10000.0)) ** -(
            torch.arange(0, size, 2) / size
        )
        self.amplitude, self.scale = 1.0, (self.c["qk_nope_head_dim"] + size) ** -0.5
        if "yarn" in (rope.get("type"), rope.get("rope_type")):
            factor, base, span = rope["factor"], 10000.0, rope["original_max_position_embeddings"]

            def channel(rotations: float) -> float:
                return size * math.log(span / (rotations * 2 * math.pi)) / (2 * math.log(base))

            low, high = max(math.floor(channel(32)), 0), min(math.ceil(channel(1)), size - 1)
            slow = ((torch.arange(size // 2) - low) / (high - low)).clamp(0, 1)
            self.frequencies = self.frequencies * (1 - slow) + self.frequencies / factor * slow

            def magnitude(scale: float) -> float:
                return 0.1 * scale * math.log(factor) + 1

            self.amplitude = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
            self.scale *= magnitude(rope["mscale_all_dim"]) ** 2

    def logits(self, ids: list[int]) -> list[Tensor]:
        """Of the main model and of every head, [positions, vocabulary]; head k has k positions less."""
        embedded = self.tensors["model.embed_tokens.weight"][torch.tensor(ids)]
        hidden, layers = embedded, self.c["num_hidden_layers"]
        for layer in range(layers):
            hidden = self.block(f"model.layers.{layer}.", hidden, layer < self.c["first_k_dense_replace"])
        states = [self.norm("model.norm", hidden)]
        for head in range(self.c["num_nextn_predict_layers"]):
            prefix = f"model.layers.{layers + head}."
            own = self.tensors[prefix + "embed_tokens.weight"][torch.tensor(ids)]
            before = states[-1][: len(ids) - head - 1]
            both = [self.norm(prefix + "enorm", own[head + 1 :]), self.norm(prefix + "hnorm", before)]
            joined = linear(torch.cat(both, -1), self.tensors[prefix + "eh_proj.weight"])
            states.append(self.norm(prefix + "shared_head.norm", self.block(prefix, joined, False)))
        outputs = [self.tensors["lm_head.weight"]]
        outputs += [self.tensors[f"model.layers.{layers + h}.shared_head.head.weight"] for h in range(len(states) - 1)]
        return [linear(state, output) for state, output in zip(states, outputs, strict=True)]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.tensors[name + ".weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.tensors[name + ".weight"])

    def block(self, prefix: str, x: Tensor, dense: bool) -> Tensor:
        x = x + self.attention(prefix + "self_attn.", self.norm(prefix + "input_layernorm", x))
        inner = self.norm(prefix + "post_attention_layernorm", x)
        return x + (self.mlp if dense else self.experts)(prefix + "mlp.", inner)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        return self.linear(
            prefix + "down_proj", silu(self.linear(prefix + "gate_proj", x)) * self.linear(prefix + "up_proj", x)
        )

    def experts(self, prefix: str, x: Tensor) -> Tensor:
        out = self.mlp(prefix + "shared_experts.", x)
        scores = self.linear(prefix + "gate", x).sigmoid()
        biased = scores + self.tensors[prefix + "gate.e_score_correction_bias"]
        for position in range(len(x)):
            groups = biased[position].view(self.c["n_group"], -1)
            best = groups.topk(2, -1).values.sum(-1).topk(self.c["topk_group"]).indices
            allowed = torch.full_like(groups, -torch.inf)
            allowed[best] = groups[best]
            chosen = allowed.flatten().topk(self.c["num_experts_per_tok"]).indices
            share = scores[position, chosen] / scores[position, chosen].sum() * self.c["routed_scaling_factor"]
            for expert, weight in zip(chosen.tolist(), share, strict=True):
                out[position] += weight * self.mlp(f"{prefix}experts.{expert}.", x[position])
        return out

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        c, heads, length = self.c, self.c["num_attention_heads"], len(x)
        query = self.linear(
            prefix + "q_b_proj", self.norm(prefix + "q_a_layernorm", self.linear(prefix + "q_a_proj", x))
        )
        query = query.view(length, heads, -1).split([c["qk_nope_head_dim"], c["qk_rope_head_dim"]], -1)
        latent, shared = self.linear(prefix + "kv_a_proj_with_mqa", x).split(
            [c["kv_lora_rank"], c["qk_rope_head_dim"]], -1
        )
        both = self.linear(prefix + "kv_b_proj", self.norm(prefix + "kv_a_layernorm", latent)).view(length, heads, -1)
        key, value = both.split([c["qk_nope_head_dim"], c["v_head_dim"]], -1)
        scores = torch.einsum("qhd,khd->hqk", query[0], key)
        scores += torch.einsum("qhd,kd->hqk", self.rotated(query[1]), self.rotated(shared.unsqueeze(1)).squeeze(1))
        scores = scores * self.scale + torch.full((length, length), -torch.inf).triu(1)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
        return self.linear(prefix + "o_proj", out.flatten(1))

    def rotated(self, x: Tensor) -> Tensor:
        """[positions, heads, channels], channels 2i and 2i + 1 a pair."""
        angles = torch.outer(torch.arange(len(x)).float(), self.frequencies).unsqueeze(1)
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
