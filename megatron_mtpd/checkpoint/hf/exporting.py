"""A checkpoint of ours becomes a Hugging Face folder that a serving engine reads.

The trunk gets its own architecture's names, the heads those of a format (see `formats`). config.json is the folder's
that the model was imported from, where it describes this model; tokenizer, generation settings and licence come from
there too. README.md says which engine runs it, with which settings, and what was measured.

The result appears whole or not at all. Deliberately absent: quantisation, and merging of several checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.common_state import read_common_state
from megatron_mtpd.checkpoint.files import Progress, assembled, sync
from megatron_mtpd.checkpoint.hf import card
from megatron_mtpd.checkpoint.hf.architectures import ARCHITECTURES, Architecture, architecture_of, for_shape
from megatron_mtpd.checkpoint.hf.arguments import shape_of
from megatron_mtpd.checkpoint.hf.folder import (
    CONFIG,
    SHARD_SIZE,
    Entry,
    copy_companions,
    read_config,
    read_json,
    refuse_overlap,
    write_json,
    write_weights,
)
from megatron_mtpd.checkpoint.hf.formats import EMBEDDING, FORMATS, TRANSFORMERS, TRUNK, Format
from megatron_mtpd.checkpoint.hf.importing import DTYPES
from megatron_mtpd.checkpoint.hf.layouts import Layout, prefixed
from megatron_mtpd.checkpoint.hf.shape import Shape
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.metadata import CheckpointError, Metadata, is_optimizer, read_metadata

_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
"""What a configuration of another architecture takes from that of the folder."""


@dataclass(frozen=True)
class Export:
    """What an export is made of, once it is known to be possible."""

    source: Metadata
    shape: Shape
    architecture: Architecture
    format: Format
    config: dict[str, Any]
    companions: Path | None
    acceptance: dict[str, Any] | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the result has to know."""
        if self.companions:
            return ()
        return (
            "It has no tokenizer, and a config.json without token ids: the checkpoint names no folder that is there. "
            "--hf gives one.",
        )

    def pairs(self) -> Iterator[tuple[str, Layout]]:
        """Our key and the layout of theirs, of everything that is written."""
        yield from self.format.of_trunk(self.architecture, self.shape)
        for head in range(self.shape.num_heads):
            yield from self.format.head(self.architecture, self.shape, head)
            if self.format is TRANSFORMERS:
                prefix = self.format.head_prefix(self.shape, head)
                yield from ((key, prefixed(layout, prefix)) for key, layout in self.architecture.copied.items())


def export_hf(
    load: Path,
    save: Path,
    format: str = TRANSFORMERS.name,
    hf: Path | None = None,
    acceptance: Path | None = None,
    num_heads: int | None = None,
    ckpt_step: int | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    shard_size: int = SHARD_SIZE,
    full: bool = False,
    force: bool = False,
) -> Export:
    """Convert a checkpoint (of a run: its last one, or `ckpt_step`) into the folder `save`.

    Args:
        format: one of `FORMATS`.
        hf: the folder that the model was imported from, or one with its config.json and tokenizer; default: the folder
            that the checkpoint names as its tokenizer's.
        acceptance: `acceptance.json` of the benchmark, for the model card.
        num_heads: the first so many heads; default: all.
        dtype: fp32, bf16 or fp16; default: the checkpoint's.
        vocab_size: rows of the embedding; default: as the folder says, or the arguments.
        full: compare the checksums of all bytes before.
        force: replace what is in `save`.

    Raises ValueError, naming the option, or CheckpointError, naming the file, before anything is written.
    """
    refuse_overlap(load, save)
    export = plan(load, format, hf, acceptance, num_heads, ckpt_step, dtype, vocab_size, full)
    shape = export.shape
    entries = list(_entries(export))
    total = sum(entry.nbytes(shape.dtype) for entry in entries)
    texts = card.files(export.architecture, shape, export.format, save.name, export.acceptance)
    with assembled(save, replace=force) as root:
        free = shutil.disk_usage(root).free
        if total > free:
            raise ValueError(
                f"--save {save} needs {total / 1e9:,.1f} GB, and its file system has {free / 1e9:,.1f} GB."
            )
        if export.companions:
            copy_companions(export.companions, root)
        with Progress("export", total) as progress:
            write_weights(root, entries, shape.dtype, progress, shard_size)
        write_json(root / CONFIG, export.config)
        for name, text in texts.items():
            (root / name).write_text(text)
            sync(root / name)
    return export


def _entries(export: Export) -> Iterator[Entry]:
    import torch

    from megatron_mtpd.checkpoint.hf.blocks import Buffer, of_ours
    from megatron_mtpd.checkpoint.hf.torch_dist import Reader

    reader, buffer, shape = Reader(export.source), Buffer(), export.shape
    for key, layout in export.pairs():
        dtype = shape.dtype_of(key)
        for name, size in zip(layout.names, layout.shapes(shape.size_of(key), shape), strict=True):
            read = partial(of_ours, reader, key, layout, name, shape, getattr(torch, dtype), buffer)
            yield Entry(name, size, read, dtype)


