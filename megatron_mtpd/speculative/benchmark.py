"""The acceptance benchmark: prompts over the ranks of a cluster, one run for each number of heads.

Each data-parallel replica takes the prompts that are left, in turn, and writes every result as soon as it is there;
there is no communication between replicas until all are done. So a replica that dies, or a bad prompt, costs its own
share alone: what is missing is reported, and the same command continues where it stopped. Plain decoding (0 heads), one
head, and the main head's loss on the prompts are always measured, because speed and acceptance mean nothing without
them.

Deliberately absent: scoring of answers.
"""

from __future__ import annotations

import hashlib
import logging
import random
import sys
import traceback
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_mtpd.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mtpd.speculative import loading, report
from megatron_mtpd.speculative.prompts import Prompt, read_prompts
from megatron_mtpd.speculative.results import Results, Run
from megatron_mtpd.speculative.worker import TEACHER_FORCED, NumberTokenizer, Options, Worker, max_prompt_tokens

logger = logging.getLogger(__name__)


def run(options: Options) -> dict[str, Any] | None:
    """Measure, and on rank 0 write the reports into `options.output` and return what `acceptance.json` holds.

    Every rank of the job calls it. Raises ValueError or CheckpointError before anything is measured or written.
    """
    loading.start_distributed(options.tensor_parallel)
    prompts = _chosen(read_prompts(options.prompts), options)
    loaded = loading.load(options.load, options.ckpt_step, options.dtype)
    tokenizer = _tokenizer(loaded.args, options)
    runs = _runs(options, loaded.num_heads)
    settings = _settings(options, loaded, prompts)
    rank = dist.get_rank()
    results = Results(options.output, settings, rank)
    worker = Worker(options, loaded, tokenizer, prompts, results)
    failure = None
    try:
        for current in runs:
            worker.run(current)
    except Exception:  # this replica's share is lost, and only that
        failure = traceback.format_exc()
        print(f"rank {rank} failed, the others go on:\n{failure}", file=sys.stderr, flush=True)
    results.close()
    _wait_for_all()
    if rank != 0:
        if failure:
            sys.exit(1)
        return None
    summary = report.summarize(prompts, list(results.lines()), runs, settings)
    report.write(summary, options.output)
    if not summary["complete"]:
        logger.warning("%d results are missing: run the same command again.", summary["num_missing"])
    return summary


def _chosen(prompts: list[Prompt], options: Options) -> list[Prompt]:
    if options.limit is None:
        return prompts
    kept: list[Prompt] = []
    for benchmark in dict.fromkeys(p.benchmark for p in prompts):
        of_it = [p for p in prompts if p.benchmark == benchmark]
        number = min(options.limit, len(of_it))
        kept += [of_it[i] for i in sorted(random.Random(options.seed).sample(range(len(of_it)), number))]
    return kept


def _tokenizer(args: Any, options: Options) -> Tokenizer:
    kind = options.tokenizer_type or args.tokenizer_type
    if kind == NumberTokenizer.type:
        return NumberTokenizer(args.vocab_size)
    return load_tokenizer(kind, options.tokenizer_model or str(args.tokenizer_model))


def _runs(options: Options, available: int) -> list[Run]:
    asked = options.num_heads or [available]
    for number in asked:
        if not 0 <= number <= available:
            raise ValueError(
                f"--num-heads {number}: the checkpoint has {available} heads; give 0 (plain) to {available}."
            )
    decoding: list[Run] = [*sorted({0, *([1] if available else []), *asked})]
    return [TEACHER_FORCED] if options.teacher_forced_only else [TEACHER_FORCED, *decoding]


def _settings(options: Options, loaded: loading.Loaded, prompts: list[Prompt]) -> dict[str, Any]:
    """What decides the results; the layout and the list of runs may change between sessions."""
    return {
        "checkpoint": str(loaded.directory.resolve()),
        "iteration": loaded.iteration,
        "prompts": hashlib.sha256(repr(prompts).encode()).hexdigest(),
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens(options, loaded),
        "dtype": str(loaded.args.params_dtype).removeprefix("torch."),
        **asdict(options.sampling),
        "min_confidence": options.min_confidence,
        "mask_position_0": options.mask_position_0,
        "ignore_eod": options.ignore_eod,
        "seed": options.seed,
    }


def _wait_for_all() -> None:
    """Until every rank is done, or one is found dead."""
    try:
        dist.barrier()
    except RuntimeError as error:
        logger.warning("A rank died; the report holds what is there (%s).", str(error).splitlines()[0])
