"""Looped extension of a checkpoint, as a plan: which old head each new head's weights come from, and what follows.

The K trained heads, in order, initialise heads K+1, K+2, ... (arXiv 2603.23911); any other choice of sources,
or fewer heads, is a pattern too. A head's tensors have keys of their own, and a key says which bytes it
means: a new head is new keys for old bytes. So this is pure bookkeeping: no tensor is read, whatever the
parallel layout the checkpoint was saved with, and the copy becomes one of its own when training first saves
it.

Optimizer state is kept by parameter or in buckets. By parameter (every optimizer but the distributed one; the
distributed one with `--dist-ckpt-optim-fully-reshardable`) it can be kept for what existed: new heads get
their source's master weights and zero moments. Buckets mix the parameters of a rank, so state in them cannot
be kept. Dropping it makes the result a `release` checkpoint, which Megatron loads as weights alone, starting
at iteration 0 without further flags.

Absent on purpose: writing anything (see `extend`), and heads that share one layer
(`--mtp-use-repeated-layer`), which have nothing to copy.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint import pickles
from megatron_mtpd.checkpoint.common_state import KEY, CommonState, archive, read_common_state
from megatron_mtpd.checkpoint.integrity import verify
from megatron_mtpd.checkpoint.iterations import RELEASE, Iteration, resolve
from megatron_mtpd.checkpoint.metadata import (
    ITEM_SIZES,
    CheckpointError,
    Metadata,
    head_of,
    is_optimizer,
    optimizer_slot,
    read_metadata,
    size,
    with_head,
)

_MASTER_WEIGHTS = {"param", "fp32_param", "master_param"}
_MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
_OF_A_RUN = ("rng_state/", "rerun_state_machine_state/")
_STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}

type Replacement = Callable[[tuple[int, ...], tuple[int, ...]], bytes]
"""What `torch.save` writes of the part of a tensor that begins at an offset and has a size."""


@dataclass(frozen=True)
class Plan:
    """What is to become of a checkpoint. New head k has the weights of old head `sources[k]`, both from 0."""

    source: Metadata
    sources: tuple[int, ...]
    keep_optimizer: bool
    iteration: Iteration
    replaced: Mapping[str, Replacement] = field(default_factory=dict)
    """By key of the new checkpoint: tensors that get other values, of the same shape and dtype."""

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for new, old in enumerate(self.sources):
            children.setdefault(old, []).append(new)
        return children

    def keys(self, key: str) -> Iterator[tuple[str, bool]]:
        """The keys that an old key becomes, and whether their value is fresh (zero) instead of the old one."""
        dropped = (is_optimizer(key) and not self.keep_optimizer) or (
            self.iteration == RELEASE and key.startswith(_OF_A_RUN)
        )
        head = head_of(key)
        if dropped:
            return
        # Interned, because a pickle holds an object once, however often it is used.
        if head is None:
            yield sys.intern(key), False
            return
        for new in self._children.get(head, ()):
            yield sys.intern(with_head(key, new)), new != head and optimizer_slot(key) in _MOMENTS

    @cached_property
    def entries(self) -> list[tuple[Any, Any]]:
        """Index and place of all that the new checkpoint holds: a stand-in of torch's storage info where the
        bytes exist already, bytes where they have to be written.
        """
        sizes, found = self._chunk_sizes(), []
        for index, info in self.source.raw.storage_data.items():
            if index.fqn == KEY:
                found.append((index, self.common_state()))
                continue
            for key, fresh in self.keys(index.fqn):
                new_index = index if key is index.fqn else changed(index, fqn=key)
                if key in self.replaced:
                    offset = size(index.offset)
                    found.append((new_index, self.replaced[key](offset, sizes[index.fqn, offset])))
                elif fresh:
                    dtype = self.source.tensors[index.fqn].dtype
                    found.append((new_index, zeros(dtype, sizes[index.fqn, size(index.offset)])))
                else:
                    found.append((new_index, info))
        return found

    def _chunk_sizes(self) -> dict[tuple[str, tuple[int, ...]], tuple[int, ...]]:
        return {
            (key, size(chunk.offsets)): size(chunk.sizes)
            for key, stored in self.source.raw.state_dict_metadata.items()
            if optimizer_slot(key) in _MOMENTS or key in self.replaced
            for chunk in stored.chunks
        }

    def metadata(self, storage_data: dict[Any, Any]) -> bytes:
        """The new `.metadata`, for entries that are where `storage_data` says."""
        raw = self.source.raw
        equal: dict[Any, Any] = {}  # one object for equal descriptions, again because a pickle holds it once
        tensors = {
            new: equal.setdefault(_content(stored), stored)
            for key, stored in raw.state_dict_metadata.items()
            for new, _ in self.keys(key)
        }
        # How the source was flattened and planned, which older versions stored and no load of a whole key needs.
        new = changed(raw, state_dict_metadata=tensors, storage_data=storage_data, planner_data=None)
        vars(new).pop("all_local_plans", None)
        return pickles.dumps(new)

    def common_state(self) -> bytes:
        """The stored arguments and the state of the run, with what the plan changes."""
        state = read_common_state(self.source)
        args, values, old = state.args, state.values, self.source.num_heads
        if "mtp_num_layers" in args:
            args["mtp_num_layers"] = len(self.sources)
        if args:  # what `--mtpd-train new-heads` leaves as it is
            args["mtpd_old_heads"] = self.old_heads
        if args.get("hybrid_layer_pattern"):
            args["hybrid_layer_pattern"] = self.layer_pattern(args["hybrid_layer_pattern"])
        for name, value in args.items():  # one weight per head
            if name.startswith("mtpd_") and isinstance(value, list) and len(value) == old > 1:
                args[name] = [value[head] for head in self.sources]
        if not self.keep_optimizer:
            values.pop("optimizer", None)
            args["no_save_optim"] = True
        if self.iteration == RELEASE:
            for name in ("opt_param_scheduler", "rerun_state_machine"):
                values.pop(name, None)
            values["num_floating_point_operations_so_far"] = 0
            for name in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
                args[name] = 0
        values["iteration"] = 0 if self.iteration == RELEASE else self.iteration
        return state.serialized()

    @property
    def old_heads(self) -> int:
        """How many heads, from the first, are what they were, in front of others that are copies; 0 without copies."""
        kept = next((k for k, old in enumerate(self.sources) if old != k), len(self.sources))
        return kept if kept < len(self.sources) else 0

    def layer_pattern(self, pattern: str) -> str:
        """The hybrid layer pattern with the new heads; unchanged where it describes the main model alone."""
        main, *heads = pattern.split("/")
        return "/".join([main, *(heads[old] for old in self.sources)]) if heads else pattern


def parse_pattern(text: str) -> list[int]:
    """The sources in `1,2,2`. Raises ValueError naming the option."""
    try:
        return [int(head) for head in text.split(",")]
    except ValueError:
        raise ValueError(f"--pattern is {text!r}: give heads, counted from 1, with commas between them.") from None


def make_plan(
    load: Path,
    num_heads: int | None = None,
    pattern: Sequence[int] | None = None,
    ckpt_step: int | None = None,
    keep_optimizer: bool = False,
    iteration: int | None = None,
) -> Plan:
    """Plan an extension of a checkpoint, and check that it is possible.

    `load` is a run's directory, or that of one checkpoint. `pattern` holds the source of each new head, counted from 1;
    the default repeats all heads in order until there are `num_heads`. `iteration` is the one to store; the default is
    the source's with its optimizer state, and none (`release`) without. Raises ValueError naming the option, or
    CheckpointError naming the file, before anything is written.
    """
    saved_at, directory = resolve(load, ckpt_step)
    source = read_metadata(directory)
    problems = verify(directory, full=False, metadata=source)
    if problems:
        raise CheckpointError(f"{directory} cannot be extended: {problems[0]}. Load another with --ckpt-step.")
    state = read_common_state(source)
    old = _check_heads(source, state)
    if pattern is None and num_heads is None:
        raise ValueError("--num-heads is missing: say how many heads the new checkpoint has, or give --pattern.")
    if pattern is None:
        if num_heads is None or num_heads < 1:
            raise ValueError(f"--num-heads is {num_heads}: give a number of at least 1.")
        pattern = [k % old + 1 for k in range(num_heads)]
    if num_heads not in (None, len(pattern)):
        raise ValueError(f"--pattern names {len(pattern)} heads, --num-heads is {num_heads}: leave out one of them.")
    wrong = [head for head in pattern if not 1 <= head <= old]
    if wrong or not pattern:
        raise ValueError(f"--pattern names head {wrong[:1]}: the checkpoint has heads 1 to {old}.")
    if keep_optimizer:
        _check_optimizer(source, {head - 1 for head in pattern})
    if iteration is not None and iteration < 0:
        raise ValueError(f"--iteration is {iteration}: give a number of at least 0.")
    kept = state.values.get("iteration", saved_at) if keep_optimizer else RELEASE
    return Plan(source, tuple(head - 1 for head in pattern), keep_optimizer, kept if iteration is None else iteration)


def _check_heads(source: Metadata, state: CommonState) -> int:
    heads, args = source.num_heads, state.args
    if heads == 0:
        raise CheckpointError(
            f"{source.directory} has no multi-token prediction heads: no tensor's key has mtp.layers."
        )
    if args.get("mtp_use_repeated_layer"):
        raise CheckpointError(
            f"{source.directory} was trained with --mtp-use-repeated-layer: all its heads are one layer. "
            "There is nothing to copy; train or benchmark it with another --mtp-num-layers."
        )
    parts = (args.get("hybrid_layer_pattern") or "").split("/")[1:]
    stored = {"mtp_num_layers": args.get("mtp_num_layers"), "hybrid_layer_pattern": len(parts) or None}
    for name, number in stored.items():
        if number not in (None, heads):
            raise CheckpointError(
                f"{source.directory / state.source}: the stored {name} speaks of {number} heads, but the "
                f"checkpoint has the weights of {heads}."
            )
    return heads


def _check_optimizer(source: Metadata, heads: set[int]) -> None:
    slots = {optimizer_slot(key) for key in source.tensors if is_optimizer(key)}
    if not slots:
        raise ValueError(f"--keep-optimizer: {source.directory} has no optimizer state. Leave it out.")
    if None in slots:
        raise ValueError(
            f"--keep-optimizer: the optimizer state in {source.directory} is in buckets that mix parameters. Save it "
            "with --dist-ckpt-optim-fully-reshardable, or leave out --keep-optimizer to start with a fresh one."
        )
    frozen = heads - {head_of(key) for key in source.tensors if is_optimizer(key)}
    if frozen:
        raise ValueError(
            f"--keep-optimizer: head {min(frozen) + 1} in {source.directory} was frozen and has no optimizer state. "
            "Leave it out to start with a fresh one."
        )
    unknown = slots - _MASTER_WEIGHTS - _MOMENTS
    if unknown:
        raise ValueError(
            f"--keep-optimizer: it is not known how to start {', '.join(sorted(map(str, unknown)))} of a new head. "
            "Leave it out to start with a fresh optimizer."
        )


def _content(stored: Any) -> Any:
    """What two descriptions of tensors have to agree in to be the same."""
    if not hasattr(stored, "chunks"):
        return repr(stored)
    chunks = tuple((size(chunk.offsets), size(chunk.sizes)) for chunk in stored.chunks)
    return size(stored.size), repr(stored.properties._state), chunks


def changed(instance: Any, **attributes: Any) -> Any:
    """A copy of a stand-in's instance with other attributes."""
    copy = type(instance).__new__(type(instance), *instance.arguments)
    copy.__setstate__(vars(instance) | attributes)
    return copy


@cache
def zeros(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What `torch.save(torch.zeros(1, dtype=dtype).expand(shape))` writes: one element that stands for all."""
    storage = pickles.Storage(("storage", pickles.inert_class("torch", _STORAGES[dtype]), "0", "cpu", 1))
    rebuild = pickles.inert_class("torch._utils", "_rebuild_tensor_v2")
    tensor = rebuild(storage, 0, shape, (0,) * len(shape), False, OrderedDict())
    members = {"data.pkl": pickles.dumps(tensor), "byteorder": b"little", "version": b"3\n"}
    return archive({f"archive/{name}": data for name, data in (members | {"data/0": bytes(ITEM_SIZES[dtype])}).items()})
