"""Operations, layouts, time and the table of a plan, against Megatron's own figures and against hand counts."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from megatron_mtpd import platform

platform.setup()

from megatron.training.training import num_floating_point_operations  # noqa: E402

from megatron_mtpd.planning import balance, flops, memory, parameters  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.gpus import GPUS  # noqa: E402
from megatron_mtpd.planning.plan import balanced_stages, plan, table, with_stages  # noqa: E402
from megatron_mtpd.planning.shape import Model, Parallel, Run, Step  # noqa: E402

ROOT = Path(__file__).parents[3]
PLANNING = ROOT / "docs" / "planning.md"
DEEPSEEK = ROOT / "examples" / "gpu" / "deepseek-v3-671b.args"
SMALL = (
    "--num-layers 8 --mtp-num-layers 2 --hidden-size 256 --num-attention-heads 8 --seq-length 128 --micro-batch-size 2 "
    "--vocab-size 1000 --swiglu --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights"
)


def run(flags: str, ranks: int = 1, base: str = SMALL) -> Run:
    return run_from_flags([*base.split(), *flags.split()], ranks)


class Arguments:
    """What Megatron's own count reads: None for what the model has not, and 1 for sizes of Mamba layers."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __getattr__(self, name):
        return 1 if name.startswith("mamba") else None


@pytest.mark.parametrize("heads", [0, 3])
def test_operations_are_those_that_megatron_counts(heads):
    model = Model(256, 704, 8, 2, 32, 1024, ("*-*E*-",), "*E" if heads else "", heads, gated=True, tied=False,
                  experts=8, router_topk=2, expert_ffn=96, shared_ffn=64)  # fmt: skip
    megatrons = num_floating_point_operations(
        Arguments(
            hybrid_layer_pattern="*-*E*-" + "/*E" * heads,
            is_hybrid_model=True,
            mtp_num_layers=heads or None,
            num_layers=6,
            seq_length=128,
            hidden_size=256,
            ffn_hidden_size=704,
            num_attention_heads=8,
            group_query_attention=True,
            num_query_groups=2,
            kv_channels=32,
            swiglu=True,
            num_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=96,
            moe_shared_expert_intermediate_size=64,
            padded_vocab_size=1024,
        ),
        5,
    )
    # It leaves out the heads' projections [2h -> h] and the router.
    beside = 3 * (heads * 4 * 256**2 + (1 + heads) * 2 * 256 * 8)
    found = flops.of_token(Run(model, Parallel(), Step(128, 5, 1, 2, 4, 12, shards_optimizer=False)))
    assert found.fp8 == 0
    assert (found.total - beside) * 5 * 128 == pytest.approx(megatrons)


FP8 = "--bf16 --fp8-format hybrid --fp8-recipe tensorwise"


def test_linear_layers_of_trunk_and_heads_run_in_fp8():
    """Two operations of forward and four of backward for every weight; attention itself and the logits are bf16."""
    fp8 = run(FP8)
    parts = parameters.whole(fp8.model)
    norms = 256 * (8 * 2 + 1 + 2 * (2 + 3))
    found = flops.of_token(fp8)
    assert found.fp8 == 6 * (parts.total.total - parts.embedding - parts.output - norms)
    assert found.ordinary == 6 * (1 + 2) * parts.output + 3 * (8 + 2) * 2 * 128 * 256
    assert found.total == flops.of_token(run("--bf16")).total


@pytest.mark.parametrize(
    ("symbol", "rest"),
    [("*", 2 * 128 * 256), ("+", 128 * 8 * (24 + 8 + 40)), ("-", 0), ("E", 2 * 256 * 4)],
)
def test_operations_of_a_layer_that_never_run_in_fp8(symbol, rest):
    """Attention's scores and values, and the router."""
    model = run(
        "--hybrid-layer-pattern +-*E/*- --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 96 "
        "--multi-latent-attention --q-lora-rank 48 --kv-lora-rank 32 --qk-head-dim 24 --qk-pos-emb-head-dim 8 "
        "--v-head-dim 40",
        base=SMALL.replace("--num-layers 8 --mtp-num-layers 2 ", ""),
    ).model
    linear, other = flops.of_layer(model, symbol, 128)
    assert other == rest
    weights = parameters.of_layer(model, symbol)
    routed = weights.expert * 2 // 4
    assert linear == 2 * (weights.dense - 256 - (256 * 4 if symbol == "E" else 0) + routed)


