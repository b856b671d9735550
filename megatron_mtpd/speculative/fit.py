"""`tools/fit_heads.py`: a checkpoint, text, and the checkpoint with fitted heads.

Deliberately absent: the mathematics (`fitting`), and how the result is written (`checkpoint.replacing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mtpd.checkpoint.extend import extend
from megatron_mtpd.checkpoint.files import Progress
from megatron_mtpd.checkpoint.iterations import resolve
from megatron_mtpd.checkpoint.looping import make_plan
from megatron_mtpd.checkpoint.metadata import read_metadata
from megatron_mtpd.checkpoint.replacing import plan_replacement
from megatron_mtpd.data.excerpts import draw, parse_blend
from megatron_mtpd.speculative import loading
from megatron_mtpd.speculative.fitting import ZEROED, fit_heads, held_out, usable
from megatron_mtpd.speculative.options import require_at_least
from megatron_mtpd.speculative.teacher_forced import measure

MEASURED = 4096
"""Tokens of the held-out text that the fitted heads are measured on."""


@dataclass(frozen=True)
class Options:
    """What to fit, to what, and where to. Raises ValueError for values that cannot work."""

    load: Path
    save: Path
    data_path: list[str]
    tokens: int | None = None
    seq_length: int = 256
    batch_size: int = 8
    tensor_parallel: int = 1
    ckpt_step: int | None = None
    dtype: str | None = None
    seed: int = 1234
    force: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, tokens=1, seq_length=8, batch_size=1)
        if self.save.is_dir() and any(self.save.iterdir()) and not self.force:
            raise ValueError(f"--save {self.save} is not empty: name another directory, or give --force.")


def run(options: Options) -> dict[str, Any] | None:
    """Fit, and on rank 0 write the checkpoint and return what was found. Every rank of the job calls it.

    Raises ValueError or CheckpointError before anything is computed for a checkpoint or data that cannot be used,
    and what `extend` raises.
    """
    blend = parse_blend(options.data_path)
    _, directory = resolve(options.load, options.ckpt_step)
    make_plan(options.load, read_metadata(directory).num_heads, ckpt_step=options.ckpt_step)  # may refuse it
    loading.start_distributed(options.tensor_parallel)
    loaded = loading.load(options.load, options.ckpt_step, options.dtype)
    model, args = loaded.model, loaded.args
    length = min(options.seq_length, args.max_position_embeddings)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    tokens = options.tokens or 64 * model.config.hidden_size
    texts = usable(draw(blend, -(-tokens // replicas), length, (options.seed, replica)), loaded.num_heads)

    def progress(part: str, total: int) -> Progress:
        return Progress(part if dist.get_rank() == 0 else None, total, unit="token")

    fits = fit_heads(model, texts, args.vocab_size or args.padded_vocab_size, options.batch_size, progress)
    measured = held_out(texts)[: max(1, MEASURED // length)]
    report = measure(model, measured, options.batch_size).report()
    if dist.get_rank():
        return None
    final_norm = {name: value.cpu() for name, value in model.decoder.final_norm.state_dict().items()}
    plan = plan_replacement(options.load, options.ckpt_step, [fit.weights for fit in fits], final_norm, ZEROED)
    extend(plan, options.save, force=options.force)
    return {
        "tokens": sum(map(len, texts)) * replicas,
        "measured_tokens": sum(map(len, measured)),
        "heads": [{"ridge": fit.ridge, "explained": fit.explained} for fit in fits],
        **report,
    }


def for_terminal(found: dict[str, Any], save: Path) -> str:
    """What `run` found, as a table."""
    lines = [
        f"Fitted to {found['tokens']:,} tokens, a tenth of them held out; measured on {found['measured_tokens']:,} of "
        f"those, where the main head's loss is {found['main_loss']:.4f} nats a token, as it was.",
        "",
        "Explained, in % of the held-out targets' squares, by each map and those before it:",
        "",
        "head" + "".join(f"{_short(name):>13}" for name in found["heads"][0]["explained"]) + "    loss   CAR %",
    ]
    columns = zip(found["heads"], found["heads_loss"], found["cumulative_acceptance_rate"], strict=True)
    for number, (head, loss, rate) in enumerate(columns, 1):
        shares = "".join(f"{share:>13.1%}" for share in head["explained"].values())
        lines.append(f"{number:>4}{shares}{loss:>8.3f}{rate:>8.1%}")
    return "\n".join([*lines, "", f"written to {save}; train from it: --load {save} --mtpd-train heads"])


def _short(name: str) -> str:
    return name.rpartition(".")[2]
