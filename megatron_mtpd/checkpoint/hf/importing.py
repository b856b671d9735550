"""A Hugging Face folder becomes a checkpoint that our training and benchmarks load.

The result is a `release` checkpoint: weights without a place in a run. Heads come from the folder if it has some (as
`exporting` writes them for transformers), or start as copies of the trunk's last layer, or at random. What is no weight
(config.json, tokenizer) goes along into `hf/`, where training finds the tokenizer and a later export the rest;
`model.args` holds the flags that train the model.

The result appears whole or not at all. Deliberately absent: quantised weights, but for fp8 with a scale for each block
(DeepSeek-V3), which becomes bf16, and for GGUF, which transformers dequantises into a folder first (all of it in
memory).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_mtpd.checkpoint.files import Progress, assembled, sync
from megatron_mtpd.checkpoint.hf import fp8
from megatron_mtpd.checkpoint.hf.architectures import Architecture, architecture_of
from megatron_mtpd.checkpoint.hf.arguments import arguments, flags
from megatron_mtpd.checkpoint.hf.folder import CONFIG, Folder, companions, copy_companions, read_config, refuse_overlap
from megatron_mtpd.checkpoint.hf.formats import TRANSFORMERS
from megatron_mtpd.checkpoint.hf.gguf_file import unpack
from megatron_mtpd.checkpoint.hf.layouts import Layout
from megatron_mtpd.checkpoint.hf.shape import Shape
from megatron_mtpd.checkpoint.hf.stored import ahead
from megatron_mtpd.checkpoint.iterations import RELEASE, directory_of, write_tracker
from megatron_mtpd.checkpoint.metadata import ITEM_SIZES

Init = Literal["last-layer", "random"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ARGS_FILE = "model.args"
COMPANIONS = "hf"
_DIVISIBLE_BY = 128  # Megatron's own default


@dataclass(frozen=True)
class Import:
    """What an import made: the checkpoint's shape, its architecture, and where its heads come from."""

    shape: Shape
    architecture: Architecture
    heads: str
    notes: tuple[str, ...] = ()
    """What a reader of the result has to know."""


def import_hf(
    source: Path,
    save: Path,
    num_heads: int | None = None,
    init: Init | None = None,
    dtype: str | None = None,
    max_positions: int | None = None,
    seed: int = 1234,
    force: bool = False,
) -> Import:
    """Convert the folder (or .gguf file) `source` into the checkpoint folder `save`.

    Args:
        num_heads: heads of the checkpoint; default: those of the folder, which are kept.
        init: how heads start that the folder does not have; default: as copies of the last layer.
        dtype: fp32, bf16 or fp16; default: that of the folder's embedding (of a GGUF file: fp32).
        max_positions: the longest sequence to train and decode; default: the folder's.
        seed: of random heads.
        force: replace what is in `save`.

    Raises ValueError, naming the option or the entry of config.json, before anything is written.
    """
    refuse_overlap(source, save)
    with _as_folder(source) as path:
        folder = Folder(path)
        architecture = architecture_of(folder.config.get("model_type"), str(source))
        shape = _shape(folder, architecture, dtype, max_positions, str(source))
        architecture = architecture.sized(shape)
        there = _heads_in(folder, shape)
        heads = there if num_heads is None else num_heads
        if heads < 0 or (there and heads > there):
            raise ValueError(
                f"--num-heads {heads}: {source} has {there} heads. Give at most that many, and make more of them with "
                "tools/loop_extend.py afterwards."
            )
        if there and init:
            raise ValueError(f"--init {init}: {source} has {there} trained heads, which are kept. Leave it out.")
        start = None if there else init or "last-layer"
        shape = replace(shape, num_heads=heads)
        with assembled(save, replace=force) as root:
            copied = root / COMPANIONS
            copied.mkdir()
            copy_companions(path, copied)
            shutil.copyfile(path / CONFIG, copied / CONFIG)
            has_tokenizer = any(file.name.startswith("tokenizer") for file in companions(path))
            tokenizer = str((save / COMPANIONS).resolve()) if has_tokenizer else None
            directory = directory_of(root, RELEASE)
            directory.mkdir()
            rounded = _write(folder, directory, architecture, shape, start, tokenizer, seed)
            args = root / ARGS_FILE
            args.write_text("\n".join([f"# Flags of the model in {save.name}.", *flags(shape, tokenizer)]) + "\n")
            sync(args)
            write_tracker(root, RELEASE)
    notes = []
    if rounded and dtype is None:
        notes.append(
            f"{len(rounded)} tensors, {rounded[0]} first, are wider in the folder than {shape.dtype}, its embedding's "
            "dtype, and were rounded to it; --dtype fp32 keeps every bit."
        )
    return Import(shape, architecture, "none" if not heads else start or "the folder's", tuple(notes))


@contextmanager
def _as_folder(source: Path) -> Iterator[Path]:
    """The folder itself, or one that is made of a GGUF file."""
    if source.suffix != ".gguf":
        yield source
    else:
        with tempfile.TemporaryDirectory(prefix="gguf-") as name:
            unpack(source, Path(name))
            yield Path(name)