def plan(
    load: Path,
    format: str,
    hf: Path | None = None,
    acceptance: Path | None = None,
    num_heads: int | None = None,
    ckpt_step: int | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    full: bool = False,
) -> Export:
    """Check that an export is possible; arguments and errors are those of `export_hf`. Nothing is written."""
    _, directory = resolve(load, ckpt_step)
    source = read_metadata(directory)
    problems = verify(directory, full, metadata=source)
    if problems:
        raise CheckpointError(f"{directory} cannot be exported: {problems[0]}. Load another with --ckpt-step.")
    for key, tensor in source.tensors.items():
        if tensor.dtype.startswith("float8") and not is_optimizer(key):
            raise CheckpointError(
                f"{directory} has {key} as {tensor.dtype}, and no scales that an export could read. Megatron saves FP8 "
                "parameters as bf16: load the checkpoint where it was written, save it again, and export that."
            )
    if EMBEDDING not in source.tensors:
        raise CheckpointError(f"{directory} has no tensor {EMBEDDING}, which a model of its arguments has.")
    args = read_common_state(source).args
    chosen = FORMATS[format]
    heads = source.num_heads if num_heads is None else num_heads
    if not 0 <= heads <= source.num_heads:
        raise ValueError(f"--num-heads {heads}: the checkpoint has {source.num_heads} heads.")
    kept = DTYPES[dtype] if dtype else source.tensors[EMBEDDING].dtype
    shape = shape_of(args, 0 if chosen is TRUNK else heads, kept, str(directory))
    folder = _folder(hf, args)
    config = read_json(folder / CONFIG) if folder and (folder / CONFIG).exists() else {}
    rows = vocab_size or config.get("vocab_size") or args.get("vocab_size")
    if not rows:
        raise ValueError(
            f"--vocab-size is missing: {directory} says that its embedding has {shape.padded_vocab_size} rows with "
            "padding, not how many are tokens. Give the number of the tokenizer's tokens."
        )
    padded = source.tensors[EMBEDDING].shape[0]
    if rows > padded:
        raise ValueError(f"--vocab-size {rows}: the checkpoint's embedding has {padded} rows.")
    shape = replace(shape, vocab_size=rows, padded_vocab_size=padded)
    known = config.get("model_type") in ARCHITECTURES
    architecture = architecture_of(config["model_type"], str(folder)) if known else for_shape(shape)
    if lacking := architecture.lacks(shape):
        raise ValueError(
            f"--hf {folder}: its architecture, {architecture.model_type}, cannot express the checkpoint's "
            f"{', '.join(lacking)}. Give the folder that the model was imported from."
        )
    architecture = architecture.sized(shape)
    if architecture.copied and chosen not in (TRUNK, TRANSFORMERS):
        raise ValueError(
            f"--format {format} is for dense models with plain attention. Of {architecture.class_name}, --format "
            f"{TRANSFORMERS.name} is the format that engines know."
        )
    if reason := chosen.refuse(shape):
        raise ValueError(f"--format {format} cannot hold this model: {reason}.")
    if known and folder:
        _compare(architecture, folder, shape)
    measured = read_json(acceptance) if acceptance else None
    return Export(source, shape, architecture, chosen, _config(architecture, shape, chosen, config), folder, measured)


def _folder(hf: Path | None, args: dict[str, Any]) -> Path | None:
    if hf is not None:
        if not hf.is_dir():
            raise ValueError(f"--hf {hf}: no such folder.")
        return hf
    named = args.get("tokenizer_model")
    return Path(str(named)) if named and Path(str(named)).is_dir() else None


def _compare(architecture: Architecture, folder: Path, shape: Shape) -> None:
    """Raises ValueError where a folder's config.json describes another model than the checkpoint's."""
    described = architecture.shape(
        read_config(folder), shape.padded_vocab_size, shape.dtype, shape.max_positions, str(folder)
    )
    for name, value in vars(replace(described, num_heads=shape.num_heads, vocab_size=shape.vocab_size)).items():
        if value != getattr(shape, name):
            raise ValueError(
                f"--hf {folder}: its config.json describes {name} {value}, the checkpoint has {getattr(shape, name)}. "
                "Give the folder that the model was imported from."
            )


def _config(architecture: Architecture, shape: Shape, form: Format, found: dict[str, Any]) -> dict[str, Any]:
    """config.json: the folder's own, where it is of this architecture and the format keeps it, or a new one."""
    if found.get("model_type") == architecture.model_type and form in (TRUNK, TRANSFORMERS):
        changed = {"num_mtp_layers", "num_nextn_predict_layers", "mtp_layer_types", "auto_map", "quantization_config"}
        base = {name: value for name, value in found.items() if name not in changed}
        base |= {"torch_dtype" if "torch_dtype" in base else "dtype": shape.dtype, "vocab_size": shape.vocab_size}
        base["max_position_embeddings"] = max(shape.max_positions, base.get("max_position_embeddings", 0))
    else:
        base = architecture.config(shape) | {name: found[name] for name in _CARRIED if name in found}
    config = base | form.config(architecture, shape)
    if architecture.copied:  # which takes a missing number for 1
        config |= {"num_nextn_predict_layers": shape.num_heads}
    return config | ({"auto_map": card.auto_map()} if form is TRANSFORMERS else {})
