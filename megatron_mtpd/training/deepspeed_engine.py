"""`--engine deepspeed`: what Megatron's training loop takes for its model and optimizer, over a DeepSpeed engine.

The loop stays Megatron's: it calls the model for every micro-batch, `backward` on the loss, then `step` of the
optimizer.
`DeepSpeedModel` stands where Megatron's DDP stands, `DeepSpeedOptimizer` where its optimizer does. The engine counts
nothing (managed_gradient_accumulation is off), so that `step` ends the accumulation whenever the loop calls it. Weights
and optimizer state are saved in `torch_dist` checkpoints like those of Megatron's distributed optimizer
(`deepspeed_state`), so nothing else in the package, nor a run with the other engine, needs to know.

At ZeRO stage 3 the model is built in pieces (zero.Init): no rank ever holds all of it.

Deliberately absent: what `deepspeed_config` refuses.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from megatron.core.optimizer import _get_param_groups
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mtpd.model import MTPDModelBuilder, MTPDModelConfig
from megatron_mtpd.training import deepspeed_state as state


@dataclass(kw_only=True)
class DeepSpeedModelConfig(MTPDModelConfig):
    """MTPDModelConfig, and the configuration that the engine is given (`deepspeed_config`)."""

    builder: ClassVar[str] = "megatron_mtpd.training.deepspeed_engine.DeepSpeedModelBuilder"
    deepspeed: dict[str, Any] = field(default_factory=dict)


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """`config`, whose zero_optimization DeepSpeed itself accepts. Raises ValueError with key and value if not."""
    try:
        DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValueError as error:  # pydantic's, which knows more than it says
        wrong = error.errors()[0]  # type: ignore[attr-defined]
        key = ".".join(str(part) for part in wrong["loc"])
        raise ValueError(
            f"zero_optimization.{key} in --deepspeed-config, {wrong['input']!r}, is not accepted by DeepSpeed: "
            f"{wrong['msg']}."
        ) from error
    return config


class DeepSpeedModelBuilder(MTPDModelBuilder):
    """Builds the model without Megatron's DDP, at ZeRO stage 3 in pieces, and wraps it for the loop."""

    def build_distributed_models(
        self, pg_collection: ProcessGroupCollection, ddp_config: Any = None, **kwargs: Any
    ) -> list[DeepSpeedModel]:  # type: ignore[override]
        """The one chunk of the model, wrapped. Arguments as Megatron's."""
        if not comm.is_initialized():
            comm.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        config = self._model_config
        in_pieces = nullcontext()
        if config.deepspeed["zero_optimization"]["stage"] == 3:
            # The parameters already have the right type and device: Megatron makes them with both.
            in_pieces = deepspeed.zero.Init(
                data_parallel_group=pg_collection.dp_cp,
                config_dict_or_path=config.deepspeed,
                mpu=_Groups(pg_collection),
                tensor_overrides=[],
            )
        with in_pieces:
            kwargs |= {"ddp_config": ddp_config, "wrap_with_ddp": False}
            (chunk,) = super().build_distributed_models(pg_collection, **kwargs)
        config.transformer.finalize_model_grads_func = _reduced_by_zero
        return [DeepSpeedModel(chunk, config.deepspeed, pg_collection, ddp_config.check_for_nan_in_grad)]


def _reduced_by_zero(*args: Any, **kwargs: Any) -> None:
    """For Megatron's finalize_model_grads: without pipeline, sequence and expert parallelism it only reduces."""


