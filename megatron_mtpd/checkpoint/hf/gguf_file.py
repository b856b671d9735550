"""A GGUF file becomes a Hugging Face folder, dequantised to fp32 by transformers' own reader.

transformers knows how the names differ, and that GGUF stores the rows of queries and keys in another order. Its loader
of whole models is not used: that asks for accelerate, whose import changes the environment of the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.hf.folder import CONFIG, Entry, write_json, write_weights


def unpack(source: Path, folder: Path) -> None:
    """Write weights, config.json and tokenizer of `source` into an empty folder; all weights are in memory meanwhile.

    Raises ValueError where the file is missing or not readable, or a package is.
    """
    if not source.is_file():
        raise ValueError(f"{source}: no such file.")
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ModuleNotFoundError as error:
        raise ValueError(f"{source}: GGUF needs {error.name}: pip install 'megatron-mtpd[hf]'.") from error
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # for its names
        found = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.float32)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    except (ValueError, RuntimeError, KeyError, OSError, NotImplementedError) as error:
        raise ValueError(f"{source}: transformers cannot read it: {error}") from error
    written = config.to_diff_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    tensors = found["tensors"]
    written["tie_word_embeddings"] = "lm_head.weight" not in tensors  # the file does not say it otherwise
    model.generation_config.save_pretrained(folder)
    write_json(folder / CONFIG, written)
    write_weights(folder, [_entry(name, value) for name, value in tensors.items()], "float32", lambda count: None)


def _entry(name: str, tensor: Any) -> Entry:
    return Entry(name, tuple(tensor.shape), lambda: [tensor])
