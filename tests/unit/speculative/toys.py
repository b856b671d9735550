"""A model of random weights that can decode, and the cache-free reference of speculative decoding.

The weights are functions of their names. A few tokens are frequent, and a head is given its token much as the main
model is given its own, so that they agree often enough for every number of accepted drafts to occur.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_mtpd.model import MTPDModel, MTPDModelConfig  # noqa: E402
from megatron_mtpd.speculative.counts import Acceptance  # noqa: E402
from megatron_mtpd.speculative.loading import build_from_config  # noqa: E402

VOCABULARY = 96


def toy_model(
    num_heads: int,
    *,
    vocabulary: int = VOCABULARY,
    frequent: int = 24,
    block: str = "*-",
    blocks: int = 2,
    rotary_percent: float = 1.0,
    **options,
) -> MTPDModel:
    """`blocks` blocks and `num_heads` heads, of width 32, in fp32, at the tensor-parallel size of the process."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    transformer = TransformerConfig(
        **{
            "num_layers": 4,
            "mtp_num_layers": num_heads,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "transformer_impl": "local",
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "apply_rope_fusion": False,
            "tensor_model_parallel_size": tp,
        }
        | options
    )
    config = MTPDModelConfig(
        transformer=transformer,
        hybrid_layer_pattern=block * blocks + ("/" + block) * num_heads,
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=1,
        seq_length=64,
        position_embedding_type="rope",
        rotary_percent=rotary_percent,
        share_embeddings_and_output_weights=False,
    )
    model = build_from_config(config)
    set_weights(model, frequent)
    return model


@torch.no_grad()
def set_weights(model: MTPDModel, frequent: int = 24) -> None:
    """The toy's weights, at the tensor-parallel size of the process."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in model.named_parameters():
        weight = whole_weight(name, parameter, tp, frequent)
        if weight.shape != parameter.shape:
            weight = _shard(name, weight, getattr(parameter, "partition_dim"), tp)  # noqa: B009
        parameter.copy_(weight)


def whole_weight(name: str, parameter: Tensor, tp: int, frequent: int) -> Tensor:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[getattr(parameter, "partition_dim")] *= tp  # noqa: B009
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * 0.15
    if "norm" in name:
        return weight + 1.0
    if "eh_proj" in name:  # a head that mostly passes on the token's embedding, as the main model does with its own
        return weight * 0.1 + torch.eye(*shape)
    if "embedding" in name:
        return weight * 4.0
    if "output_layer" in name:
        weight[::frequent] *= 1.5
        return weight * 4.0
    return weight * (0.5 if "layers" in name else 1.0)


def _shard(name: str, weight: Tensor, dim: int, tp: int) -> Tensor:
    rank = parallel_state.get_tensor_model_parallel_rank()
    if "linear_fc1" in name:  # gate and up projection are split each for itself
        return torch.cat([half.chunk(tp, dim)[rank] for half in weight.chunk(2, dim)], dim)
    return weight.chunk(tp, dim)[rank]


def prompts(number: int, seed: int = 0, longest: int = 12) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=random).tolist()
    return [torch.randint(0, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


@torch.no_grad()
def hidden_states(model: MTPDModel, tokens: list[int]) -> list[Tensor]:
    """Hidden states [s, h] of the main model and of every head, by the training pass over the tokens."""
    ids = torch.tensor([tokens])
    main, heads, _ = model.hidden_states_of_all_heads(ids, torch.arange(len(tokens)).unsqueeze(0), None)
    return [h[:, 0] for h in (main, *heads)]


@torch.no_grad()
def choose(model: MTPDModel, hidden: Tensor, among: int = VOCABULARY) -> int:
    """The most probable token of one position [h], of the first `among`."""
    return int(model.logits(hidden.view(1, 1, -1))[0, 0, :among].argmax())


def plain(model: MTPDModel, prompt: list[int], size: int) -> list[int]:
    """Greedy continuation of `size` tokens, a whole pass for each."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + size:
        tokens.append(choose(model, hidden_states(model, tokens)[0][-1]))
    return tokens[len(prompt) :]


def speculative(
    model: MTPDModel, prompt: list[int], size: int, num_heads: int, among: int = VOCABULARY
) -> tuple[list[int], Acceptance]:
    """The same with drafts, of the first `among` tokens, and their counts; every head by a whole training pass over
    tokens and earlier drafts."""
    counts = Acceptance.of_heads(num_heads)
    tokens = [*prompt, *plain(model, prompt, 1)]
    while len(tokens) < len(prompt) + size:
        position, drafts = len(tokens) - 2, []
        for k in range(1, num_heads + 1):
            hidden = hidden_states(model, tokens + drafts)[k]
            drafts.append(choose(model, hidden[position], among))
        truth = plain(model, tokens, num_heads + 1)
        accepted = next((j for j, d in enumerate(drafts) if d != truth[j]), num_heads)
        counts.add(num_heads, accepted)
        tokens += truth[: accepted + 1]
    return tokens[len(prompt) :][:size], counts


TEMPLATE = (
    "{% for m in messages %}{{ '<|start|> ' + m['role'] + ' ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|> assistant ' }}{% endif %}"
)


def chat_tokenizer(folder: Path, template: str | None = TEMPLATE, adds_first: bool = False) -> str:
    """Make a folder with a tokenizer of 95 words, from `<|end|>`, 0, over `w4`, 4, to `w94`. `adds_first`: `<|start|>`
    before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<|end|>", "<|start|>", "user", "assistant", *(f"w{i}" for i in range(4, 95))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w94"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if adds_first:
        words.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    specials = {"eos_token": "<|end|>", "bos_token": "<|start|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **specials)
    tokenizer.save_pretrained(folder)
    return str(folder)
