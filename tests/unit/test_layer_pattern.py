"""The pattern of a plain transformer."""

import pytest

from megatron_mtpd.layer_pattern import expand_layer_flags, layer_pattern


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"num_layers": 2, "num_heads": 0}, "*-*-"),
        ({"num_layers": 2, "num_heads": 2}, "*-*-/*-/*-"),
        ({"num_layers": 2, "num_heads": 1, "mixture_of_experts": True}, "*E*E/*E"),
        ({"num_layers": 4, "num_heads": 1, "pipeline_size": 2}, "*-*-|*-*-/*-"),
        ({"num_layers": 4, "num_heads": 1, "pipeline_size": 2, "last_stage_layers": 1}, "*-*-*-|*-/*-"),
        ({"num_layers": 5, "num_heads": 0, "pipeline_size": 3, "first_stage_layers": 1}, "*-|*-*-|*-*-"),
        (
            {"num_layers": 3, "num_heads": 0, "pipeline_size": 2, "first_stage_layers": 1, "last_stage_layers": 2},
            "*-|*-*-",
        ),
        ({"num_layers": 2, "num_heads": 1, "pipeline_size": 2, "last_stage_layers": 0}, "*-*-|/*-"),
    ],
)
def test_pattern(arguments, pattern):
    assert layer_pattern(**arguments) == pattern


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_layers": 3, "pipeline_size": 2},
        {"num_layers": 4, "pipeline_size": 2, "first_stage_layers": 3, "last_stage_layers": 3},
        {"num_layers": 4, "pipeline_size": 2, "last_stage_layers": 5},
        {"num_layers": 0},
    ],
)
def test_layers_that_cannot_be_laid_out_are_refused(arguments):
    with pytest.raises(ValueError, match="--num-layers"):
        layer_pattern(num_heads=1, **arguments)


def test_flags_become_a_pattern_and_all_others_stay():
    argv = ["--lr", "1", "--num-layers=2", "--mtp-num-layers", "1", "--pipeline-model-parallel-size", "2", "--bf16"]
    assert expand_layer_flags(argv) == [
        *("--lr", "1", "--pipeline-model-parallel-size", "2", "--bf16"),
        *("--hybrid-layer-pattern", "*-|*-/*-"),
    ]


@pytest.mark.parametrize(
    "given", [["--hybrid-layer-pattern", "*-/*-"], ["--hybrid-layer-pattern=*-"], ["--use-checkpoint-args"]]
)
def test_a_given_pattern_is_left_alone(given):
    argv = ["--num-layers", "2", *given]
    assert expand_layer_flags(argv) == argv


def test_without_layer_flags_nothing_changes():
    assert expand_layer_flags(["--lr", "1"]) == ["--lr", "1"]
