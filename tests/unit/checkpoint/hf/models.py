"""Small models on both sides: transformers' own with random weights, and checkpoints of ours whose heads get accepted.

And the heads' mathematics in plain PyTorch, from the tensors of an exported folder alone.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_mtpd.checkpoint.hf.architectures import for_shape
from megatron_mtpd.checkpoint.hf.arguments import arguments
from megatron_mtpd.checkpoint.hf.formats import TRANSFORMERS
from megatron_mtpd.checkpoint.hf.shape import Shape
from megatron_mtpd.checkpoint.hf.torch_dist import Writer
from megatron_mtpd.checkpoint.iterations import RELEASE, directory_of, write_tracker

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,  # no multiple of 128: our embedding is padded
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-6,
    "initializer_range": 0.2,  # large enough for the layers to matter in the logits
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 24},
    "llama-scaled": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "llama-3": {  # of 8 frequencies, 5 stay, one lies between, and 2 are divided
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e4,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "mistral": {"sliding_window": None, "head_dim": 16},
}


def hugging_face(folder: Path, name: str, tied: bool, **save: Any) -> Any:
    """A model of transformers with random weights, norms and biases included, saved into a folder."""
    options = {"model_type": name} | SIZES | MODELS[name] | {"tie_word_embeddings": tied}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=random) * 0.2
    model.save_pretrained(folder, **save)
    return model.eval()


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the library's own reader."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def toy_shape(num_heads: int = 4, **changes: Any) -> Shape:
    """128 wide, because engines want heads of attention of at least 32."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "num_heads": num_heads,
        "hidden_size": 128,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "vocab_size": 96,
        "padded_vocab_size": 128,
        "norm_eps": 1e-5,  # this and the next are not what engines take where nothing is said
        "rope_base": 50000,
        "rope_factor": None,
        "rope_scaling_factor": None,
        "max_positions": 256,
        "tied": False,
        "qkv_bias": False,
        "qk_norm": False,
        "dtype": "float32",
    }
    return Shape(**(sizes | changes))


def toy_checkpoint(root: Path, shape: Shape) -> Path:
    """A checkpoint whose weights are functions of their names, and whose heads often guess right.

    A few tokens are frequent, and a head mostly passes on the embedding that it is given, as the main model does.
    """
    directory = directory_of(root, RELEASE)
    directory.mkdir(parents=True)
    writer = Writer(directory)
    architecture = for_shape(shape)
    keys = [key for key, _ in architecture.trunk(shape)]
    keys += [key for head in range(shape.num_heads) for key, _ in TRANSFORMERS.head(architecture, shape, head)]
    for key in keys:
        writer.tensor(key, [toy_weight(key, shape)])
    for module in shape.linear_modules():
        writer.extra_state(module)
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    args = arguments(shape, torch.float32, None)
    writer.finish({"args": args, "iteration": 0, "checkpoint_version": 3.0, "content_metadata": content})
    write_tracker(root, RELEASE)
    return root


def toy_weight(key: str, shape: Shape, frequent: int = 24) -> Tensor:
    size = shape.size_of(key)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))) * 0.08
    if key.endswith(".bias"):
        return weight
    if len(size) == 1:
        return weight + 1.0
    if "eh_proj" in key:
        return weight * 0.1 + torch.eye(*size)
    if shape.tied:  # or every token would predict itself
        return weight * (1.2 if "embedding" in key else 1.0)
    if shape.rope_scaling_factor and "linear_qkv" in key:  # attention that looks where its positions say
        return weight * 0.7
    if "embedding" in key:
        return weight * 4.0
    if "output_layer" in key:
        weight[::frequent] *= 1.5
        return weight * 4.0
    return weight * 0.5


# The mathematics ------------------------------------------------------------------------------------------------------


class Cascade:
    """Main model and heads from the tensors of a folder in the format of transformers; everything in fp32."""

    def __init__(self, folder: Path) -> None:
        self.tensors, self.config = weights(folder), AutoConfig.from_pretrained(folder)
        self.head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        rope = self.config.rope_parameters
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.frequencies = rope["rope_theta"] ** -exponents / rope.get("factor", 1.0)
        if rope["rope_type"] == "llama3":
            self.frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config)

    def logits(self, ids: list[int]) -> list[Tensor]:
        """Of the main model and of every head, [positions, vocabulary]; head k has k positions less."""
        embedded = self.tensors["model.embed_tokens.weight"][torch.tensor(ids)]
        hidden = embedded
        for layer in range(self.config.num_hidden_layers):
            hidden = self.block(f"model.layers.{layer}.", hidden)
        states = [self.norm("model.norm", hidden)]
        for head in range(getattr(self.config, "num_mtp_layers", 0)):
            prefix = f"model.layers.{self.config.num_hidden_layers + head}."
            before = states[-1][: len(ids) - head - 1]
            both = [self.norm(prefix + "enorm", embedded[head + 1 :]), self.norm(prefix + "hnorm", before)]
            joined = linear(torch.cat(both, -1), self.tensors[prefix + "eh_proj.weight"])
            states.append(self.norm(prefix + "shared_head.norm", self.block(prefix, joined)))
        output = self.tensors.get("lm_head.weight", self.tensors["model.embed_tokens.weight"])
        return [linear(state, output) for state in states]

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return x * scale * self.tensors[name + ".weight"]

    def block(self, prefix: str, x: Tensor) -> Tensor:
        x = x + self.attention(prefix + "self_attn.", self.norm(prefix + "input_layernorm", x))
        inner, mlp = self.norm(prefix + "post_attention_layernorm", x), prefix + "mlp."
        gate, up = (linear(inner, self.tensors[f"{mlp}{name}_proj.weight"]) for name in ("gate", "up"))
        return x + linear(silu(gate) * up, self.tensors[mlp + "down_proj.weight"])

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        parts = []
        for name in "qkv":
            weight, bias = self.tensors[f"{prefix}{name}_proj.weight"], self.tensors.get(f"{prefix}{name}_proj.bias")
            part = linear(x, weight, bias).view(len(x), -1, self.head_dim)
            if f"{prefix}{name}_norm.weight" in self.tensors:
                part = self.norm(f"{prefix}{name}_norm", part)
            parts.append((part if name == "v" else self.rotated(part)).transpose(0, 1))
        out = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return linear(out.transpose(0, 1).flatten(1), self.tensors[prefix + "o_proj.weight"])

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(len(x)).float(), self.frequencies).unsqueeze(1)
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )
