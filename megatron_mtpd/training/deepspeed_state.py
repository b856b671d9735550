"""ZeRO's weights and optimizer state as tensors of a `torch_dist` checkpoint, and back.

The layout is that of Megatron's distributed optimizer, fully reshardable: every parameter, its fp32 weight and Adam's
moments under their own names, whatever the number of ranks and the ZeRO stage. So extension, export, another layout and
the other engine read it.

ZeRO keeps a piece of every tensor on each data-parallel rank. In a checkpoint a tensor has one owner among these ranks:
it is gathered, one at a time, and only its owner keeps it, on the CPU, to write it; reading goes the other way. So a
rank needs CPU memory for its share of the model, and all of them write and read.

A leaf is Megatron's ShardedTensor or ShardedTensorFactory of a parameter, which says what part of the whole tensor
this tensor-parallel rank has. All functions are collective over the data-parallel group.

Deliberately absent: DeepSpeed's own checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor, nn

from megatron_mtpd.checkpoint.metadata import CheckpointError

WEIGHT = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
_LAYOUT = "fully_reshardable"
_GROUP_KEYS = {"lr", "betas", "eps", "weight_decay", "max_lr", "min_lr", "default_config", *param_group_identifier_keys}
"""Of a parameter group, what Megatron's optimizers have too."""


def _in_pieces(parameter: Any) -> bool:
    return hasattr(parameter, "ds_shape")


def _shape(parameter: Any) -> torch.Size:
    return parameter.ds_shape if _in_pieces(parameter) else parameter.shape


