"""A checkpoint of the decoding toy, with the arguments that training would keep."""

from __future__ import annotations

from pathlib import Path

from megatron_mtpd.training import pretrain  # first: it prepares the machine

# isort: split
from megatron.core import dist_checkpointing

from megatron_mtpd.model import MTPDModel
from megatron_mtpd.speculative import loading
from tests.unit.speculative.toys import set_weights

HEADS, ITERATION, TOKENS = 3, 7, 95
FLAGS = f"""
--hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention --num-query-groups 2
--num-layers 2 --mtp-num-layers {HEADS} --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8
--mock-data --tokenizer-type NullTokenizer --vocab-size {TOKENS} --micro-batch-size 1 --train-iters 1 --lr 1e-3
--ckpt-format torch_dist
"""


def save_checkpoint(directory: str, tensor_parallel: int = 1) -> MTPDModel:
    """Write it, from a job of `tensor_parallel` ranks, and return its model. The padded vocabulary is 96."""
    loading.start_distributed(tensor_parallel)
    pretrain.sys.argv = ["test"]
    args = pretrain.parse([*FLAGS.split(), "--tensor-model-parallel-size", str(tensor_parallel)])
    model = loading.build(loading.decoding_args(args, HEADS, tensor_parallel))
    set_weights(model)
    Path(directory).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({"args": args, "iteration": ITERATION, **model.sharded_state_dict()}, directory)
    return model
