"""Checkpoints of Megatron's GPTModel, with heads or without, loaded into our model, which is a HybridModel.

A layer of GPTModel is attention and MLP in one; a HybridModel has a layer for each. Megatron-Core 0.19 loads the
trunk of such a checkpoint into a HybridModel (`gpt_checkpoint_interop`: our tensors are looked up under the names that
they have there, weights and optimizer state alike), and refuses models with heads. What is added here is the heads:

    ours     mtp.layers.K.mtp_model_layer.layers.N.self_attention...
    theirs   mtp.layers.K.transformer_layer.self_attention...

Heads that the checkpoint does not have keep the values that they were initialised with: a trunk without heads gets
them this way. Absent on purpose: writing checkpoints of GPTModel; what training saves is in our layout.
"""

from __future__ import annotations

import functools
import logging
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.dist_checkpointing import gpt_checkpoint_interop
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.gpt_checkpoint_interop import GPTCompatLayerMaps
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

_OUR_BLOCK = re.compile(r"(?<=mtp\.layers\.)(\d+)\.mtp_model_layer\.layers\.\d+\.")
_HEAD = re.compile(r"(?<![^.])mtp\.layers\.(\d+)\.")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerMaps(GPTCompatLayerMaps):
    """Megatron's pairs of layers, and how many heads the checkpoint has."""

    num_heads: int


def pairs_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `megatron.training.checkpointing._maybe_setup_gpt_to_hybrid_load(args, ckpt_args, model)`.

    Returns what it returns, (None, False) for checkpoints of a HybridModel, else the pairs of layers with the number
    of heads, and whether the optimizer state is loaded. Without heads there is none for them: a warning says so.
    """

    @functools.wraps(original)
    def setup(args: Any, ckpt_args: Any, model: Any) -> Any:
        pattern = args.hybrid_layer_pattern
        args.hybrid_layer_pattern = trunk_pattern(pattern)
        try:
            layer_maps, load_optim = original(args, ckpt_args, model)
        finally:
            args.hybrid_layer_pattern = pattern
        return (None if layer_maps is None else with_heads(layer_maps, ckpt_args)), load_optim

    return setup


def trunk_pattern(pattern: str | None) -> str | None:
    """The layer pattern without its heads."""
    return pattern.split("/")[0] if pattern else pattern


def with_heads(layer_maps: GPTCompatLayerMaps, ckpt_args: Any) -> LayerMaps:
    """Megatron's pairs of layers, with the number of heads that the checkpoint's arguments tell."""
    pairs = {field.name: getattr(layer_maps, field.name) for field in fields(GPTCompatLayerMaps)}
    return LayerMaps(**pairs, num_heads=getattr(ckpt_args, "mtp_num_layers", None) or 0)


def retargets_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `gpt_checkpoint_interop.retarget_sharded_state_dict_to_gpt_checkpoint(sharded_state_dict, layer_maps)`."""

    @functools.wraps(original)
    def retarget(sharded_state_dict: Any, layer_maps: GPTCompatLayerMaps) -> None:
        original(sharded_state_dict, layer_maps)
        if not isinstance(layer_maps, LayerMaps):
            return
        fresh: set[int] = set()

        def entry_of_head(entry: Any) -> Any:
            head = _HEAD.search(entry.key) if isinstance(entry, ShardedBase) else None
            if head is None:
                return entry
            if int(head[1]) >= layer_maps.num_heads:
                fresh.add(int(head[1]) + 1)
                return LocalNonpersistentObject(entry.data)
            entry.key = _OUR_BLOCK.sub(r"\1.transformer_layer.", entry.key)
            return entry

        dict_list_map_inplace(entry_of_head, sharded_state_dict)
        if fresh:
            logger.warning(
                "The checkpoint has %s heads: heads %s start from scratch.",
                layer_maps.num_heads or "no",
                ", ".join(map(str, sorted(fresh))),
            )

    return retarget


def retarget(sharded_state_dict: Any, pattern: str, ckpt_args: Namespace) -> None:
    """Look a model's tensors up under the names of a GPTModel checkpoint with those arguments, in place.

    `pattern` is the layer pattern of the model, heads included. Raises ValueError where its trunk has no counterpart
    in a GPTModel.
    """
    maps = gpt_checkpoint_interop.gpt_compatible_layer_maps(trunk_pattern(pattern) or "")
    gpt_checkpoint_interop.retarget_sharded_state_dict_to_gpt_checkpoint(
        sharded_state_dict, with_heads(maps, ckpt_args)
    )