def _shape(
    folder: Folder, architecture: Architecture, dtype: str | None, max_positions: int | None, where: str
) -> Shape:
    config = read_config(folder.path)
    embedding = next(layout for key, layout in architecture.model.items() if key.startswith("embedding.")).names[0]
    found = folder.dtype(embedding)
    if found not in DTYPES.values():
        raise ValueError(f"{where}: its weights are {found}; only {', '.join(DTYPES.values())} can be converted.")
    vocabulary = folder.shape(embedding)[0]
    if vocabulary != config.vocab_size:
        raise ValueError(f"{where}: {embedding} has {vocabulary} rows, config.json says {config.vocab_size}.")
    padded = math.ceil(vocabulary / _DIVISIBLE_BY) * _DIVISIBLE_BY
    chosen = DTYPES[dtype] if dtype else found
    return architecture.shape(config, padded, chosen, max_positions, where)


def _heads_in(folder: Folder, shape: Shape) -> int:
    """How many heads a folder has, in the format of transformers."""
    count = 0
    while TRANSFORMERS.head_prefix(shape, count) + "eh_proj.weight" in folder.names:
        count += 1
    return count


def _write(
    folder: Folder,
    directory: Path,
    architecture: Architecture,
    shape: Shape,
    init: Init | None,
    tokenizer: str | None,
    seed: int,
) -> tuple[str, ...]:
    """Write the checkpoint, and return the tensors that were rounded."""
    import torch

    from megatron_mtpd.checkpoint.hf.archive import checksum
    from megatron_mtpd.checkpoint.hf.blocks import Buffer, of_theirs
    from megatron_mtpd.checkpoint.hf.torch_dist import Writer

    writer, buffer = Writer(directory), Buffer()
    table = list(architecture.trunk(shape))
    if init is None:
        table += [pair for head in range(shape.num_heads) for pair in TRANSFORMERS.head(architecture, shape, head)]
    rounded = _check(folder, table, architecture, shape)

    def blocks() -> Iterator[tuple[str, torch.Tensor, int]]:
        for key, layout in table:
            size, dtype = shape.size_of(key), getattr(torch, shape.dtype_of(key))
            for block in of_theirs(folder, layout, size, dtype, shape, buffer):
                yield key, block, checksum(block)

    total = sum(math.prod(shape.size_of(key)) * ITEM_SIZES[shape.dtype_of(key)] for key, _ in table)
    new = 0
    if init is not None:
        from megatron_mtpd.checkpoint.hf.new_heads import written_bytes

        new = written_bytes(architecture, shape, init)
    free = shutil.disk_usage(directory).free
    if total + new > free:
        raise ValueError(f"--save needs {(total + new) / 1e9:,.1f} GB, and its file system has {free / 1e9:,.1f} GB.")
    with Progress("import", total) as progress:
        for key, block, crc in ahead(blocks()):
            writer.rows(key, shape.size_of(key), block, crc)
            progress(block.nbytes)
    if init is not None:
        from megatron_mtpd.checkpoint.hf.new_heads import write_heads

        write_heads(writer, architecture, shape, init, seed)
    for module in shape.linear_modules():
        writer.extra_state(module, shape.copies_of(module))
    writer.finish(
        {
            "args": arguments(shape, getattr(torch, shape.dtype), tokenizer),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        }
    )
    return rounded


def _check(
    folder: Folder, table: list[tuple[str, Layout]], architecture: Architecture, shape: Shape
) -> tuple[str, ...]:
    """The tensors whose dtype is wider than it will be.

    Raises ValueError where a tensor is not as large as config.json makes it, or cannot be read, or nothing is known of
    it, or a head has an embedding or an output layer that is not the main model's.
    """
    known, rounded = set(), []
    for key, layout in table:
        kept = ITEM_SIZES[shape.dtype_of(key)]
        for name, should in zip(layout.names, layout.shapes(shape.size_of(key), shape), strict=True):
            known.update((name, name + fp8.SCALE))
            if folder.shape(name) != should:
                raise ValueError(
                    f"{folder.path}: {name} is {list(folder.shape(name))}, and config.json describes {list(should)}."
                )
            folder.check_readable(name)
            if ITEM_SIZES[folder.dtype(name)] > kept:
                rounded.append(name)
    heads = [TRANSFORMERS.head_prefix(shape, head) for head in range(_heads_in(folder, shape))]
    output = architecture.model["output_layer.weight"].names  # a tied model's file may have it all the same
    known.update(output)
    for name in folder.names:
        if name not in known and not name.startswith(tuple(heads)) and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{folder.path}: {architecture.class_name} has no tensor {name}, and leaving it out could change what "
                "the model computes."
            )
    for prefix in heads[: shape.num_heads]:
        for key, layout in architecture.copied.items():
            copy, original = prefix + layout.names[0], architecture.model[key].names[0]
            if copy in folder.names and not folder.same(copy, original):
                raise ValueError(
                    f"{folder.path}: {copy} is not {original}. Heads share embedding and output layer with the main "
                    "model here: give --num-heads 0 to import the model without them."
                )
    return tuple(rounded)
