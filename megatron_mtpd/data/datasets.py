"""Megatron's GPT datasets from the parsed arguments, and one micro-batch of them for this rank.

Deliberately absent: tokenization (see `preprocess.py`); samplers and data loaders, which are Megatron's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """The configuration of Megatron's GPT dataset that the arguments ask for."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=_has_mask(args),
    )


def train_valid_test_datasets_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[GPTDataset, GPTDataset, GPTDataset]:
    """Train, validation and test datasets, in the form that `megatron.training.pretrain` asks for."""
    args = get_args()

    def is_built_on_rank() -> bool:
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return False  # the first tensor-parallel rank broadcasts to the others
        ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        return ends or _has_mask(args)

    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset_class, num_samples, is_built_on_rank, dataset_config(args)).build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # read by Megatron


def _has_mask(args: Namespace) -> bool:
    """Whether there is an attention mask: where it would say that attention is causal and no more, which every layer
    knows, there is none, because kernels without one are faster and need less memory. All stages need it."""
    return args.reset_attention_mask and args.create_attention_mask_in_dataloader


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None = None) -> dict[str, Any]:
    """This rank's part of the next micro-batch: the entries of `BATCH_KEYS`, [b, s], or None where not needed here.

    The first tensor-parallel rank reads and broadcasts; under context parallelism each rank keeps its part of the
    sequence. Heads need tokens as well as labels, so the stage that holds them gets both; a stage in the middle gets
    the attention mask where documents are told apart.
    """
    args = get_args()
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last or _has_mask(args)):
        return dict.fromkeys(BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        if data_iterator is None:
            raise RuntimeError("This rank has to read the data and got no iterator.")
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) if key in data else None for key in BATCH_KEYS}
    if not (first or last):  # for these Megatron has nothing: their layers would see across documents
        return dict.fromkeys(BATCH_KEYS) | {"attention_mask": _broadcast_mask(batch.get("attention_mask"), args)}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=_has_mask(args),
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_on_this_rank(mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def _broadcast_mask(mask: Tensor | None, args: Namespace) -> Tensor:
    if mask is None:
        shape = (args.micro_batch_size, 1, args.seq_length, args.seq_length)
        mask = torch.empty(shape, dtype=torch.bool, device=torch.cuda.current_device())
    source, group = (
        parallel_state.get_tensor_model_parallel_src_rank(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    torch.distributed.broadcast(mask, source, group=group)
    return mask
