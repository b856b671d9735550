"""ds_config.json: completed from the flags, and refused where it contradicts them or cannot work."""

import argparse
import copy
import json
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_mtpd import platform
from megatron_mtpd.config import MTPDConfig
from megatron_mtpd.training.deepspeed_config import _OF_DDP_AND_OPTIMIZER, deepspeed_config_from_args

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "deepspeed").glob("*.json"))
FLAGS = {
    "global_batch_size": 48,
    "micro_batch_size": 2,
    "data_parallel_size": 8,
    "clip_grad": 0.5,
    "bf16": True,
    "lr": 3e-4,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
    "hidden_size": 64,
    "decoupled_weight_decay": True,
    "accumulate_allreduce_grads_in_fp32": True,
    "optimizer": "adam",
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "num_experts": None,
    "context_parallel_size": 1,
    "gradient_accumulation_fusion": False,
    "fp16": False,
    "use_distributed_optimizer": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "calculate_per_token_loss": False,
    "fp8": None,
    "fp4": None,
    "loss_scale": None,
    "use_precision_aware_optimizer": False,
    "skip_train": False,
    "optimizer_cpu_offload": False,
    "log_params_norm": False,
    "log_num_zeros_in_grad": False,
    "init_model_with_meta_device": False,
    "ckpt_format": "torch_dist",
    "async_save": False,
    "cuda_graph_impl": "none",
    "gtp_weight_remat_size": 1,
    "num_distributed_optimizer_instances": 1,
    "qk_clip": False,
    "load_main_params_from_ckpt": False,
    "save_params_interval": None,
    "save_wgrads_interval": None,
    "check_weight_hash_across_dp_replicas_interval": None,
    "ddp_bucket_size": None,
    "ddp_num_buckets": None,
    "ddp_pad_buckets_for_high_nccl_busbw": False,
    "ddp_average_in_collective": False,
    "ddp_reduce_scatter_with_fp32_accumulation": False,
    "ddp_param_name_patterns_for_fp32_local_accumulation": [],
    "nccl_ub": False,
    "create_all_gather_group": False,
    "check_for_large_grads": False,
    "optimizer_cuda_graph": False,
    "dump_param_to_param_group_map": None,
}
HEADS = MTPDConfig(train="heads")


def complete(folder, given, mtpd=HEADS, **flags):
    path = folder / "ds_config.json"
    path.write_text(json.dumps(given))
    return deepspeed_config_from_args(Namespace(deepspeed_config=str(path), **FLAGS | flags), mtpd)


def zero(stage=3, **others):
    return {"zero_optimization": {"stage": stage, **others}}


def test_what_is_left_out_follows_from_the_flags(tmp_path):
    config = complete(tmp_path, zero())
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["optimizer"]["type"] == "AdamW"
    params = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    assert params.items() <= config["optimizer"]["params"].items()


def test_the_loop_accumulates_and_the_engine_does_not(tmp_path):
    config = complete(tmp_path, {**zero(), "gradient_accumulation_steps": 3, "train_batch_size": 48})
    assert config["gradient_accumulation_steps"] == 1
    assert config["train_batch_size"] == 16, "what DeepSpeed computes from one micro-batch a rank"
    assert config["managed_gradient_accumulation"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_whole_with_the_flags(tmp_path, path):
    config = complete(tmp_path, json.loads(path.read_text()))
    assert '"auto"' not in json.dumps(config)


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"heads_on_a_frozen_trunk", "zero1", "zero3"}


