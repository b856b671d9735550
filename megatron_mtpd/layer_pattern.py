"""The hybrid layer pattern of a plain transformer, from the flags that users of GPT models know.

HybridModel describes a model by one string: `*` attention, `-` dense MLP, `E` mixture of experts, `|` a pipeline stage,
`/` an MTP head. `*-*-|*-*-/*-/*-` is four transformer blocks on two stages, with two heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def layer_pattern(
    num_layers: int,
    num_heads: int,
    mixture_of_experts: bool = False,
    pipeline_size: int = 1,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
) -> str:
    """Pattern of `num_layers` transformer blocks and `num_heads` heads of one block each.

    The heads sit on the last pipeline stage, so giving it fewer blocks (`last_stage_layers`) balances the stages.

    >>> layer_pattern(6, 2, pipeline_size=2, last_stage_layers=2)
    '*-*-*-*-|*-*-/*-/*-'

    Raises ValueError when the blocks cannot be laid out over the stages.
    """
    if num_layers < 1 or num_heads < 0:
        raise ValueError(f"--num-layers {num_layers} and --mtp-num-layers {num_heads}: give at least 1 and 0.")
    block = "*E" if mixture_of_experts else "*-"
    stages: list[int | None] = [None] * pipeline_size
    stages[0] = first_stage_layers
    if last_stage_layers is not None:
        stages[-1] = last_stage_layers
    fixed = sum(n for n in stages if n is not None)
    free = stages.count(None)
    if (free and (num_layers - fixed) % free) or (not free and fixed != num_layers) or num_layers < fixed:
        raise ValueError(
            f"--num-layers {num_layers} cannot be laid out over --pipeline-model-parallel-size {pipeline_size}: "
            f"{num_layers - fixed} blocks are left for {free} stages. Change --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers, or write the stages yourself with --hybrid-layer-pattern."
        )
    share = (num_layers - fixed) // free if free else 0
    return "|".join(block * (share if n is None else n) for n in stages) + ("/" + block) * num_heads


def expand_layer_flags(argv: Sequence[str]) -> list[str]:
    """Replace `--num-layers N --mtp-num-layers K` (and the flags of the stages) by `--hybrid-layer-pattern`.

    Left alone when a pattern is given, or when the layers come from a checkpoint.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--mtp-num-layers", type=int, default=0)
    parser.add_argument("--decoder-first-pipeline-num-layers", type=int)
    parser.add_argument("--decoder-last-pipeline-num-layers", type=int)
    flags, rest = parser.parse_known_args(list(argv))
    if flags.num_layers is None or any(
        a.split("=")[0] in ("--hybrid-layer-pattern", "--use-checkpoint-args") for a in rest
    ):
        return list(argv)
    context = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    context.add_argument("--num-experts", type=int)
    context.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    seen, _ = context.parse_known_args(rest)
    pattern = layer_pattern(
        flags.num_layers,
        flags.mtp_num_layers,
        bool(seen.num_experts),
        seen.pipeline_model_parallel_size,
        flags.decoder_first_pipeline_num_layers,
        flags.decoder_last_pipeline_num_layers,
    )
    return [*rest, "--hybrid-layer-pattern", pattern]
