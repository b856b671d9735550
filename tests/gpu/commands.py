"""The models that these tests train, and their training by the package's own command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.machine import DRY_RUN, HAS_TE, ROOT, python

COMMON = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --bf16"
)
SMALL = (
    "--hidden-size 512 --ffn-hidden-size 1536 --num-attention-heads 8 --seq-length 256 --max-position-embeddings 256 "
    "--vocab-size 4095 --micro-batch-size 8"
)
TINY = (
    "--hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 255 --micro-batch-size 2"
)
DENSE = "--num-layers 4 --mtp-num-layers 2 --group-query-attention --num-query-groups 2"
MIXTURE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-router-dtype fp32 "
    "--moe-token-dispatcher-type alltoall"
)
EXPERTS = f"--hybrid-layer-pattern *-*E*E/*E/*E --group-query-attention --num-query-groups 2 {MIXTURE}"
# Widths of a head as DeepSeek-V3 has them: attention kernels are chosen by them.
LATENT = (
    "--hybrid-layer-pattern +-+E/+E/+E --multi-latent-attention --q-lora-rank 128 --kv-lora-rank 64 --qk-head-dim 128 "
    "--qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --moe-shared-expert-intermediate-size 256 "
    f"--moe-router-score-function sigmoid --moe-router-enable-expert-bias {MIXTURE}"
)
# The 2B model of slurm/configs, with as many layers as leave room for the optimizer on one GPU.
SHORT_2B = (
    "--num-layers 8 --mtp-num-layers 4 --hidden-size 2048 --ffn-hidden-size 6144 --num-attention-heads 16 "
    "--group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 "
    "--vocab-size 122879 --micro-batch-size 2"
)
# The same with 1,024 tokens, so that the eager loss fits beside everything else.
SHORT_2B_1024 = SHORT_2B.replace("4096", "1024").replace("--micro-batch-size 2", "--micro-batch-size 1")
LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm"]
TRAINING = (
    "--lr 1e-3 --lr-decay-style constant --log-interval 1 --seed 1 --eval-iters 0 --eval-interval 100000 "
    "--ckpt-format torch_dist --split 1,0,0 --mtpd-distill-start 0"
)


def small(layers: str = DENSE) -> list[str]:
    """The flags of a model with these layers that trains in seconds."""
    return _model(f"{layers} {TINY if DRY_RUN else SMALL}")


def wide(sizes: str) -> list[str]:
    """The flags of a model of real width; of a tiny one in a dry run."""
    return _model(f"{DENSE} {TINY}" if DRY_RUN else sizes)


def _model(flags: str) -> list[str]:
    # A plan takes Transformer Engine for granted unless the flags say otherwise.
    return [*flags.split(), *COMMON.split(), *([] if HAS_TE else ["--transformer-impl", "local"])]


@dataclass(frozen=True)
class Training:
    """What a training run left: a record an iteration, and its checkpoints where it saved some."""

    records: list[dict]
    checkpoints: Path

    def curve(self, metric: str = "lm loss") -> list[float]:
        return [record[metric] for record in self.records if metric in record]


def train(
    folder: Path, flags: list[str], iterations: int, save_interval: int | None = None, ranks: int = 1, **more: str
) -> Training:
    """tools/pretrain_mtpd.py, in a folder of its own. Raises AssertionError with the end of its output."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks] if ranks > 1 else []
    saving = [] if save_interval is None else ["--save", checkpoints, "--save-interval", save_interval]
    command = [*launcher, ROOT / "tools" / "pretrain_mtpd.py", *TRAINING.split(), *flags]
    python(*command, "--train-iters", iterations, "--metrics-jsonl", metrics, *saving, **more)
    return Training([json.loads(line) for line in metrics.read_text().splitlines()], checkpoints)