def test_first_and_last_layers_in_bf16():
    """Attention and MLP count as a layer each: a block at the start, and half of one at the end. Heads have none."""
    layers = [flops.of_layer(run("").model, symbol, 128)[0] for symbol in "*-"]
    some = run(f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 2 --num-layers-at-end-in-bf16 1")
    every, found = flops.of_token(run(FP8)), flops.of_token(some)
    assert every.fp8 - found.fp8 == 3 * (sum(layers) + layers[1])
    assert every.total == found.total


def test_a_layout_is_the_best_of_all():
    """Every way to cut eight blocks into three stages, tried one by one."""
    work = {"*": 3.0, "-": 5.0, "E": 9.0}
    layers, end = "*-*-*E*-*E*-*-*E", 21.0
    parts = balance.blocks(layers)

    def loads(cuts: tuple[int, ...]) -> tuple[float, float]:
        edges = (0, *cuts, len(parts))
        stages = [sum(work[s] for part in parts[a:b] for s in part) for a, b in pairwise(edges)]
        stages[-1] += end
        return max(stages), sum(x * x for x in stages)

    best = min(loads(cuts) for cuts in combinations(range(1, 8), 2))
    found = balance.balanced(layers, [work[symbol] for symbol in layers], end, 3)
    assert "".join(found) == layers
    stages = [sum(work[s] for s in stage) for stage in found]
    stages[-1] += end
    assert (max(stages), sum(x * x for x in stages)) == best


def test_short_flags_say_the_same_as_the_pattern():
    layers = "--num-layers 10 --pipeline-model-parallel-size 4"  # 10 blocks, and 3.3 more in heads and losses
    planned = run(layers, 4)
    stages = balanced_stages(planned, None)
    flags = balance.short_flags(stages)
    assert flags == "--decoder-last-pipeline-num-layers 1"
    again = run(f"{layers} {flags}", 4)
    assert again.model.stages == stages


def test_more_blocks_than_stages_are_asked_for():
    with pytest.raises(ValueError, match="8 blocks of layers cannot fill 16 pipeline stages"):
        run("--pipeline-model-parallel-size 16", 16)


def test_time_counts_filling_and_imbalance():
    even = run("--pipeline-model-parallel-size 2 --global-batch-size 8", 2)
    result = plan(even, GPUS["H100"], 0.5)
    work = [stage.total for stage in flops.of_stages(even)]
    # 4 micro-batches of 2 x 128 tokens, and one more while the second stage waits.
    assert result.seconds == pytest.approx(max(work) * 256 * 5 / (494e12 * 0.5))
    assert result.mfu_of_step == pytest.approx(0.5 * sum(work) / 2 / max(work) * 4 / 5)
    lopsided = with_stages(even, ("*-" * 2, "*-" * 6))
    slower = plan(lopsided, GPUS["H100"], 0.5)
    assert slower.layout.worst > result.layout.worst > slower.proposal.worst == result.proposal.worst
    assert slower.seconds is not None and result.seconds is not None
    assert slower.seconds > result.seconds


def test_each_operation_takes_the_time_of_its_precision():
    gpu = GPUS["H100"]
    fp8, bf16 = (plan(run(f"{flags} --global-batch-size 16", 4), gpu, 0.5) for flags in (FP8, "--bf16"))
    work, tokens = flops.of_token(fp8.run), 16 * 128 / 4
    assert fp8.flops_token_fp8 == work.fp8
    assert fp8.seconds_at_peak == pytest.approx((work.ordinary / 989e12 + work.fp8 / 1979e12) * tokens)
    assert bf16.seconds_at_peak == pytest.approx(work.total / 989e12 * tokens)
    for result in (fp8, bf16):
        assert result.seconds_at_peak is not None
        assert result.seconds == pytest.approx(result.seconds_at_peak / 0.5)
        assert result.mfu_of_step == pytest.approx(0.5)
    assert ", 88% in FP8" in table(fp8) and "FP8" not in table(bf16)


def test_fp8_balances_by_time():
    """The logits of the last stage take twice the time of as many operations before."""
    base, gpu = SMALL.replace("--num-layers 8", "--num-layers 26"), GPUS["H100"]
    flags = "--vocab-size 2000 --pipeline-model-parallel-size 4"
    bf16, fp8 = (
        run_from_flags([*base.split(), *flags.split(), *precision.split()], 4, gpu=gpu) for precision in ("--bf16", FP8)
    )
    blocks = [[len(balance.blocks(stage)) for stage in x.model.stages] for x in (bf16, fp8)]
    assert blocks == [[7, 8, 8, 3], [8, 8, 8, 2]]
    result = plan(fp8, gpu)
    times = [work.ordinary / 989 + work.fp8 / 1979 for work in flops.of_stages(fp8)]
    assert result.layout.loads == pytest.approx([4 * time / sum(times) for time in times])
    assert result.layout == result.proposal
    slower = plan(with_stages(fp8, bf16.model.stages), gpu)
    assert slower.seconds is not None and result.seconds is not None
    assert slower.seconds > result.seconds


def test_a_gpu_without_fp8_is_refused():
    with pytest.raises(ValueError, match="--fp8-format: A100 has no FP8"):
        plan(run(FP8), GPUS["A100"])


def test_fp8_copies_are_of_linear_layers():
    bf16, fp8, gathered = (
        memory.of_rank(run(flags), 0).weights for flags in ("--bf16", FP8, f"{FP8} --fp8-param-gather")
    )
    tables = 2 * 1024 * 256
    assert gathered == bf16 and fp8 == bf16 + 2 * (bf16 / 2 - tables)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_micro_batches_in_flight(stage):
    """1F1B: a stage keeps one micro-batch for each stage from itself on, as far as there are so many."""
    few, many = (run(f"--pipeline-model-parallel-size 3 --global-batch-size {2 * n}", 3, SMALL) for n in (1, 9))
    alone, flight = (memory.of_rank(x, stage).activations for x in (few, many))
    if stage < 2:
        assert flight == pytest.approx((3 - stage) * alone)
    else:
        assert flight == alone


def test_sharding_divides_the_optimizer_alone():
    whole, sharded = (memory.of_rank(run(f"--bf16 {flag}", 8), 0) for flag in ("", "--use-distributed-optimizer"))
    assert sharded.optimizer == pytest.approx(whole.optimizer / 8)
    assert (sharded.weights, sharded.gradients) == (whole.weights, whole.gradients)
    total = parameters.whole(run("--bf16").model).total.total
    assert (whole.weights, whole.gradients, whole.optimizer) == (2 * total, 4 * total, 12 * total)


def test_frozen_parts_cost_weights_alone():
    everything = run("--bf16")
    heads = run("--bf16 --mtpd-train new-heads --mtpd-old-heads 1")
    of_head = parameters.of_head(heads.model).total
    frozen = memory.of_rank(heads, 0)
    assert frozen.weights == memory.of_rank(everything, 0).weights
    assert (frozen.gradients, frozen.optimizer) == (4 * of_head, 12 * of_head)
    work, of_everything = (sum(stage.total for stage in flops.of_stages(x)) for x in (heads, everything))
    assert work < 0.5 * of_everything


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tensor-model-parallel-size 3", "divide the number of GPUs, 8"),
        ("--tensor-model-parallel-size 8 --group-query-attention --num-query-groups 4", "query groups, 4"),
        ("--hybrid-layer-pattern M*-/*-", "--hybrid-layer-pattern holds M"),
        ("--global-batch-size 12", "--global-batch-size 12"),
        ("--engine deepspeed --deepspeed-config ds.json", "--engine deepspeed: a plan does not know what ZeRO keeps"),
        ("--padded-vocab-size 1024 --seq-length 64 --hybrid-layer-pattern *-/*-/*E --num-experts 2", "must be alike"),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        run(flags, 8)


def test_a_deepseek_v3_shape():
    """Its report gives 671B parameters, 37B of them active, and one head of 11.5B beside the shared embedding."""
    flags = [word for line in DEEPSEEK.read_text().splitlines() if not line.startswith("#") for word in line.split()]
    result = plan(run_from_flags([word.strip("'") for word in flags], 2048), GPUS["H100"])
    assert (result.parameters - result.parameters_of_heads) / 1e9 == pytest.approx(671.03, abs=0.01)
    assert result.active / 1e9 == pytest.approx(37.5, abs=0.5)
    assert result.parameters_of_heads / 1e9 == pytest.approx(11.5, abs=0.2)
    assert len(result.memory) == 16 and result.fits
    # A block, the head and two output layers, of which these are not in FP8.
    assert result.layout.worst == result.proposal.worst < 1.75
    assert "fits" in table(result)


def test_command():
    model = ROOT / "slurm" / "configs" / "dense-2b"
    command = [sys.executable, "tools/plan_run.py", "--nodes", "32", "--vocab-size", "122880", "--json"]
    files = [f"@{model}/model.args", f"@{model}/nodes-32.args"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens_step"] == 1024 * 4096 and result["fits"] is True
    assert 1.9e9 < result["parameters"] - result["parameters_of_heads"] < 2.0e9


EXAMPLES = re.findall(
    r"```sh\n\.venv/bin/python (tools/plan_run\.py .+?)```.+?```\n(.+?)```", PLANNING.read_text(), re.S
)


@pytest.mark.parametrize("example", EXAMPLES, ids=["dense-2b", "moe-10b-a1b", "deepseek-v3-671b"])
def test_worked_examples_are_what_the_command_prints(monkeypatch, capsys, example):
    """docs/planning.md, word for word; `...` there stands for what it leaves out."""
    command, expected = example
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("\\\n", " ")))
    runpy.run_path(sys.argv[0], run_name="__main__")
    printed = capsys.readouterr().out
    words = [re.escape(part) for part in re.split(r" *\.\.\. ?", expected)]
    assert re.fullmatch(".+".join(words), printed, re.S), printed


def test_step_is_the_whole_batch():
    tiny = Run(run("").model, Parallel(dp=4), Step(128, 2, 3, 2, 4, 12, shards_optimizer=True))
    assert tiny.tokens == 4 * 2 * 3 * 128
