"""What the results of single prompts add up to: all that `acceptance.json` holds.

Counts are sums over prompts. Speed is the sum over replicas of tokens over busy time, so it says what all of them do at
once and not how evenly the last prompts were spread. A speedup compares with the same prompts and batch size.

Deliberately absent: measuring, and showing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, fields
from typing import Any

from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative import cost
from megatron_mtpd.speculative.counts import Acceptance
from megatron_mtpd.speculative.prompts import Prompt
from megatron_mtpd.speculative.teacher_forced import TeacherForced

OVERALL = "overall"


def summarize(
    prompts: list[Prompt], lines: list[dict[str, Any]], runs: list[int | str], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything that `acceptance.json` holds. `lines`: the results of single prompts, whatever their order."""
    lines = sorted((line for line in lines if line["prompt"] < len(prompts)), key=lambda line: line["prompt"])
    good: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    failed: dict[int, str] = {}
    for line in lines:
        if "error" in line:
            failed[line["prompt"]] = line["error"]
        else:
            good[line["run"]].append(line)
    names = [OVERALL, *dict.fromkeys(p.benchmark for p in prompts)]
    decoding = sorted(run for run in good if isinstance(run, int))
    found = {run: {n: _run(good[run], prompts, n) for n in names} for run in decoding}
    for run, by_name in found.items():
        for name, values in by_name.items():
            speeds = {base: found[base][name]["tokens_per_second"] for base in (0, 1) if base in found}
            values["tokens_per_second_autoregressive"] = speeds.get(0)
            values["speedup_vs_autoregressive"] = _ratio(values["tokens_per_second"], speeds.get(0))
            values["speedup_vs_one_head"] = _ratio(values["tokens_per_second"], speeds.get(1))
        if run and settings["temperature"] == 0:
            plain = {line["prompt"]: line["tokens"] for line in good[0]}
            both = [line for line in good[run] if line["prompt"] in plain]
            equal = sum(line["tokens"] == plain[line["prompt"]] for line in both)
            by_name[OVERALL]["outputs_equal_to_plain"] = f"{equal} of {len(both)}"
    forced = {n: _teacher_forced(good["teacher_forced"], prompts, n) for n in names}
    missing = sum(len(prompts) - sum(line["run"] == run for line in lines) for run in runs)
    return {
        "runs": [{"num_heads": k, **v[OVERALL], "benchmarks": {n: v[n] for n in names[1:]}} for k, v in found.items()],
        "teacher_forced": {**forced[OVERALL], "benchmarks": {n: forced[n] for n in names[1:]}},
        "step_cost": _cost(found, good),
        "num_prompts": len(prompts),
        "num_truncated_prompts": sum(line["cut"] > 0 for line in good["teacher_forced"]),
        "failed_prompts": [{"prompt": prompts[i].name, "error": why} for i, why in sorted(failed.items())],
        "complete": not missing,
        "num_missing": missing,
        "settings": settings,
        "provenance": {**provenance(), **{name: settings[name] for name in ("checkpoint", "iteration")}},
    }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _of(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> list[dict[str, Any]]:
    return [line for line in lines if name in (OVERALL, prompts[line["prompt"]].benchmark)]


def _run(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> dict[str, Any]:
    lines = _of(lines, prompts, name)
    counts = [Acceptance(**line["acceptance"]) for line in lines]
    tokens, seconds = defaultdict(int), defaultdict(float)
    for line in lines:
        tokens[line["rank"]] += len(line["tokens"])
        seconds[line["rank"]] += line["seconds"]
    return {
        **sum(counts[1:], counts[0] if counts else Acceptance()).report(),
        "num_prompts": len(lines),
        "num_tokens": sum(tokens.values()),
        "num_steps": sum(line["num_steps"] for line in lines),
        "tokens_per_second": sum(tokens[rank] / seconds[rank] for rank in tokens) or None,
    }


def _teacher_forced(lines: list[dict[str, Any]], prompts: list[Prompt], name: str) -> dict[str, Any]:
    total = None
    for line in _of(lines, prompts, name):
        values: dict[str, Any] = {f.name: line[f.name] for f in fields(TeacherForced)}
        one = TeacherForced(Acceptance(**values.pop("acceptance")), **values)
        total = one if total is None else total + one
    return total.report() if total else {"main_loss": None}


def _cost(found: dict[int, dict[str, Any]], good: dict[Any, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The fitted cost of a step, and what it predicts beside what was measured, by number of heads.

    Of one replica, without the prompts' own passes. The rates are those of the run with the most heads.
    """
    measured: dict[int, dict[str, float]] = {}
    for run in found:
        lines = [line for line in good[run] if line["num_steps"]]
        if steps := sum(line["num_steps"] for line in lines):
            draft = sum(line["draft_seconds"] for line in lines)
            verify = sum(line["seconds"] - line["prefill_seconds"] for line in lines) - draft
            tokens = sum(len(line["tokens"]) - 1 for line in lines)  # the first is the prompt's
            measured[run] = {
                "draft_seconds_per_step": draft / steps,
                "verify_seconds_per_step": verify / steps,
                "tokens_per_step": tokens / steps,
                "tokens_per_second": tokens / (draft + verify),
            }
    if len(measured) < 2:
        return None
    most = max(measured)
    rates = [rate or 0.0 for rate in found[most][OVERALL]["cumulative_acceptance_rate"]]
    times = [{run: m[f"{part}_seconds_per_step"] for run, m in measured.items()} for part in ("draft", "verify")]
    fitted = cost.fit(times[0], times[1], rates)
    predicted = {
        run: {
            "draft_seconds_per_step": fitted.draft_seconds(rates, run),
            "verify_seconds_per_step": fitted.verify_seconds(run),
            "tokens_per_step": cost.tokens_per_step(rates, run),
            "tokens_per_second": fitted.tokens_per_second(rates, run),
        }
        for run in range(most + 1)
    }
    return {
        "seconds": asdict(fitted),
        "by_num_heads": [
            {"num_heads": run, "predicted": values, "measured": measured.get(run)} for run, values in predicted.items()
        ],
        "best_num_heads_predicted": fitted.best_num_heads(rates),
        "best_num_heads_measured": max(measured, key=lambda run: measured[run]["tokens_per_second"]),
    }
