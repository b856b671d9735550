"""Train Megatron's own GPTModel with its own MTP heads, on flags as tools/pretrain_mtpd.py takes them, on a CPU too.

Not a test: the start of one. Nothing of this package takes part but what makes Megatron run on a CPU, and the data.
"""

import sys
from functools import partial

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megatron_mtpd.data.datasets import get_batch, train_valid_test_datasets_provider  # noqa: E402
from megatron_mtpd.specs import SDPAttention, hybrid_stack_spec  # noqa: E402
from megatron_mtpd.training.arguments import add_mtpd_arguments  # noqa: E402


def forward_step(data_iterator, model):
    batch = get_batch(data_iterator, vp_stage=None)
    mask = batch["loss_mask"]
    losses = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"], loss_mask=mask
    )
    return losses, partial(loss_func, mask)


def loss_func(mask, losses):
    loss, count = (losses.float() * mask).sum(), mask.sum()
    return loss, count.int(), {"lm loss": torch.stack([loss.detach(), count])}


if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=add_mtpd_arguments)
    platform.check_flags(sys.argv[1:])
    config = gpt_config_from_args(args)
    hybrid_stack_spec(config.transformer)  # settles what local modules need
    LocalSpecProvider.core_attention = lambda self: SDPAttention  # Megatron's own makes masks on a GPU
    container = pretrain_cfg_container_from_args(args, config)
    store = torch.distributed.HashStore() if args.world_size == 1 else None
    model_type = ModelType.encoder_or_decoder
    pretrain(container, train_valid_test_datasets_provider, model_type, forward_step, store=store)
