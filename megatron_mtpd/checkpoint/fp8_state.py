"""Scales and amax histories of FP8 training in a checkpoint, which are pickles, read before they are trusted.

With delayed scaling Transformer Engine keeps the state of each linear layer as a pickle, and 2.20 loads one only where
`NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE` says that it comes from a trusted source, because a pickle can run code.
`problems` reads them all without running anything (see `pickles`): one that names nothing but tensors and the recipe
cannot run code. Other recipes keep no state.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_mtpd.checkpoint import pickles
from megatron_mtpd.checkpoint.common_state import read_payload
from megatron_mtpd.checkpoint.metadata import CheckpointError, Metadata

ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_RECIPE = "transformer_engine.common.recipe"
_STORAGES = "torch.storage._load_from_bytes", "megatron.core.safe_globals.safe_load_from_bytes"
"""Of bytes that are pickles themselves; Megatron puts its own in the place of torch's."""
_ACCEPTED = (
    "megatron.core.extensions.transformer_engine.TEDelayedScaling",
    *(f"{_RECIPE}.{name}" for name in ("DelayedScaling", "Format", "_FormatHelper")),
    *("torch._utils._rebuild_tensor_v2", "torch.Size", "torch.device", *_STORAGES),
    *(f"torch.{dtype}Storage" for dtype in ("Float", "BFloat16", "Half", "Byte")),
    *(f"torch.{dtype}" for dtype in ("float32", "bfloat16", "float16", "uint8")),
    "torch.storage.UntypedStorage",
)
"""Exact names: what lies below a module may be another module's."""
_PARTS = 5
"""Pickles at the start of a storage's bytes (torch's old format): magic number, version, system, storage, keys."""


def problems(checkpoint: Metadata, share: tuple[int, int] = (0, 1)) -> list[str]:
    """The states that could run code, and what they name; of `share` = (i, n) the i-th of n parts. Raises
    CheckpointError for a file that cannot be read."""
    keys = sorted(key for key in checkpoint.objects if "._extra_state" in key)
    found = []
    for key in keys[share[0] :: share[1]]:
        try:
            for state in _states(read_payload(checkpoint.directory, checkpoint.objects[key])):
                _inspect(pickles.loads(state, _ACCEPTED))
        except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
            found.append(f"{key}: {error}")
    return found


def refuse(checkpoint: Metadata, found: list[str]) -> None:
    """Raises CheckpointError where `problems` found some."""
    if found:
        raise CheckpointError(
            f"{checkpoint.directory}: the FP8 state {found[0]}. Loading it could run code: set {ALLOW}=1 if you trust "
            "where it comes from, or load weights alone by a recipe without state (--fp8-recipe tensorwise)."
        )


def _states(archived: bytes) -> Iterator[bytes]:
    """The pickles in what `torch.save` wrote, each the bytes of a tensor; none where a layer has no state."""
    with zipfile.ZipFile(io.BytesIO(archived)) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size:
                yield archive.read(record)


def _inspect(value: Any) -> None:
    """Look into the storages of a state. Raises pickle.UnpicklingError for a name that has no business there."""
    if isinstance(value, pickles.Inert):
        if ".".join(value.global_name) in _STORAGES:
            for data in value.arguments:
                pickles.loads_parts(data, _PARTS, _ACCEPTED)
        _inspect([*value.arguments, vars(value)])
    elif isinstance(value, dict):
        _inspect(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for part in value:
            _inspect(part)
