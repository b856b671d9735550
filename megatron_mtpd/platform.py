"""What running without CUDA, or without Transformer Engine, takes; the only file that patches anything.

Contract: every entry point calls `setup()` first, before it imports `megatron`. Where CUDA is available it touches
almost nothing; where it is not, PyTorch answers Megatron's calls for a GPU with the CPU, on which the same training
loop then runs with gloo. Each patch is a row of a table that says what it replaces, what it expects to find there and
why; when the installed torch or megatron-core no longer matches, `setup()` says so and patches nothing.

Deliberately absent: anything about models (see `specs`), and any promise of speed on a CPU. Not possible without a
GPU: FP8, CUDA graphs, Megatron's own inference engine; `check_flags` refuses what asks for them.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.utils._device
from torch.optim.adam import adam

WRITTEN_FOR = "0.19.2"
"""Version of megatron-core that the patches were written for and tested with."""

DEVICES = Path("/dev")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """One replaced attribute.

    `make(original)` returns the replacement. `parameters` names what the original has to accept, because the
    replacement or its callers count on it; None where the original is not a Python function.
    """

    owner: str
    """Import path of the module, or module:Class, that holds the attribute."""
    attribute: str
    make: Callable[[Any], Any]
    why: str
    parameters: tuple[str, ...] | None = None

    def resolve(self) -> tuple[Any, Any]:
        """Import the owner and return it with the original. Raises RuntimeError when either is not as expected."""
        module, _, member = self.owner.partition(":")
        try:
            owner = importlib.import_module(module)
            owner = getattr(owner, member) if member else owner
            original = getattr(owner, self.attribute)
        except (ImportError, AttributeError) as error:
            raise self._changed(str(error)) from error
        if self.parameters is not None:
            found = inspect.signature(original).parameters
            missing = [name for name in self.parameters if name not in found]
            if missing:
                raise self._changed(f"it no longer takes {', '.join(missing)}")
        return owner, original

    def _changed(self, detail: str) -> RuntimeError:
        installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
        package = {"torch": "torch", "deepspeed": "deepspeed"}.get(self.owner.partition(".")[0], "megatron-core")
        return RuntimeError(
            f"Cannot patch {self.owner}.{self.attribute} ({self.why}): {detail}. Installed is {package} "
            f"{installed.get(package, '(none)')}; the patch was written for megatron-core {WRITTEN_FOR}. "
            f"Install megatron-core=={WRITTEN_FOR}, or adapt megatron_mtpd/platform.py."
        )


def uses_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and has a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


# --- torch without CUDA --------------------------------------------------------------------------------------


def unusable_gpus() -> str | None:
    """What is wrong where this machine has GPUs and torch can use none; None where that is not so, or where
    CUDA_VISIBLE_DEVICES hides them all."""
    found = len(list(DEVICES.glob("nvidia[0-9]*")))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not found or hidden or torch.cuda.is_available():
        return None
    built = f"is built for CUDA {torch.version.cuda}: its driver is too old" if torch.version.cuda else "is a CPU build"
    return (
        f"{found} GPUs are there, and torch {torch.__version__} can use none; it {built}, or they are broken. To run "
        "on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing."
    )


class _Stream:
    """Stands for the one stream of a CPU, and for its events: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or self

    def synchronize(self) -> None: ...


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


