"""Patches last as long as the process: what watches them being made has one of its own, the rest shares ours."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_mtpd import platform

ROOT = Path(__file__).parents[2]


def run(script: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def check(script: str) -> None:
    done = run(script)
    assert done.returncode == 0, done.stderr[-3000:]


# --- setup -------------------------------------------------------------------------------------------------------


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is mapped to the CPU")


@on_cpu
def test_the_cpu_stands_in_for_the_gpu():
    platform.setup()
    device = torch.cuda.current_device()
    assert device == torch.device("cpu")
    assert torch.tensor([1.0], device="cuda").device == torch.zeros(2, device="cuda:0").device == device
    assert torch.empty_like(torch.empty(2, device="cuda"), device=torch.device("cuda", 0)).device == device
    assert torch.zeros(2, dtype=torch.int8).dtype == torch.int8  # other arguments pass through
    x = torch.ones(3)
    assert x.cuda(non_blocking=True) is x
    module = torch.nn.Linear(2, 2)
    assert module.cuda(0) is module
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.int32).dtype == torch.int32 and x.type("torch.DoubleTensor").dtype == torch.float64
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.current_stream().record_event().synchronize()
    torch.cuda.synchronize()


@on_cpu
def test_memory_of_the_process_is_reported():
    platform.setup()
    stats, before = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    block = torch.ones(2**24)  # 64 MiB
    grown = torch.cuda.memory_allocated() - before
    # The process may give back or take other memory meanwhile: half of the block has to show.
    assert grown > block.nbytes / 2
    assert (
        torch.cuda.max_memory_allocated() >= stats["allocated_bytes.all.peak"] >= stats["allocated_bytes.all.current"]
    )


@on_cpu
def test_rng_tracker_forks_and_restores_the_cpu_generator():
    platform.setup()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("stream", 7)
    before = torch.get_rng_state()
    with tracker.fork("stream"):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)  # the default stream has not moved
    assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(7)))
    with tracker.fork("stream"):
        assert not torch.equal(torch.rand(4), first)  # the forked stream goes on
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), drawn)
    with pytest.raises(RuntimeError, match="add --no-load-rng"):
        torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))  # the size of a GPU's


def test_setup_twice_is_setup_once():
    check("""
        import pkgutil
        from megatron_mtpd import platform
        names = [f"{patch.owner}{'.' if ':' in patch.owner else ':'}{patch.attribute}" for patch in platform.patches()]
        original = [pkgutil.resolve_name(name) for name in names]
        platform.setup()
        once = [pkgutil.resolve_name(name) for name in names]
        platform.setup()
        twice = [pkgutil.resolve_name(name) for name in names]
        assert all(one is other for one, other in zip(once, twice, strict=True))
        unchanged = [name for name, one, other in zip(names, original, once, strict=True) if one is other]
        assert not unchanged, unchanged
    """)


def test_changed_megatron_is_named_and_nothing_is_patched():
    done = run("""
        import megatron.training.training as training
        import torch
        from megatron_mtpd import platform
        before = {patch: patch.resolve()[1] for patch in platform.patches()}
        del training.get_megatron_optimizer
        try:
            platform.setup()
        except RuntimeError as error:
            print(error)
        for patch, original in before.items():
            if patch.attribute != "get_megatron_optimizer":
                assert patch.resolve()[1] is original, patch
    """)
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("megatron.training.training.get_megatron_optimizer", "Installed is megatron-core 0.", "0.19.2"):
        assert part in done.stdout


def test_changed_signature_is_named():
    patch = platform.Patch("textwrap", "dedent", lambda original: original, "a test", ("text", "width"))
    with pytest.raises(RuntimeError, match=r"textwrap\.dedent \(a test\): it no longer takes width"):
        patch.resolve()


def test_missing_module_is_named():
    patch = platform.Patch("megatron.core.gone", "name", lambda original: original, "a test")
    with pytest.raises(RuntimeError, match=r"megatron\.core\.gone\.name .*No module named"):
        patch.resolve()


# --- which patches -----------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, cuda: bool, packages: tuple[str, ...] = ()) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (10, 0))
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object() if name in packages else None)


def owners() -> set[str]:
    return {patch.owner.partition(":")[0] for patch in platform.patches()}


def test_full_gpu_install_keeps_torch_and_adam(monkeypatch):
    machine(monkeypatch, cuda=True, packages=("transformer_engine",))
    assert {patch.attribute for patch in platform.patches()} == {
        "_maybe_setup_gpt_to_hybrid_load",
        "compile_helpers",
        "get_megatron_optimizer",
        "load_checkpoint",
        "load_parameter_state_from_dp_reshardable",
        "maybe_msc",
        "retarget_sharded_state_dict_to_gpt_checkpoint",
        "save",
    }


def test_gpu_without_transformer_engine_gets_adam_alone(monkeypatch):
    machine(monkeypatch, cuda=True)
    assert not any(owner.startswith("torch") for owner in owners())
    assert "Adam" in {patch.attribute for patch in platform.patches()}


def test_transformer_engine_without_a_gpu_does_not_count(monkeypatch):
    machine(monkeypatch, cuda=False, packages=("transformer_engine",))
    assert not platform.uses_transformer_engine()
    assert {"torch", "torch.cuda", "megatron.core.optimizer"} <= owners()


# --- flags -------------------------------------------------------------------------------------------------------


def parsed(*arguments: str):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--distributed-backend", default="nccl")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--no-rope-fusion", action="store_false", dest="apply_rope_fusion")
    parser.add_argument("--no-gradient-accumulation-fusion", action="store_false", dest="gradient_accumulation_fusion")
    return vars(platform.set_default_flags(parser).parse_args(arguments))


def test_default_flags_of_a_cpu(monkeypatch):
    machine(monkeypatch, cuda=False)
    assert parsed() == {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
    }


def test_default_flags_of_a_full_gpu_install_are_megatrons(monkeypatch):
    machine(monkeypatch, cuda=True, packages=("transformer_engine", "fused_weight_gradient_mlp_cuda"))
    assert parsed() == {
        "distributed_backend": "nccl",
        "transformer_impl": "transformer_engine",
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
    }


def test_users_flags_win(monkeypatch):
    machine(monkeypatch, cuda=True)
    assert parsed("--distributed-backend", "gloo")["distributed_backend"] == "gloo"


REFUSED = [
    ("--distributed-backend nccl", "a GPU"),
    ("--distributed-backend=nccl", "a GPU"),
    ("--transformer-impl transformer_engine", "Transformer Engine"),
    ("--fp8-format hybrid", "Transformer Engine"),
    ("--cuda-graph-impl local", "a GPU"),
    ("--moe-grouped-gemm", "Transformer Engine"),
    ("--moe-token-dispatcher-type flex", "a GPU"),
    ("--recompute-modules core_attn layernorm", "Transformer Engine"),
]


@pytest.mark.parametrize(("flags", "needed"), REFUSED)
def test_what_needs_a_gpu_is_refused_by_name(monkeypatch, flags, needed):
    machine(monkeypatch, cuda=False)
    with pytest.raises(ValueError, match="needs") as refusal:
        platform.check_flags(["--seq-length", "8", *flags.split()])
    assert str(refusal.value).startswith(flags.replace("=", " ")) and needed in str(refusal.value)


@pytest.mark.parametrize("flags", [flags for flags, _ in REFUSED])
def test_a_full_gpu_install_refuses_nothing(monkeypatch, flags):
    machine(monkeypatch, cuda=True, packages=("transformer_engine",))
    platform.check_flags(flags.split())


@pytest.mark.parametrize(
    ("flags", "least", "older", "gpus"),
    [
        ("--fp8-format hybrid", (8, 9), (8, 0), "L40S, H100"),
        ("--fp8-recipe blockwise", (9, 0), (8, 9), "H100"),
        ("--fp8-recipe mxfp8", (10, 0), (9, 0), "B200"),
        ("--fp4-format e2m1", (10, 0), (9, 0), "B200"),
    ],
)
def test_what_a_gpu_is_too_old_for_is_refused_by_name(monkeypatch, flags, least, older, gpus):
    machine(monkeypatch, cuda=True, packages=("transformer_engine",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: older)
    message = rf"{flags} needs compute capability {least[0]}\.{least[1]} \({gpus}.*this GPU has {older[0]}\.{older[1]}"
    with pytest.raises(ValueError, match=message):
        platform.check_flags(flags.split())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: least)
    platform.check_flags(flags.split())


def test_what_works_everywhere_is_accepted(monkeypatch):
    machine(monkeypatch, cuda=False)
    flags = "--distributed-backend gloo --context-parallel-size 1 --transformer-impl local --unknown-flag"
    platform.check_flags([*flags.split(), "--moe-token-dispatcher-type", "alltoall", "--recompute-modules", "mlp"])


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Their device files, and a torch that cannot use them."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(platform, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_a_cpu(two_gpus, monkeypatch):
    """A driver that is too old would else be a run that is a thousand times slower."""
    from megatron_mtpd.training import pretrain

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"2 GPUs are there, and torch .* built for CUDA 13\.0: its driver is too old"):
        pretrain.parse(["--num-layers", "2"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a CPU build" in str(platform.unusable_gpus())


@pytest.mark.parametrize(("name", "value"), [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")])
def test_gpus_that_are_hidden_are_not_missed(two_gpus, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert platform.unusable_gpus() is None


def test_a_machine_without_gpus_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert platform.unusable_gpus() is None


# --- Adam --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torch.manual_seed(0)
    ours = [torch.randn(6, 5), torch.randn(3), torch.randn(0)]
    theirs = [parameter.clone() for parameter in ours]
    without_decay = {"weight_decay": 0.0}
    adam = platform.Adam(
        [{"params": ours[:1]}, {"params": ours[1:], **without_decay}], adam_w_mode=decoupled, **options
    )
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], **without_decay}]
    reference = torch.optim.Adam(groups, decoupled_weight_decay=decoupled, **options)
    for _ in range(10):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        adam.step()
        reference.step()
    assert [group["step"] for group in adam.param_groups] == [10, 10]
    for mine, other in zip(ours, theirs, strict=True):
        # One kernel instead of one a term: each of the 10 steps may round a parameter of size 1 by an ulp (1.2e-7).
        torch.testing.assert_close(mine, other, rtol=0, atol=1.2e-6)


def test_distributed_optimizer_resumes_bit_for_bit(tmp_path):
    """What torch's own Adam cannot do under Megatron's distributed optimizer, in both of its checkpoint formats."""
    check(f"""
        from megatron_mtpd import platform
        platform.setup()
        import torch
        from megatron.core import dist_checkpointing, parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel import ColumnParallelLinear, model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import MegatronModule

        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)

        class Model(MegatronModule):
            def __init__(self):
                super().__init__(config)
                self.linear = ColumnParallelLinear(
                    8, 8, config=config, init_method=torch.nn.init.xavier_uniform_, tp_group=None
                )

            def forward(self, x):
                return self.linear(x)[0]

        def build():
            ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
            model = DistributedDataParallel(config, ddp, Model())
            options = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=1.0)
            return model, get_megatron_optimizer(options, [model])

        def train(model, optimizer, steps):
            for step in steps:
                model.zero_grad_buffer()
                optimizer.zero_grad()
                inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                model(inputs).square().mean().backward()
                model.finish_grad_sync()
                optimizer.step()

        def state(model, optimizer, sharding, is_loading=False):
            metadata = {{"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True}}
            sharded = model.module.sharded_state_dict(metadata=metadata)
            parts = {{"model": sharded}}
            parts["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=is_loading, metadata=metadata)
            return parts

        for sharding in ("dp_reshardable", "fully_reshardable"):
            folder = {str(tmp_path)!r} + "/" + sharding
            __import__("os").mkdir(folder)
            model, optimizer = build()
            train(model, optimizer, range(3))
            dist_checkpointing.save(state(model, optimizer, sharding), folder)
            resumed, its_optimizer = build()
            loaded = dist_checkpointing.load(state(resumed, its_optimizer, sharding, is_loading=True), folder)
            resumed.module.load_state_dict(loaded["model"])
            its_optimizer.load_state_dict(loaded["optimizer"])
            train(model, optimizer, range(3, 6))
            train(resumed, its_optimizer, range(3, 6))
            assert torch.equal(model.module.linear.weight, resumed.module.linear.weight), sharding
            assert its_optimizer.param_groups[0]["step"] == 6, its_optimizer.param_groups
    """)
