"""Flags: all come from MTPDConfig, and combinations that cannot work are refused by name."""

import argparse
import dataclasses

import pytest

from megatron_mtpd import platform
from megatron_mtpd.config import MTPDConfig, flag
from megatron_mtpd.training.arguments import add_mtpd_arguments, mtpd_config_from_args


@pytest.fixture(scope="module")
def parser():
    return add_mtpd_arguments(argparse.ArgumentParser())


def parse(parser, *argv, **megatron):
    args = parser.parse_args(argv)
    defaults = {
        "mtp_num_layers": 2,
        "mtp_loss_scaling_factor": 0.1,
        "mtp_detach_heads": False,
        "hybrid_layer_pattern": "*-/*-/*-",
        "sft": False,
        "dataloader_inter_document_masking": False,
        "hybrid_context_parallel": False,
        "fp16_lm_cross_entropy": False,
        "fp8_output_proj": False,
        "train_iters": 300,
        "train_samples": None,
        "global_batch_size": 8,
        "defer_embedding_wgrad_compute": False,
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "reset_attention_mask": False,
        "create_attention_mask_in_dataloader": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "micro_batch_size": 2,
        "eval_micro_batch_size": None,
        "recompute_granularity": None,
        "recompute_method": None,
        "context_parallel_size": 1,
        "seq_length": 16,
        "transformer_impl": "transformer_engine",
        "cuda_graph_impl": "none",
    }
    vars(args).update({**defaults, **megatron})
    return args


def test_no_flag_gives_the_defaults(parser):
    assert mtpd_config_from_args(parse(parser)) == MTPDConfig(distill_start=200)


@pytest.mark.parametrize(
    ("argv", "megatron", "start"),
    [
        ([], {}, 200),
        ([], {"train_iters": None, "train_samples": 1200}, 100),
        (["--mtpd-train", "heads"], {}, 0),  # a trained main head teaches at once, and pays nothing
        (["--mtpd-distill-start", "7"], {}, 7),
    ],
)
def test_distillation_begins_in_the_last_third(parser, argv, megatron, start):
    assert mtpd_config_from_args(parse(parser, *argv, **megatron)).distill_start == start


def test_every_field_has_a_flag_with_help(parser):
    text = parser.format_help()
    for field in dataclasses.fields(MTPDConfig):
        name = flag(field.name) if field.default is not True else "--no-" + flag(field.name)[2:]
        assert name in text
    for action in parser._actions:
        assert action.help


def test_help_prints_with_megatrons_flags():
    from megatron.training.arguments import add_megatron_arguments

    text = add_mtpd_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))).format_help()
    assert "--mtpd-top-n" in text and "--num-layers" in text


def test_flags_reach_the_config(parser):
    argv = ["--mtpd-beta", "0.5", "0.25", "--mtpd-objective", "lk", "--mtpd-top-n", "7", "--no-mtpd-clip-apart"]
    argv += ["--mtpd-kd-trunk-share", "0.5", "--mtpd-cross-documents"]
    config = mtpd_config_from_args(parse(parser, *argv, hidden_dropout=0.0, attention_dropout=0.0))
    expected = MTPDConfig(
        objective="lk",
        top_n=7,
        beta=[0.5, 0.25],
        kd_trunk_share=0.5,
        clip_apart=False,
        cross_documents=True,
        distill_start=200,
    )
    assert config == expected
    argv = ["--mtpd-alpha", "0.2", "--mtpd-head-decay", "0.6", "--mtpd-on-policy-fraction", "0.25"]
    argv += ["--mtpd-next-objective", "e2e_tv", "--mtpd-next-objective-start", "1000"]
    expected = MTPDConfig(
        alpha=0.2,
        head_decay=0.6,
        on_policy_fraction=0.25,
        distill_start=200,
        next_objective="e2e_tv",
        next_objective_start=1000,
    )
    assert mtpd_config_from_args(parse(parser, *argv)) == expected


def test_detach_heads_cuts_every_share(parser):
    config = mtpd_config_from_args(parse(parser, mtp_detach_heads=True))
    assert {getattr(config, f.name) for f in dataclasses.fields(config) if f.name.endswith("_share")} == {0.0}
    with pytest.raises(ValueError, match="--mtp-detach-heads"):
        mtpd_config_from_args(parse(parser, "--mtpd-kd-trunk-share", "0.5", mtp_detach_heads=True))


@pytest.mark.parametrize(
    ("argv", "megatron", "message"),
    [
        (["--mtpd-top-n", "0"], {}, "--mtpd-top-n is 0"),
        (["--mtpd-beta", "1", "2", "3"], {}, "--mtpd-beta is .* the model has 2 heads"),
        (["--mtpd-alpha", "-1"], {}, "--mtpd-alpha"),
        (["--mtpd-ce-output-share", "1.5"], {}, "--mtpd-ce-output-share is 1.5"),
        ([], {"mtp_num_layers": None}, "no MTP heads"),
        (["--mtpd-on-policy-fraction", "0.5"], {"mtp_num_layers": 1}, "--mtpd-on-policy-fraction 0.5 .* has one"),
        (["--mtpd-next-objective", "tv"], {}, "--mtpd-next-objective-start is 0"),
        ([], {"sft": True}, "--sft"),
        ([], {"fp16_lm_cross_entropy": True}, "--fp16-lm-cross-entropy"),
        ([], {"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
        ([], {"fp8_output_proj": True}, "--fp8-output-proj"),
        ([], {"hybrid_context_parallel": True}, "--hybrid-context-parallel"),
        ([], {"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ([], {"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
        ([], {"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
        (
            [],
            {"reset_attention_mask": True, "create_attention_mask_in_dataloader": False},
            "--reset-attention-mask does nothing",
        ),
        (["--mtpd-kd-trunk-share", "0"], {}, "--hidden-dropout 0.1"),
        ([], {"eval_micro_batch_size": 4}, "--eval-micro-batch-size 4"),
        ([], {"recompute_granularity": "full", "recompute_method": "block"}, "--recompute-method uniform"),
        ([], {"context_parallel_size": 8}, "--context-parallel-size 8 cuts --seq-length 16 into pieces of 1 positions"),
    ],
)
def test_what_cannot_work_is_refused_by_name(parser, argv, megatron, message):
    with pytest.raises(ValueError, match=message):
        mtpd_config_from_args(parse(parser, *argv, **megatron))


def test_a_mask_that_transformer_engine_would_not_see_is_refused(parser, monkeypatch):
    mtpd_config_from_args(parse(parser, reset_attention_mask=True))  # the local layers see it
    monkeypatch.setattr(platform, "uses_transformer_engine", lambda: True)
    with pytest.raises(ValueError, match="--reset-attention-mask does nothing with Transformer Engine"):
        mtpd_config_from_args(parse(parser, reset_attention_mask=True))
    mtpd_config_from_args(parse(parser, reset_attention_mask=True, transformer_impl="local"))