@contextmanager
def whole_shapes(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters in pieces, which are empty by themselves, show their whole shape, for code that only looks."""
    kept = [(parameter, parameter.data) for parameter in parameters if _in_pieces(parameter)]
    for parameter, data in kept:
        parameter.data = data.new_empty(()).expand(_shape(parameter))
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _parameters(leaves: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """The parameters among the leaves, by name; other leaves are buffers and extra state."""
    return {name: leaf.data for name, leaf in leaves.items() if isinstance(leaf.data, nn.Parameter)}


def _owners(parameters: Mapping[str, nn.Parameter], ranks: int) -> dict[str, int]:
    """The data-parallel rank that keeps each: the largest first, to who has least. The same on every rank."""
    load = [0] * ranks
    owners = {}
    for name in sorted(parameters, key=lambda name: (-_shape(parameters[name]).numel(), name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += _shape(parameters[name]).numel()
    return owners


def _first_copy(leaf: Any, **changes: Any) -> Any:
    """The leaf as the copy that is written, instead of that of the first data-parallel rank."""
    return replace(leaf, replica_id=(*leaf.replica_id[:-1], 0), **changes)


def _gathered(parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank) if _in_pieces(parameter) else nullcontext()


# Weights ---------------------------------------------------------------------------------------------------------


def sharded_weights(leaves: Mapping[str, Any], group: dist.ProcessGroup) -> dict[str, Any]:
    """The leaves to save or load on this rank: of parameters in pieces those that it owns, whole, on the CPU."""
    parameters = {name: p for name, p in _parameters(leaves).items() if _in_pieces(p)}
    owners = _owners(parameters, group.size())
    result = {name: leaf for name, leaf in leaves.items() if name not in parameters}
    for name, parameter in parameters.items():
        with _gathered(parameter):
            if owners[name] == group.rank():
                result[name] = _first_copy(leaves[name], data=parameter.data.detach().cpu().clone())
    return result


def load_weights(
    module: nn.Module, leaves: Mapping[str, Any], loaded: Mapping[str, Any], group: dist.ProcessGroup, strict: bool
) -> None:
    """Put into `module` what was read into `sharded_weights` of the same leaves."""
    parameters = {name: p for name, p in _parameters(leaves).items() if _in_pieces(p)}
    owners = _owners(parameters, group.size())
    for name, parameter in parameters.items():
        with _gathered(parameter, owners[name]), torch.no_grad():
            if owners[name] == group.rank():
                parameter.data.copy_(loaded[name])
    rest = {name: value for name, value in loaded.items() if name not in parameters}
    module.load_state_dict(rest, strict=strict and not parameters)


# Optimizer -------------------------------------------------------------------------------------------------------


def check_layout(metadata: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError when a checkpoint with that content metadata has its optimizer state in another layout."""
    found = (metadata or {}).get("distrib_optim_sharding_type")
    if found != _LAYOUT:
        raise CheckpointError(
            f"--load: the optimizer state in the checkpoint is {found or 'not that of a distributed optimizer'}, and "
            f"--engine deepspeed reads {_LAYOUT}: add --no-load-optim to start with the weights alone, or let Megatron "
            "save with --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable."
        )


def sharded_optimizer(
    zero: Any, leaves: Mapping[str, Any], group: dist.ProcessGroup, is_loading: bool
) -> dict[str, Any]:
    """What to save (`is_loading`: where to load) of the optimizer `zero`, a ZeROOptimizer of any stage.

    Returns {"optimizer": {"param_groups": ...}, "param_state": {name: {"param", "exp_avg", "exp_avg_sq": leaf}}, ...},
    all leaves fp32, those that this rank owns.
    """
    parameters = {name: p for name, p in _parameters(leaves).items() if p.requires_grad}
    owners = _owners(parameters, group.size())
    if not is_loading:
        _link(zero)
    param_state: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key in (WEIGHT, *MOMENTS):
            gathered = None if is_loading else _get(parameter, key).view(_shape(parameter))
            if owners[name] == group.rank():
                tensor = torch.empty(_shape(parameter)) if gathered is None else gathered.cpu()
                leaf = make_sharded_optimizer_tensor(leaves[name], tensor, f"optimizer.state.{key}")
                param_state.setdefault(name, {})[key] = _first_copy(leaf)
    groups = [{k: v for k, v in g.items() if k in _GROUP_KEYS} for g in zero.param_groups]
    extra = {"bias_correction": True, "step": 0 if is_loading else _step(zero)}
    return {
        "optimizer": {"param_groups": [group | extra for group in groups]},
        "param_state": param_state,
        "param_state_sharding_type": _LAYOUT,
    }


def load_optimizer(zero: Any, leaves: Mapping[str, Any], loaded: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Put into `zero` what was read into `sharded_optimizer(is_loading=True)` of the same leaves."""
    parameters = {name: p for name, p in _parameters(leaves).items() if p.requires_grad}
    owners = _owners(parameters, group.size())
    _make_state(zero, int(loaded["optimizer"]["param_groups"][0]["step"]))
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    for name, parameter in parameters.items():
        source = dist.get_global_rank(group, owners[name])
        for key in (WEIGHT, *MOMENTS):
            value = torch.empty(_shape(parameter), device=device)
            if owners[name] == group.rank():
                value.copy_(loaded["param_state"][name][key])
            dist.broadcast(value, source, group)
            _set(parameter, key, value, group)


def _get(parameter: nn.Parameter, key: str) -> Tensor:
    full = safe_get_full_fp32_param(parameter) if key == WEIGHT else safe_get_full_optimizer_state(parameter, key)
    assert full is not None, "a trained parameter has optimizer state"
    return full


def _set(parameter: Any, key: str, value: Tensor, group: dist.ProcessGroup) -> None:
    if not _in_pieces(parameter):
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    numel = parameter.ds_tensor.numel()  # of a piece; the last one is filled up
    flat = nn.functional.pad(value.flatten(), (0, numel * group.size() - value.numel()))
    piece = flat.narrow(0, numel * group.rank(), numel)
    if key == WEIGHT:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, key)


def _flat_weights(zero: Any) -> list[Tensor]:
    """The fp32 pieces that the optimizer inside ZeRO updates, whose state has them as keys."""
    in_pieces = getattr(zero, "fp32_partitioned_groups_flat", None)  # stage 3
    return in_pieces if in_pieces is not None else [p for g in zero.optimizer.param_groups for p in g["params"]]


def _step(zero: Any) -> int:
    return int(zero.optimizer.state[_flat_weights(zero)[0]]["step"])


def _make_state(zero: Any, step: int) -> None:
    """Adam's state as after `step` steps, its moments yet to be filled; DeepSpeed makes it in the first step."""
    of_torch = isinstance(zero.optimizer, torch.optim.Adam)  # AdamW is one
    for weight in _flat_weights(zero):
        zero.optimizer.state[weight] = {
            "step": torch.tensor(float(step)) if of_torch else step,
            **{moment: torch.zeros_like(weight.data) for moment in MOMENTS},
        }
    _link(zero)


def _link(zero: Any) -> None:
    """Let every parameter know its moments. At stages 1 and 2 DeepSpeed does it once, after the first update of the
    first parameter group, when those of the other groups do not exist."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