class _Groups:
    """Megatron's process groups under the names that DeepSpeed asks an `mpu` for."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        for name, group in {"data": groups.dp_cp, "model": groups.tp, "tensor_model": groups.tp}.items():
            for what, value in {"group": group, "rank": group.rank(), "world_size": group.size()}.items():
                setattr(self, f"get_{name}_parallel_{what}", lambda value=value: value)


class DeepSpeedModel(nn.Module):
    """A model chunk whose forward goes through a DeepSpeed engine.

    Args:
        chunk: the model, in Float16Module with bf16.
        config: of DeepSpeed.
        groups: Megatron's process groups.
        check_for_nan_in_grad: end the run at a gradient that is not finite, as Megatron's DDP does.

    The engine comes into being with the optimizer (`build_optimizer`), which it needs.
    """

    def __init__(
        self, chunk: nn.Module, config: dict[str, Any], groups: ProcessGroupCollection, check_for_nan_in_grad: bool
    ) -> None:
        super().__init__()
        self.module = chunk
        self.force_all_reduce = False  # set by the loop
        self._config = config
        self.groups = groups
        self.check_for_nan_in_grad = check_for_nan_in_grad
        self._engine: list[Any] = []  # in a list, because the engine is a module around ours

    @property
    def engine(self) -> Any:
        """The DeepSpeedEngine."""
        return self._engine[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's."""
        return self.engine(*args, **kwargs)

    def zero_grad_buffer(self) -> None:
        """Megatron's DDP has one; ZeRO empties its buffers in `step`."""

    def build_optimizer(self, config: Any, config_overrides: Any = None, **kwargs: Any) -> DeepSpeedOptimizer:
        """In the place of `get_megatron_optimizer(config, [self], config_overrides, ...)`: Megatron's parameter
        groups, in an optimizer that DeepSpeed builds and shards."""
        with state.whole_shapes(self.module.parameters()):
            groups = _get_param_groups([self], config, config_overrides)  # type: ignore[list-item]
        groups = [group | {"lr": config.lr} for group in groups if group["params"]]
        core: Any = unwrap_model(self.module)
        if self._config["zero_optimization"]["stage"] == 3:
            for weight in _used_elsewhere(core):
                deepspeed.zero.register_external_parameter(core, weight)
        engine, *_ = deepspeed.initialize(
            model=self.module, model_parameters=groups, config=self._config, mpu=_Groups(self.groups)
        )
        self._engine.append(engine)
        if self._config["zero_optimization"]["stage"] == 3:
            # The loss calls the output layer's hooks before it takes its weight (model.MTPDModel._output_weight), and
            # nothing ever calls those that follow. The model keeps the weight gathered, so it needs none of them.
            core.output_layer._forward_pre_hooks.clear()
            core.output_layer._forward_hooks.clear()
        return DeepSpeedOptimizer(self)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `torch_dist` saves and loads of the weights. Collective."""
        leaves = self.leaves(prefix, *args, **kwargs)
        return state.sharded_weights(leaves, self.groups.dp_cp)

    def leaves(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's sharded state dict with its parameters themselves as data, in their whole shapes."""
        with state.whole_shapes(self.module.parameters()):
            return self.module.sharded_state_dict(*args, **kwargs)  # type: ignore[operator]

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what was read into `sharded_state_dict`, and ZeRO's own fp32 weights from it. Collective."""
        state.load_weights(self.module, self.leaves(), state_dict, self.groups.dp_cp, strict)
        self.engine.optimizer.refresh_fp32_params()


def _used_elsewhere(core: Any) -> list[nn.Parameter]:
    """Weights that the loss takes from a module without running it."""
    weights = [core.output_layer.weight]
    if core.share_embeddings_and_output_weights:
        weights = [core.shared_embedding_or_output_weight()]
    return [weight for weight in weights if weight is not None]


class DeepSpeedOptimizer:
    """What Megatron's loop, schedule and checkpoints ask of an optimizer, answered by the engine of `model`."""

    is_stub_optimizer = False

    def __init__(self, model: DeepSpeedModel) -> None:
        self._model = model
        self._engine = model.engine

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With Megatron's keys; the schedule sets `lr` and `weight_decay` in them."""
        return self._engine.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: the engine's `step` has done it."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """`loss` itself: in bf16 and fp32 there is no scale."""
        return loss

    def get_loss_scale(self) -> Tensor:
        """1."""
        return torch.ones(1)

    def step(self) -> tuple[bool, float | None, None]:
        """Reduce what is not yet reduced, clip, update: (whether it was updated, gradient norm before clipping, None).

        Not updated is a step whose gradients are not finite: RuntimeError then, unless the run is to skip such steps.
        """
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        updated = self._engine.was_step_applied()
        if not updated and self._model.check_for_nan_in_grad:
            raise RuntimeError(
                "The gradients are not finite, in a step whose loss is. To skip such steps, add "
                "--no-check-for-nan-in-loss-and-grad."
            )
        return updated, float(norm) if updated and norm is not None else math.nan, None

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the fp32 weights from the model's."""
        self._engine.optimizer.refresh_fp32_params()

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's DistributedOptimizer saves it, fully reshardable. Collective."""
        if is_loading:
            state.check_layout(metadata)
        leaves = self._model.leaves(metadata=metadata)
        return state.sharded_optimizer(self._engine.optimizer, leaves, self._model.groups.dp_cp, is_loading)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what was read into `sharded_state_dict(is_loading=True)`. Collective."""
        state.load_optimizer(self._engine.optimizer, self._model.leaves(), state_dict, self._model.groups.dp_cp)