def _returns(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def _replace(value: Any) -> Callable[[Any], Any]:
    return lambda original: value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory whose `device="cuda"` means the CPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # of what is copied to a GPU
        return factory(*args, **kwargs)

    return on_cpu


def _named_as_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type()`, whose name Megatron's optimizers compare with `torch.cuda.FloatTensor`."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_


def _memory_stats(device: Any = None) -> dict[str, int]:
    """Bytes that the process holds, in the place of what the GPU's allocator holds."""
    now = psutil.Process().memory_info().rss
    peak = max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # the kernel updates it late
    stats = {"allocation.all.current": 0}
    for kind in ("allocated_bytes", "reserved_bytes"):
        stats |= {f"{kind}.all.current": now, f"{kind}.all.peak": peak}
    return stats


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    try:
        torch.default_generator.set_state(new_state)
    except RuntimeError as error:
        raise RuntimeError("A random state of a GPU cannot continue on a CPU: add --no-load-rng.") from error


_TORCH_WITHOUT_CUDA = (
    Patch("torch.cuda", "current_device", _returns(_CPU), "most tensors are made on it", ()),
    Patch("torch.cuda", "device_count", _returns(1), "process groups are made only where a device is", ()),
    Patch("torch.cuda", "set_device", _replace(_nothing), "there is one device", ("device",)),
    Patch("torch.cuda", "synchronize", _replace(_nothing), "timers and checkpoints wait", ("device",)),
    Patch("torch.cuda", "Stream", _replace(_Stream), "gradients and transfers have streams"),
    Patch("torch.cuda", "current_stream", _returns(_Stream()), "streams wait for it", ("device",)),
    Patch("torch.cuda", "stream", _replace(nullcontext), "work is queued on a stream", ("stream",)),
    Patch("torch.cuda", "memory_stats", _replace(_memory_stats), "TensorBoard shows it", ("device",)),
    Patch("torch.cuda.memory", "memory_stats", _replace(_memory_stats), "the log shows it", ("device",)),
    Patch("torch.cuda", "get_rng_state", _replace(_get_rng_state), "checkpoints keep it", ("device",)),
    Patch("torch.cuda.random", "get_rng_state", _replace(_get_rng_state), "dropout forks it", ("device",)),
    Patch("torch.cuda", "set_rng_state", _replace(_set_rng_state), "checkpoints restore it", ("new_state",)),
    Patch("torch.cuda", "manual_seed", _replace(torch.default_generator.manual_seed), "seeds", ("seed",)),
    Patch("torch:Tensor", "cuda", _replace(_itself), "batches move to the device"),
    Patch("torch.nn:Module", "cuda", _replace(_itself), "models move to the device", ("device",)),
    Patch("torch:Tensor", "type", _named_as_cuda, "optimizers compare type names"),
    Patch("torch", "tensor", _on_cpu, "losses and flags are made on the device named cuda"),
    Patch("torch", "zeros", _on_cpu, "sums start on the device named cuda"),
    Patch("torch", "empty", _on_cpu, "loading in parallel receives on the device named cuda"),
    Patch("torch", "empty_like", _on_cpu, "loading in parallel receives on the device named cuda"),
)

# --- Megatron without CUDA, without Transformer Engine -------------------------------------------------------


def _without_cuda(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(initialize_megatron, allow_no_cuda=True)


def _counts_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_MEGATRON_WITHOUT_CUDA = (
    Patch(
        "megatron.training.training",
        "initialize_megatron",
        _without_cuda,
        "pretrain() asserts that CUDA is available",
        ("allow_no_cuda",),
    ),
    Patch(
        "megatron.training.training",
        "set_jit_fusion_options",
        _replace(_nothing),
        "warms up fused kernels on a GPU",
        ("tp_size",),
    ),
    Patch(
        "megatron.training.arguments",
        "get_device_arch_version",
        _returns(10),
        "tensor parallelism asks it whether CUDA_DEVICE_MAX_CONNECTIONS matters; from 10 on it does not",
        (),
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _replace(_set_rng_state),
        "queued for a GPU that never starts",
        ("new_state", "device", "graph_safe"),
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _replace(_counts_on_cpu),
        "leaves the counts of tokens a tensor when they are on the CPU already; all-to-all wants an array",
        ("tensor", "as_numpy", "record_stream"),
    ),
)


def _only_with_makefile(compile_helpers: Callable[[], None]) -> Callable[..., None]:
    return compile_helpers if Path(inspect.getfile(compile_helpers)).with_name("Makefile").exists() else _nothing


class Adam(torch.optim.Optimizer):
    """torch's Adam with the state of the fused Adams of Transformer Engine and apex: one step count a group.

    Megatron's distributed optimizer saves torch's own Adam, but cannot load it. With this one the checkpoints of
    all machines are alike. `adam_w_mode` decouples the weight decay; `capturable` has no meaning here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            states = [self.state[p] for p in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                for moment in {"exp_avg", "exp_avg_sq"} - state.keys():
                    state[moment] = torch.zeros_like(parameter)
            taken = float(group.get("step", 0))
            adam(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(taken, device=p.device) for p in parameters],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self._decoupled,
            )
            group["step"] = int(taken) + 1


_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
_WITHOUT_FUSED_ADAM = (
    Patch("megatron.core.optimizer", "Adam", _replace(Adam), "the class that is built"),
    Patch("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", _replace(False), "it takes adam_w_mode"),
    Patch(_DISTRIBUTED, "Adam", _replace(Adam), "the class that is accepted"),
    Patch(_DISTRIBUTED, "HAVE_APEX_OR_TE", _replace(True), "its step count is in the group"),
    Patch(_DISTRIBUTED, "USING_APEX_OPTIMIZER", _replace(True), "its step count is in the group"),
)

_EVERYWHERE = (
    Patch(
        f"{_DISTRIBUTED}:DistributedOptimizer",
        "load_parameter_state_from_dp_reshardable",
        torch.no_grad(),
        "writes into parameters that require gradients when these are fp32",
        ("state_dict",),
    ),
    Patch(
        "megatron.core.datasets.utils",
        "compile_helpers",
        _only_with_makefile,
        "runs make, but the wheel holds the compiled helper and no Makefile",
        (),
    ),
    Patch(
        "megatron.training.training",
        "get_megatron_optimizer",
        lambda original: _remembered(original),
        "the loop has no hook that sees the optimizer, or makes another one",
        ("config", "model_chunks"),
    ),
    Patch(
        "megatron.core.dist_checkpointing",
        "save",
        lambda original: _checkpoint_seam().saves_whole(original),
        "a save leaves a manifest, and a killed one nothing that looks whole",
        ("sharded_state_dict", "checkpoint_dir", "async_sharded_save"),
    ),
    Patch(
        "megatron.training.checkpointing",
        "maybe_msc",
        lambda original: _checkpoint_seam().replaces_trackers(original),
        "the tracker is emptied and then written: a kill in between leaves an empty one",
    ),
    Patch(
        "megatron.training.training",
        "load_checkpoint",
        lambda original: _checkpoint_seam().loads_checked(original, _get_args, _verifies),
        "a damaged checkpoint is named, and the last good one offered, before anything is read",
        ("ddp_model", "load_arg"),
    ),
    Patch(
        "megatron.training.checkpointing",
        "_maybe_setup_gpt_to_hybrid_load",
        lambda original: _gpt_checkpoints().pairs_heads(original),
        "refuses to load a GPTModel checkpoint into a model with heads",
        ("args", "ckpt_args", "model"),
    ),
    Patch(
        "megatron.core.dist_checkpointing.gpt_checkpoint_interop",
        "retarget_sharded_state_dict_to_gpt_checkpoint",
        lambda original: _gpt_checkpoints().retargets_heads(original),
        "knows no heads",
        ("sharded_state_dict", "layer_maps"),
    ),
)


def patches() -> tuple[Patch, ...]:
    """The patches that this machine needs."""
    needed = () if torch.cuda.is_available() else _TORCH_WITHOUT_CUDA + _MEGATRON_WITHOUT_CUDA
    if not (uses_transformer_engine() or importlib.util.find_spec("amp_C")):
        needed += _WITHOUT_FUSED_ADAM
    return needed + _EVERYWHERE


_done = False


def setup() -> None:
    """Make Megatron run on this machine. Call it first, before `megatron` is imported; further calls do nothing.

    Raises RuntimeError, naming the patch and the versions, when the installed torch or megatron-core is not as
    expected; nothing is patched then.
    """
    global _done
    if _done:
        return
    # Megatron insists on it for tensor and context parallelism on GPUs before Blackwell; CUDA reads it when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        # Compiling Megatron's elementwise functions would take the first step 24 s, and gain nothing here.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_not_one_generator)
    with warnings.catch_warnings():
        # Megatron's modules say at import what they do without it; that is what we are here for.
        warnings.filterwarnings("ignore", r"(?i).*(transformer[ -]engine|apex)", UserWarning)
        resolved = [(patch, *patch.resolve()) for patch in patches()]
    for patch, owner, original in resolved:
        setattr(owner, patch.attribute, patch.make(original))
    _keep_device_contexts()
    _done = True


def _keep_device_contexts() -> None:
    """`with torch.device(...)` knows torch's own factories by identity, not what stands in their place now.

    Without this, transformers leaves uninitialised what it makes on the meta device, rotary frequencies among them.
    """
    constructors = torch.utils._device._device_constructors()
    constructors |= {inspect.unwrap(factory) for factory in constructors}


_DEEPSPEED_WITHOUT_CUDA = (
    Patch("deepspeed.comm.torch", "build_shm_op", _returns(None), "compiles an all-reduce for half a minute", ()),
)


def prepare_deepspeed() -> None:
    """Make DeepSpeed run on this machine. Call it after `setup()`, before `deepspeed` is imported elsewhere.

    Raises ValueError when it is not installed, RuntimeError as `setup()`.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("--engine deepspeed needs DeepSpeed: pip install 'megatron-mtpd[deepspeed]'.")
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for the variable even where no launcher has set it
    # It would set this to 1, and torch then count the devices that we feign.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"  # it would take the answers above for a GPU
    for patch, owner, original in [(patch, *patch.resolve()) for patch in _DEEPSPEED_WITHOUT_CUDA]:
        setattr(owner, patch.attribute, patch.make(original))


def _not_one_generator(record: logging.LogRecord) -> bool:
    """Drop the warning that the CPU's generator moved while the GPU's was in use: here they are one."""
    return "CPU RNG state changed" not in record.getMessage()


def replace_norm(norm: Callable[..., Any]) -> None:
    """Let Megatron's hybrid stack end in `norm(config=, hidden_size=, eps=)`: a norm that is not in its spec."""
    hybrid_block = "megatron.core.models.hybrid.hybrid_block"
    owner, _ = Patch(hybrid_block, "TENorm", _replace(norm), "the last norm of a stack").resolve()
    owner.TENorm = norm


# --- flags ---------------------------------------------------------------------------------------------------


def set_default_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give Megatron's parser the defaults that this machine needs, and return it; the user's flags still win.

    On a GPU with Transformer Engine only `--no-gradient-accumulation-fusion` can be among them: the output layer
    is a local module, for which that fusion takes NVIDIA's apex.
    """
    defaults: dict[str, Any] = {}
    if not torch.cuda.is_available():
        defaults |= {"distributed_backend": "gloo"}
    if not uses_transformer_engine():
        defaults |= {"transformer_impl": "local", "apply_rope_fusion": False}
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        defaults |= {"gradient_accumulation_fusion": False}
    parser.set_defaults(**defaults)
    return parser


@dataclass(frozen=True)
class _Needs:
    """A flag, and the values of it that need something."""

    flag: str
    refused: Callable[[Any], bool] = bool
    options: Mapping[str, Any] = field(default_factory=lambda: {"action": "store_true"})


_NEED_CUDA = (
    _Needs("--distributed-backend", lambda value: value == "nccl", {}),
    _Needs("--cuda-graph-impl", lambda value: value != "none", {}),
    _Needs("--enable-cuda-graph"),
    _Needs("--moe-token-dispatcher-type", lambda value: value == "flex", {}),
)
_GPUS = {(8, 9): "L40S, H100 and newer", (9, 0): "H100 and newer", (10, 0): "B200 and newer"}
_NEED_CAPABILITY = {
    (8, 9): (_Needs("--fp8-format", options={}),),
    (9, 0): (_Needs("--fp8-recipe", lambda value: value == "blockwise", {}),),
    (10, 0): (_Needs("--fp8-recipe", lambda value: value == "mxfp8", {}), _Needs("--fp4-format", options={})),
}
"""What Transformer Engine's kernels need of a GPU, by its compute capability."""
_NEED_TRANSFORMER_ENGINE = (
    _Needs("--transformer-impl", lambda value: value != "local", {}),
    _Needs("--fp8-format", options={}),
    _Needs("--fp4-format", options={}),
    _Needs("--moe-grouped-gemm"),
    _Needs("--moe-permute-fusion"),
    _Needs("--moe-router-fusion"),
    _Needs("--cross-entropy-fusion-impl", lambda value: value == "te", {}),
    _Needs("--tp-comm-overlap"),
    _Needs("--recompute-modules", lambda value: not {"layernorm", "moe_act"}.isdisjoint(value), {"nargs": "*"}),
)


def check_flags(arguments: Sequence[str]) -> None:
    """Refuse the command-line arguments that this machine cannot honour.

    Raises ValueError with the flag, its value and the remedy. Megatron itself would fail later and less
    clearly, or ignore the flag.
    """
    if not uses_transformer_engine():
        _refuse(arguments, _NEED_TRANSFORMER_ENGINE, "a GPU and Transformer Engine (extra megatron-mtpd[te])")
    if not torch.cuda.is_available():
        _refuse(arguments, _NEED_CUDA, "a GPU that torch can use")
    elif uses_transformer_engine():
        capability = torch.cuda.get_device_capability()
        for least, needs in _NEED_CAPABILITY.items():
            if capability < least:
                needed, found = ("{}.{}".format(*version) for version in (least, capability))
                needed = f"compute capability {needed} ({_GPUS[least]}), and this GPU has {found}"
                _refuse(arguments, needs, needed, "choose another recipe, or leave the flag out")


def _refuse(
    arguments: Sequence[str], needs: Sequence[_Needs], needed: str, remedy: str = "install it, or leave the flag out"
) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for need in needs:
        parser.add_argument(need.flag, dest=need.flag, default=argparse.SUPPRESS, **need.options)
    given, _ = parser.parse_known_args(arguments)
    for need in needs:
        value = getattr(given, need.flag, None)
        if value is not None and need.refused(value):
            shown = "" if value is True else f" {' '.join(value) if isinstance(value, list) else value}"
            raise ValueError(f"{need.flag}{shown} needs {needed}: {remedy}.")


# --- what Megatron's training loop has no hook for --------------------------------------------------------------------


def set_tensorboard_writer(writer: Any) -> None:
    """Make Megatron's loop report to `writer`, which has SummaryWriter's methods. After the arguments are parsed."""
    name = "_GLOBAL_TENSORBOARD_WRITER"
    owner, _ = Patch("megatron.training.global_vars", name, _replace(writer), "the loop's reports").resolve()
    setattr(owner, name, writer)


def _checkpoint_seam() -> Any:
    return importlib.import_module("megatron_mtpd.checkpoint.seam")


def _gpt_checkpoints() -> Any:
    return importlib.import_module("megatron_mtpd.checkpoint.gpt")


def _verifies(args: Any) -> bool:
    return getattr(args, "verify_checkpoint", True)  # absent where Megatron's arguments were parsed without ours


def _get_args() -> Any:
    return importlib.import_module("megatron.training").get_args()


_optimizers: list[Any] = []


def _remembered(get_megatron_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    """The loop reports one gradient norm; the optimizer that it builds knows those of the groups as well.

    A model that has an optimizer of its own (`--engine deepspeed`) builds that one.
    """

    @functools.wraps(get_megatron_optimizer)
    def remembered(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        build = getattr(model_chunks[0], "build_optimizer", None)
        if build is None:
            optimizer = get_megatron_optimizer(config, model_chunks, *args, **kwargs)
        else:
            optimizer = build(config, *args, **kwargs)
        _optimizers[:] = [optimizer]
        return optimizer

    return remembered


def heads_grad_norm() -> float | None:
    """Norm of the heads' gradients before clipping, in the last step; None when they are not clipped apart."""
    norms = getattr(_optimizers[0], "grad_norms_by_group", {}) if _optimizers else {}
    return norms.get("mtp")
