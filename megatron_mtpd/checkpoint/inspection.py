"""Describe a checkpoint from its metadata: heads, parameters, layout, arguments, sizes, shared bytes,
integrity.

`describe` returns plain data, ready for JSON; `table` prints it for people. No tensor is read unless a full
verification is asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint import integrity
from megatron_mtpd.checkpoint.common_state import read_common_state
from megatron_mtpd.checkpoint.files import readable
from megatron_mtpd.checkpoint.iterations import list_checkpoints, resolve
from megatron_mtpd.checkpoint.metadata import (
    CheckpointError,
    Metadata,
    Payload,
    Tensor,
    head_of,
    is_optimizer,
    optimizer_slot,
    read_metadata,
)

_EMBEDDING = re.compile(r"(?:^|\.)(?:embedding|word_embeddings)\.")
_OUTPUT = re.compile(r"(?:^|\.)output_layer\.")


def describe(load: Path, ckpt_step: int | None = None, full: bool = False) -> dict[str, Any]:
    """Everything about one checkpoint, by name. `load` is a run's directory, or one checkpoint's.

    Sizes are bytes; parameters are counted once, whatever the parallel layout. `aliases` names, for each head
    that is made of another one's bytes, that head (both from 1). `problems` is empty for a good checkpoint;
    with `full`, that includes every byte of its data. Raises CheckpointError where there is no readable
    checkpoint.
    """
    iteration, directory = resolve(load, ckpt_step)
    metadata = read_metadata(directory)
    try:
        state = read_common_state(metadata)
        args, values = state.args, state.values
    except CheckpointError:  # still worth describing
        args, values = {}, {}
    content = values.get("content_metadata") or {}
    return {
        "directory": str(directory),
        "iteration": values.get("iteration", iteration),
        "iterations": [
            {"iteration": saved.iteration, "state": saved.state}
            for saved in (list_checkpoints(load) if load != directory else [])
        ],
        "heads": metadata.num_heads,
        "layer_pattern": args.get("hybrid_layer_pattern"),
        "parameters": _parameters(metadata),
        "dtypes": dict(Counter(t.dtype for t in metadata.tensors.values() if not is_optimizer(t.key))),
        "layout": {
            name: args.get(name)
            for name in (
                *("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
                *("expert_model_parallel_size", "data_parallel_size"),
            )
        },
        "optimizer": _optimizer(metadata, content),
        "bytes": _bytes(metadata),
        "files": len(metadata.files()),
        "aliases": aliases(metadata),
        "arguments": {name: _plain(value) for name, value in sorted(args.items())},
        "problems": [str(problem) for problem in integrity.verify(directory, full)],
        "verified": "every byte" if full else "presence and sizes",
        "tensors": {
            tensor.key: {"shape": list(tensor.shape), "dtype": tensor.dtype, "chunks": len(tensor.chunks)}
            for tensor in metadata.tensors.values()
        },
    }


def _parameters(metadata: Metadata) -> dict[str, Any]:
    heads = [0] * metadata.num_heads
    counts: dict[str, int] = {"trunk": 0, "embedding": 0, "output": 0}
    for tensor in metadata.tensors.values():
        if is_optimizer(tensor.key):
            continue
        head = head_of(tensor.key)
        if head is not None:
            heads[head] += tensor.numel
        else:
            counts[_part(tensor)] += tensor.numel
    return {"total": sum(counts.values()) + sum(heads), **counts, "heads": heads}


def _part(tensor: Tensor) -> str:
    if _EMBEDDING.search(tensor.key):
        return "embedding"
    return "output" if _OUTPUT.search(tensor.key) else "trunk"


def _optimizer(metadata: Metadata, content: dict[str, Any]) -> dict[str, Any] | None:
    """How its state was saved; None where there is none."""
    keys = [key for key in metadata.tensors if is_optimizer(key)]
    if not keys:
        return None
    slots = sorted({slot for slot in map(optimizer_slot, keys) if slot})
    sharding = content.get("distrib_optim_sharding_type", "not distributed")
    return {"sharding": sharding, "by_parameter": all(map(optimizer_slot, keys)), "slots": slots}


def _bytes(metadata: Metadata) -> dict[str, int]:
    """Bytes on disk of what the entries point at, each counted once; `files`: of the files that hold them."""
    sizes: dict[str, int] = {"model": 0, "optimizer": 0, "other": 0}
    owners = {payload: key for key, payload in metadata.payloads()}
    for payload, key in owners.items():
        kind = "optimizer" if is_optimizer(key) else "model" if key in metadata.tensors else "other"
        sizes[kind] += payload.length
    files = (metadata.directory / name for name in metadata.files())
    return {**sizes, "files": sum(file.stat().st_size for file in files if file.exists())}


def aliases(metadata: Metadata) -> dict[int, int]:
    """Heads that consist of an earlier head's bytes, and that head; both counted from 1."""
    parts: dict[int, dict[str, tuple[Payload, ...]]] = {}
    for tensor in metadata.tensors.values():
        head = head_of(tensor.key)
        if head is not None and not is_optimizer(tensor.key):
            name = tensor.key.split(f"mtp.layers.{head}.", 1)[1]
            parts.setdefault(head, {})[name] = tuple(payload for _, payload in sorted(tensor.chunks.items()))
    found = {}
    for head in sorted(parts):
        earlier = next((other for other in range(head) if parts.get(other) == parts[head]), None)
        if earlier is not None:
            found[head + 1] = earlier + 1
    return found


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def table(found: dict[str, Any], arguments: bool = False, tensors: bool = False) -> str:
    """What `describe` found, for people to read."""
    parameters, sizes, layout = found["parameters"], found["bytes"], found["layout"]
    optimizer = found["optimizer"]
    rows: list[tuple[str, Any]] = [
        ("checkpoint", found["directory"]),
        ("iteration", found["iteration"]),
        ("integrity", found["problems"][0] if found["problems"] else f"good ({found['verified']})"),
        *(("", problem) for problem in found["problems"][1:]),
        ("parameters", f"{parameters['total']:,} ({', '.join(sorted(found['dtypes']))})"),
        ("  trunk", f"{parameters['trunk']:,}"),
        ("  embedding", f"{parameters['embedding']:,}"),
        ("  output layer", f"{parameters['output']:,}" if parameters["output"] else "tied to the embedding"),
        ("heads", found["heads"]),
    ]
    for number, count in enumerate(parameters["heads"], 1):
        same = f"  (the bytes of head {found['aliases'][number]})" if number in found["aliases"] else ""
        rows.append((f"  head {number}", f"{count:,}{same}"))
    rows += [
        ("layer pattern", found["layer_pattern"] or "none: a GPTModel"),
        ("saved by", ", ".join(f"{name.split('_model')[0]} {size}" for name, size in layout.items() if size)),
        ("optimizer", f"{optimizer['sharding']}: {', '.join(optimizer['slots'])}" if optimizer else "none"),
        ("files", f"{found['files']} of {readable(sizes['files'])}"),
        *((f"  {kind}", readable(sizes[kind])) for kind in ("model", "optimizer", "other")),
    ]
    others = ", ".join(
        f"{saved['iteration']}{'' if saved['state'] == 'complete' else ' (' + saved['state'] + ')'}"
        for saved in found["iterations"]
    )
    if others:
        rows.append(("iterations", others))
    lines = [f"{name:<16}{value}" for name, value in rows]
    if arguments:
        lines += ["", "arguments", *(f"  {name} = {value}" for name, value in found["arguments"].items())]
    if tensors:
        lines += ["", "tensors", *(f"  {key} {t['dtype']} {t['shape']}" for key, t in found["tensors"].items())]
    return "\n".join(lines)
