"""The acceptance benchmark: prompts over the ranks of a cluster, one run for each number of heads.

Each data-parallel replica takes the prompts that are left, in turn, and writes every result as soon as it is there;
there is no communication between replicas until all are done. So a replica that dies, or a bad prompt, costs its own
share alone: what is missing is reported, and the same command continues where it stopped. Plain decoding (0 heads), one
head, and the main head's loss on the prompts are always measured, because speed and acceptance mean nothing without
them. Of a whole run, every checkpoint is measured in a folder of its own, and one table has them all.

Deliberately absent: scoring of answers.
"""

from __future__ import annotations

import hashlib
import random
import sys
import traceback
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_mtpd.checkpoint.iterations import list_checkpoints
from megatron_mtpd.data.tokenizers import Tokenizer, load_tokenizer
from megatron_mtpd.speculative import loading, report, summary
from megatron_mtpd.speculative.decoder import check_drafting
from megatron_mtpd.speculative.prompts import Prompt, read_prompts
from megatron_mtpd.speculative.results import Results, Run
from megatron_mtpd.speculative.worker import TEACHER_FORCED, NumberTokenizer, Options, Worker, max_prompt_tokens


def run(options: Options) -> dict[str, Any] | None:
    """Measure, and on rank 0 write the reports into `options.output` and return what `acceptance.json` holds.

    With `options.every_checkpoint`, what `checkpoints.json` holds. Every rank of the job calls it; one whose share has
    failed ends with an exit status of 1, except rank 0, whose result says that it is not complete. Raises ValueError or
    CheckpointError before anything is measured or written.
    """
    loading.start_distributed(options.tensor_parallel)
    # Where all ranks meet at the end. gloo, also with GPUs: NCCL would end this process instead of raising. And without
    # a limit to speak of: a replica may take far longer than another.
    everyone: Any = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    found, failed = (_run_every if options.every_checkpoint else _run_one)(options, everyone)
    if failed and dist.get_rank():
        sys.exit(1)
    return found


def _run_every(options: Options, everyone: Any) -> tuple[dict[str, Any] | None, bool]:
    saved = [saved for saved in list_checkpoints(options.load) if saved.state == "complete"]
    if not saved:
        raise ValueError(f"--load {options.load}: --every-checkpoint needs the folder of a run, with its checkpoints.")
    summaries, failed = [], False
    for number, one in enumerate(saved, 1):
        if dist.get_rank() == 0:
            print(f"checkpoint {number} of {len(saved)}: {one.directory}", file=sys.stderr, flush=True)
        output = options.output / one.directory.name
        found, failure = _run_one(replace(options, every_checkpoint=False, load=one.directory, output=output), everyone)
        summaries.append(found)
        failed |= failure
    if dist.get_rank():
        return None, failed
    whole = {"checkpoints": summaries, "complete": all(found["complete"] for found in summaries)}
    report.write_checkpoints(whole, options.output)
    return whole, failed


def _run_one(options: Options, everyone: Any) -> tuple[dict[str, Any] | None, bool]:
    """The summary, on rank 0, and whether this rank's share has failed."""
    prompts = _chosen(read_prompts(options.prompts), options)
    loaded = loading.load(options.load, options.ckpt_step, options.dtype)
    tokenizer = _tokenizer(loaded.args, options)
    check_drafting(options.min_confidence, options.draft_vocab_size, tokenizer.vocab_size)
    runs = _runs(options, loaded.num_heads)
    settings = _settings(options, loaded, prompts)
    rank = dist.get_rank()
    results = Results(options.output, settings, rank)
    worker = Worker(options, loaded, tokenizer, prompts, results)
    failed = False
    try:
        for current in runs:
            worker.run(current)
    except Exception:  # this replica's share is lost, and only that
        failed = True
        print(f"rank {rank} failed, the others go on:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    results.close()
    _wait_for_all(everyone)
    if rank:
        return None, failed
    found = summary.summarize(prompts, list(results.lines()), runs, settings)
    report.write(found, options.output)
    return found, failed


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
        "draft_vocab_size": options.draft_vocab_size,
        "ignore_eod": options.ignore_eod,
        "seed": options.seed,
    }


def _wait_for_all(everyone: Any) -> None:
    """Until every rank is done, or one is found dead."""
    try:
        dist.barrier(group=everyone)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        print(f"A rank died; the report holds what is there ({why}).", file=sys.stderr, flush=True)