def test_the_users_own_values_are_kept(tmp_path):
    sharding = zero(2, overlap_comm=True, reduce_bucket_size=1000, offload_optimizer={"device": "cpu"})
    given = {**sharding, "communication_data_type": "bf16"}
    given["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    given["scheduler"] = {}
    config = complete(tmp_path, copy.deepcopy(given))
    assert config["zero_optimization"] == given["zero_optimization"]
    assert config["communication_data_type"] == "bf16"
    assert config["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({**zero(), "train_batch_size": 32}, "train_batch_size is 32 .* 48 by the flags"),
        ({**zero(), "train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({**zero(), "gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 .* 3 by"),
        ({**zero(), "gradient_clipping": 1.0}, "gradient_clipping is 1.0"),
        ({**zero(), "bf16": {"enabled": False}}, "bf16.enabled is False"),
        ({**zero(), "bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        ({**zero(), "fp16": {"enabled": True}}, "fp16"),
        ({**zero(), "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr is 1.0"),
        ({**zero(), "optimizer": {"type": "Lamb"}}, "optimizer Lamb"),
        ({**zero(), "optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "decoupled"),
        ({**zero(), "scheduler": {"type": "WarmupLR"}}, "--lr-decay-style"),
        ({**zero(), "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({**zero(), "memory_breakdown": "auto"}, 'memory_breakdown is "auto"'),
        (zero(0), "stage is 0"),
        ({}, "stage is 0"),
        (zero(2, offload_param={"device": "cpu"}), "offload_param needs"),
        (zero(3, offload_optimizer={"device": "nvme"}), "offload_optimizer"),
        (zero(3, offload_optimizer={"device": "cpu", "super_offload": True}), "super_offload"),
        (zero(2, compute_grad_norm=False), "compute_grad_norm"),
        (zero(3, zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(3, zero_hpz_partition_size=8), "zero_hpz_partition_size"),
        ([], "must hold a JSON object"),
        ({**zero(), "bf16": True}, "bf16 in --deepspeed-config must be an object, and is True"),
        ({"zero_optimization": True}, "zero_optimization in --deepspeed-config must be an object"),
        (zero(3, offload_optimizer="cpu"), "offload_optimizer in --deepspeed-config must be an object"),
        ({**zero(), "optimizer": {"params": {"amsgrad": True}}}, "optimizer.params.amsgrad"),
        ({**zero(), "optimizer": {"params": {"momentum": 0.9}}}, "optimizer.params.momentum"),
        ({**zero(), "train_batchsize": 48}, "train_batchsize in --deepspeed-config is not supported"),
    ],
)
def test_contradictions_and_what_is_untested_are_refused(tmp_path, given, named):
    with pytest.raises(ValueError, match=named):
        complete(tmp_path, given)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size"),
        ({"sequence_parallel": True}, "--sequence-parallel"),
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size"),
        ({"num_experts": 8}, "--num-experts"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"gradient_accumulation_fusion": True}, "--no-gradient-accumulation-fusion"),
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer"),
        ({"calculate_per_token_loss": True}, "--calculate-per-token-loss"),
        ({"fp16": True}, "--fp16"),
        ({"fp8": "hybrid"}, "--fp8-format"),
        ({"fp4": "e2m1"}, "--fp4-format"),
        ({"loss_scale": 1024.0}, "--loss-scale"),
        ({"optimizer": "sgd"}, "--optimizer"),
        ({"overlap_grad_reduce": True}, "--overlap-grad-reduce does .* zero_optimization.overlap_comm"),
        ({"overlap_param_gather": True}, "--overlap-param-gather"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer"),
        ({"optimizer_cpu_offload": True}, "--optimizer-cpu-offload does .* zero_optimization.offload_optimizer"),
        ({"num_distributed_optimizer_instances": 2}, "--num-distributed-optimizer-instances"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards"),
        ({"qk_clip": True}, "--qk-clip"),
        ({"load_main_params_from_ckpt": True}, "--load-main-params-from-ckpt"),
        ({"log_params_norm": True}, "--log-params-norm"),
        ({"log_num_zeros_in_grad": True}, "--log-num-zeros-in-grad"),
        ({"save_params_interval": 5}, "--save-params-interval"),
        ({"save_wgrads_interval": 5}, "--save-wgrads-interval"),
        ({"check_weight_hash_across_dp_replicas_interval": 5}, "--check-weight-hash-across-dp-replicas-interval"),
        ({"init_model_with_meta_device": True}, "--init-model-with-meta-device"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl"),
        *(({name: 2}, flag) for flag, name in _OF_DDP_AND_OPTIMIZER.items()),
        ({"skip_train": True}, "--skip-train"),
        ({"ckpt_format": "torch"}, "--ckpt-format"),
        ({"async_save": True}, "--async-save"),
        ({"mtpd": MTPDConfig()}, "--no-mtpd-clip-apart"),
    ],
)
def test_flags_that_do_not_work_are_refused(tmp_path, flags, named):
    with pytest.raises(ValueError, match=named):
        complete(tmp_path, zero(), **flags)


def test_flags_that_would_do_nothing_have_megatrons_names():
    platform.setup()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    names = {option: action.dest for action in parser._actions for option in action.option_strings}
    assert _OF_DDP_AND_OPTIMIZER.items() <= names.items()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    for name, named in ((None, "--deepspeed-config FILE"), (str(path), "broken.json"), ("/nowhere.json", "/nowhere")):
        with pytest.raises(ValueError, match=named):
            deepspeed_config_from_args(Namespace(deepspeed_config=name, **FLAGS), HEADS)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra megatron-mtpd[deepspeed]")
@pytest.mark.parametrize("given", [{"stage": 3, "overlap_com": True}, {"stage": 3, "sub_group_size": "big"}])
def test_what_deepspeed_does_not_know_is_refused_before_anything_is_built(tmp_path, given):
    platform.setup()
    platform.prepare_deepspeed()
    from megatron_mtpd.training.deepspeed_engine import checked

    assert checked(complete(tmp_path, zero(3, offload_param={"device": "cpu"})))
    with pytest.raises(ValueError, match=f"zero_optimization.{list(given)[-1]} in --deepspeed-config"):
        checked(complete(tmp_path, {"zero_optimization": given}))


def test_the_error_without_deepspeed_names_the_extra(monkeypatch):
    monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"megatron-mtpd\[deepspeed\]"):
        platform.prepare_deepspeed()
