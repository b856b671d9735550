"""Parameters of a plan are those of the model that the same flags build, to the last one, on every rank."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist

from megatron_mtpd import platform

platform.setup()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.global_vars import unset_global_variables  # noqa: E402

from megatron_mtpd.model import MTPDModelConfig  # noqa: E402
from megatron_mtpd.planning import parameters  # noqa: E402
from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.shape import Model, Parallel  # noqa: E402
from megatron_mtpd.training import pretrain as entry  # noqa: E402
from tests.distributed.gloo import run  # noqa: E402

pytestmark = pytest.mark.distributed

BASE = (
    "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 "
    "--vocab-size 100 --tokenizer-type NullTokenizer --mock-data --lr 1e-3 --train-iters 1 --use-cpu-initialization"
)
LLAMA = "--swiglu --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights"
EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 40 --moe-router-topk 2 "
    "--moe-token-dispatcher-type alltoall"
)
LATENT = (
    f"--hybrid-layer-pattern +-+E/+E/+E {LLAMA} {EXPERTS} --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 12 --no-rope-fusion"
)
GROUPED = "--group-query-attention --num-query-groups 2"
WHOLE = {
    "gpt": "--num-layers 2",
    "gpt-heads": "--num-layers 2 --mtp-num-layers 2",
    "llama": f"--num-layers 3 --mtp-num-layers 4 {LLAMA} {GROUPED}",
    "widths": f"--num-layers 2 --mtp-num-layers 1 {LLAMA} --kv-channels 12 --ffn-hidden-size 72 --add-qkv-bias",
    "qk-norm": f"--num-layers 2 --mtp-num-layers 1 {LLAMA} --qk-layernorm",
    "one-head": f"--num-layers 2 --mtp-num-layers 3 {LLAMA} --mtp-use-repeated-layer",
    "experts": f"--num-layers 2 --mtp-num-layers 2 {LLAMA} {EXPERTS}",
    "mixed": f"--hybrid-layer-pattern *-*E*E/*E {LLAMA} {EXPERTS}",
    "latent": f"{LATENT} --q-lora-rank 24",
    "latent, queries whole": LATENT,
    "latent with norms": f"{LATENT} --q-lora-rank 24 --qk-layernorm",
}
SLICED = {
    "tp2": ("--tensor-model-parallel-size 2 --num-layers 2 --mtp-num-layers 2", 2),
    "tp2-llama": (f"--tensor-model-parallel-size 2 --num-layers 2 --mtp-num-layers 2 {LLAMA} {GROUPED}", 2),
    "pp2-tied": ("--pipeline-model-parallel-size 2 --num-layers 2 --mtp-num-layers 1", 2),
    "pp2-no-heads": ("--pipeline-model-parallel-size 2 --num-layers 2", 2),
    "pp3-uneven": (
        f"--pipeline-model-parallel-size 3 --num-layers 5 --mtp-num-layers 2 {LLAMA} "
        "--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 1",
        3,
    ),
    "ep2": (f"--expert-model-parallel-size 2 --num-layers 2 --mtp-num-layers 1 {LLAMA} {EXPERTS}", 2),
    "tp2-ep2": (
        f"--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        f"--expert-tensor-parallel-size 1 --num-layers 2 --mtp-num-layers 1 {LLAMA} {EXPERTS}",
        2,
    ),
}


def built(cases: list[str]) -> list[tuple[int, int, int]]:
    """Of each case on this rank: pipeline rank, parameters, of them those of experts."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    results = []
    for flags in cases:
        args = entry.parse([*BASE.split(), *flags.split()])
        config: Any = MTPDModelConfig.from_args(args)
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        sizes = [(p.numel(), ".experts." in name) for name, p in model.named_parameters()]
        rank = parallel_state.get_pipeline_model_parallel_rank()
        results.append((rank, sum(n for n, _ in sizes), sum(n for n, is_expert in sizes if is_expert)))
        parallel_state.destroy_model_parallel()
        unset_global_variables()
    return results


def planned(flags: str, ranks: int) -> list[tuple[int, int, int]]:
    plan = run_from_flags([*BASE.split(), *flags.split()], ranks)
    counts = [parameters.of_rank(plan.model, plan.parallel, rank).total for rank in range(plan.parallel.pp)]
    return [(rank, count.total, count.expert) for rank, count in enumerate(counts)]


def test_whole_models():
    found = run(built, 1, list(WHOLE.values()), timeout=120)[0]
    assert dict(zip(WHOLE, found, strict=True)) == {name: planned(flags, 1)[0] for name, flags in WHOLE.items()}


@pytest.mark.parametrize("ranks", [2, 3])
def test_models_on_several_ranks(ranks):
    cases = {name: flags for name, (flags, number) in SLICED.items() if number == ranks}
    found = run(built, ranks, list(cases.values()), timeout=120)
    for index, (name, flags) in enumerate(cases.items()):
        expected = planned(flags, ranks)
        for of_rank in found:
            assert of_rank[index] == expected[of_rank[index][0]], name


def test_the_whole_is_what_the_ranks_hold_once():
    """Division alone: TP = 2 on two stages of a model without copies."""
    model = Model(64, 256, 8, 4, 512, 1024, ("*-*E", "*E"), "", 0, gated=True, bias=False, norm="RMSNorm", tied=False,
                  experts=4, router_topk=2, expert_ffn=64)  # fmt: skip
    parallel = Parallel(tp=2, pp=2, ep=2, etp=1)
    whole = parameters.whole(model).total
    ranks = [parameters.of_rank(model, parallel, rank).total for rank in range(2)]
    assert sum(count.expert for count in ranks) * 2 == whole.expert
    copied = 7 * 64 + 2 * 64 * 4  # norms and routers
    assert (sum(count.dense for count in ranks) - copied) * 2 == whole.dense - copied
