"""The entry of training: flags, configuration, checks, then `megatron.training.pretrain`.

Importing this module prepares the machine (`platform.setup`), because Megatron must not be imported before.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron_mtpd import platform

platform.setup()

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import get_tensorboard_writer, get_tokenizer, pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megatron_mtpd.checkpoint.metadata import CheckpointError  # noqa: E402
from megatron_mtpd.config import MTPDConfig  # noqa: E402
from megatron_mtpd.data.datasets import train_valid_test_datasets_provider  # noqa: E402
from megatron_mtpd.layer_pattern import expand_layer_flags  # noqa: E402
from megatron_mtpd.model import MTPDModelConfig  # noqa: E402
from megatron_mtpd.training.arguments import add_mtpd_arguments, mtpd_config_from_args  # noqa: E402
from megatron_mtpd.training.deepspeed_config import deepspeed_config_from_args  # noqa: E402
from megatron_mtpd.training.forward_step import forward_step  # noqa: E402
from megatron_mtpd.training.metrics import MetricsWriter  # noqa: E402
from megatron_mtpd.training.trainable import freeze, settle_old_heads  # noqa: E402


def parse(argv: Sequence[str]) -> Namespace:
    """Megatron's arguments from our command line, checked; sets Megatron's global state.

    Raises ValueError for flags that cannot work here, before anything is built.
    """
    if problem := platform.unusable_gpus():
        raise ValueError(problem)
    sys.argv[1:] = expand_layer_flags(argv)
    platform.check_flags(sys.argv[1:])
    return parse_and_validate_args(extra_args_provider=add_mtpd_arguments)


def model_config_from_args(args: Namespace) -> MTPDModelConfig:
    """The model that the arguments describe. Raises ValueError for a combination that cannot work."""
    settle_old_heads(args)
    mtpd = mtpd_config_from_args(args)
    if args.engine == "deepspeed":
        model_config = _deepspeed_model_config(args, mtpd)
    else:
        model_config = MTPDModelConfig.from_args(args)
    model_config.mtpd = mtpd
    model_config.pre_wrap_hooks.append(partial(freeze, config=mtpd))
    model_config.eod_token_id = get_tokenizer().eod
    return model_config


def _deepspeed_model_config(args: Namespace, mtpd: MTPDConfig) -> MTPDModelConfig:
    deepspeed = deepspeed_config_from_args(args, mtpd)
    platform.prepare_deepspeed()
    from megatron_mtpd.training.deepspeed_engine import DeepSpeedModelConfig, checked  # an extra

    model_config = DeepSpeedModelConfig.from_args(args)
    model_config.deepspeed = checked(deepspeed)
    args.use_distributed_optimizer = True  # what ZeRO is; checkpoints have that layout
    return model_config


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain as the command line asks (default: sys.argv). Every rank calls it."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        model_config = model_config_from_args(args)
    except ValueError as error:
        _fail(error)
    _report_to(args, model_config.mtpd)
    # Started without torchrun there is one process, and no address to meet at.
    store = torch.distributed.HashStore() if args.world_size == 1 else None
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
        )
    except CheckpointError as error:  # every rank raises it, before anything is loaded
        _fail(error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _fail(error: Exception) -> NoReturn:
    """End with a line for the user, who can mend it, instead of a traceback of every rank."""
    sys.exit(f"pretrain_mtpd.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 2)


def _report_to(args: Namespace, mtpd: MTPDConfig) -> None:
    """Put our writer in the place of Megatron's, on the rank that has one."""
    writer = get_tensorboard_writer()
    jsonl = args.metrics_jsonl
    if jsonl is None and args.tensorboard_dir:
        jsonl = Path(args.tensorboard_dir) / "metrics.jsonl"
    if args.rank != args.world_size - 1 or (writer is None and jsonl is None):
        return
    metrics = MetricsWriter(writer, jsonl, args.mtp_num_layers, platform.heads_grad_norm)
    rows = [f"| {f.name} | {getattr(mtpd, f.name)} |" for f in dataclasses.fields(mtpd)]
    metrics.add_text("mtpd", "\n".join(["| option | value |", "|---|---|", *rows]))
    metrics.add_text("command", "    " + " ".join(sys.argv))
    platform.set_tensorboard_writer(metrics)
    atexit.register(metrics.close)


if __name__ == "__main__":
    main()
