"""Import and export of a Hugging Face folder beside plain copies of the same files: time and peak memory.

A folder of random weights is made, a Llama in bf16 whose embedding and output layer are a quarter of it each, so that
some tensors are large. Then, in rounds: its weights are copied, and imported; the files of the checkpoint are copied,
and exported. A copy reads, writes and flushes to the disk, as a conversion does, and nothing else. What is read comes
from the page cache where the files fit in there, for both alike; what was written before is on the disk when a clock
starts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mtpd.checkpoint.files import sync
from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.folder import Entry, write_json, write_weights
from megatron_mtpd.checkpoint.hf.importing import import_hf
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.training.measure import peak_resident_bytes

HIDDEN, FFN, HEADS, GROUPS = 2048, 5632, 32, 8
BLOCK = 8 << 20


def benchmark(size: int, repeats: int, directory: Path | None = None) -> list[dict[str, Any]]:
    """A row for each of `copy` and `import`, `copy back` and `export` of a folder of about `size` bytes:
    `what, bytes, seconds_median, seconds_min, cpu_seconds_median, peak_bytes, of_copy`.

    `cpu_seconds_median`: of all threads, which a busy machine changes less; `peak_bytes`: resident memory of this
    process; `of_copy`: the median of the rounds' ratios to the copy beside it.
    Works in a temporary folder in `directory`. Raises ValueError where it has no room, or `size` is too small.
    """
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: give at least 1.")
    with tempfile.TemporaryDirectory(dir=directory, prefix="convert-") as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 3.2 * size:
            raise ValueError(
                f"--directory {root.parent} has {free / 1e9:.1f} GB, and {3.2 * size / 1e9:.1f} are needed."
            )
        make_folder(root / "hf", size)
        import_hf(root / "hf", root / "ours")
        ours = resolve(root / "ours")[1]
        work = {
            "copy": partial(_copy, root / "hf", "*.safetensors", root / "out"),
            "import": lambda: import_hf(root / "hf", root / "out"),
            "copy back": partial(_copy, ours, "*.distcp", root / "out"),
            "export": lambda: export_hf(root / "ours", root / "out", "trunk"),
        }
        total = sum(file.stat().st_size for file in (root / "hf").glob("*.safetensors"))
        rounds = [{what: _measured(run, root / "out") for what, run in work.items()} for _ in range(repeats)]
    rows = []
    for what, beside in zip(work, ("copy", "copy", "copy back", "copy back"), strict=True):
        seconds = [row[what][0] for row in rounds]
        rows.append(
            {
                "what": what,
                "bytes": total,
                "seconds_median": statistics.median(seconds),
                "seconds_min": min(seconds),
                "cpu_seconds_median": statistics.median(row[what][2] for row in rounds),
                "peak_bytes": max(row[what][1] for row in rounds),
                "of_copy": statistics.median(row[what][0] / row[beside][0] for row in rounds),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'':10}{'s':>8}{'min':>8}{'CPU s':>8}{'MB/s':>8}{'of copy':>9}{'peak MB':>9}"]
    for row in rows:
        rate = row["bytes"] / row["seconds_median"] / 1e6
        times = f"{row['seconds_median']:8.2f}{row['seconds_min']:8.2f}{row['cpu_seconds_median']:8.2f}{rate:8.0f}"
        lines.append(f"{row['what']:10}{times}{row['of_copy']:9.2f}{row['peak_bytes'] / 1e6:9.0f}")
    return "\n".join(lines)


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows with what is needed to measure them again, as JSON."""
    from megatron_mtpd.provenance import provenance

    path.write_text(json.dumps({"rows": list(rows), "provenance": provenance()}, indent=1) + "\n")


def make_folder(folder: Path, size: int, shard_size: int = 1 << 30) -> None:
    """A Llama of about `size` bytes in bf16, sharded. The bytes are random; nobody computes with them."""
    layer = [
        *((f"self_attn.{name}_proj.weight", (rows, HIDDEN)) for name, rows in _rows().items()),
        *((f"mlp.{name}_proj.weight", (FFN, HIDDEN)) for name in ("gate", "up")),
        ("mlp.down_proj.weight", (HIDDEN, FFN)),
        *((f"{name}_layernorm.weight", (HIDDEN,)) for name in ("input", "post_attention")),
    ]
    layers = int(size / 2 / (2 * sum(torch.Size(shape).numel() for _, shape in layer)))
    vocabulary = int(size / 4 / (2 * HIDDEN)) // 128 * 128
    if layers < 1 or vocabulary < 128:
        raise ValueError(f"--size {size / 1e9} GB is less than a layer of the model: give at least 0.2.")
    tensors = [("model.embed_tokens.weight", (vocabulary, HIDDEN))]
    tensors += [(f"model.layers.{number}.{name}", shape) for number in range(layers) for name, shape in layer]
    tensors += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (vocabulary, HIDDEN))]
    folder.mkdir()
    noise = torch.randint(256, (BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    entries = [Entry(name, shape, partial(_noise, noise, 2 * torch.Size(shape).numel())) for name, shape in tensors]
    write_weights(folder, entries, "bfloat16", lambda count: None, shard_size)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)


def _rows() -> dict[str, int]:
    keys = HIDDEN // HEADS * GROUPS
    return {"q": HIDDEN, "k": keys, "v": keys, "o": HIDDEN}


def _noise(noise: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    for first in range(0, nbytes, BLOCK):
        yield noise[: min(BLOCK, nbytes - first)].view(torch.bfloat16)


def _copy(source: Path, pattern: str, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.glob(pattern)):
        shutil.copyfile(file, target / file.name)
        sync(target / file.name)


def _measured(run: Callable[[], object], out: Path) -> tuple[float, int, float]:
    """Seconds, the peak of resident memory, and seconds of all cores."""
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the time before
    start, used = time.perf_counter(), time.process_time()
    run()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = peak_resident_bytes()
    shutil.rmtree(out)
    return seconds, peak, used
