"""What the retrofit shows: RESULTS.md, retrofit_smollm2.png and all numbers in retrofit_smollm2.json."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy import final_validation

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.provenance import provenance
from megatron_mtpd.speculative import end_to_end
from megatron_mtpd.speculative.results import Run, read_lines
from megatron_mtpd.speculative.worker import TEACHER_FORCED

SHOWN = (1, 2, 3, 4, 8, 16)
COMPARED = {"answers": TEACHER_FORCED, "acceptance": 4, "sampled": 4}
"""By folder of a stage: the run in it that plain MTP and MTP-D are compared by."""


def write(stages: Sequence[tuple[Any, Path]], out: Path, options: dict[str, Any]) -> str:
    """Write all three into `out`, and return the text of RESULTS.md. `stages`: each with its folder."""
    rows = [_row(stage, folder) for stage, folder in stages]
    folders = {stage.name: folder for stage, folder in stages}
    gains = {how: gain(folders["mtp"] / how, folders["mtpd"] / how, run) for how, run in COMPARED.items()}
    speed = json.loads((out / "speed.json").read_text())
    generated = json.loads((out / "generated" / "summary.json").read_text())
    found = {"stages": rows, "gains": gains, "speed": speed, "generated": generated, "decoding_dtype": speed["dtype"]}
    if (path := out / "vllm" / "compared.json").exists():
        found["vllm"] = json.loads(path.read_text())
    measured = json.loads((folders["mtpd"] / "answers" / "acceptance.json").read_text())["provenance"]
    document = {**found, "options": options, "measured": measured, "provenance": provenance()}
    text = markdown(document, rows)
    with written_whole(out / "retrofit_smollm2.json") as file:
        file.write(json.dumps(document, indent=1, default=str).encode())
    draw(rows, speed["rows"], out / "retrofit_smollm2.png")
    with written_whole(out / "RESULTS.md") as file:
        file.write(text.encode())
    return text


def _row(stage: Any, folder: Path) -> dict[str, Any]:
    answers = json.loads((folder / "answers" / "acceptance.json").read_text())
    command = ["--tensorboard-dir", str(folder / "tensorboard")]
    return {
        "name": stage.name,
        "title": stage.title,
        "heads": stage.heads,
        "trained": stage.trains,
        "answers": {"num_prompts": answers["num_prompts"], **answers[TEACHER_FORCED]},
        "greedy": _decoded(folder / "acceptance" / "acceptance.json", stage.heads),
        "sampled": _decoded(folder / "sampled" / "acceptance.json", stage.heads),
        "validation": final_validation(command) if stage.trains else None,
    }


def _decoded(path: Path, heads: int) -> dict[str, Any] | None:
    """The run with all heads, or None where there was none."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    run = next(run for run in found["runs"] if run["num_heads"] == heads)
    return {"num_prompts": found["num_prompts"], "main_loss": found[TEACHER_FORCED]["main_loss"], **run}


def gain(plain: Path, distilled: Path, run: Run, heads: int = 4, resamples: int = 10_000) -> list[dict[str, float]]:
    """CAR_1, CAR_2, ... of the second less the first's, in points, with their 95 % intervals: a bootstrap over the
    prompts, which both have answered, because the drafts of one prompt are alike."""
    counts = [_counts(folder, run) for folder in (plain, distilled)]
    prompts = sorted(counts[0].keys() & counts[1].keys())
    table = np.array([[counts[which][prompt] for prompt in prompts] for which in (0, 1)], dtype=float)
    drawn = np.random.default_rng(0).integers(len(prompts), size=(resamples, len(prompts)))
    found = []
    for head in range(heads):
        accepted, drafts = table[:, :, 0, head], table[:, :, 1, head]
        rates = 100 * accepted.sum(1) / drafts.sum(1)
        sampled = 100 * accepted[:, drawn].sum(2) / drafts[:, drawn].sum(2)
        low, high = np.percentile(sampled[1] - sampled[0], [2.5, 97.5])
        found.append({"points": float(rates[1] - rates[0]), "low": float(low), "high": float(high)})
    return found


def _counts(folder: Path, run: Run) -> dict[int, list[list[int]]]:
    """By prompt: drafts whose first 1, 2, ... tokens were accepted, and all drafts that had so many."""
    found = {}
    for line in read_lines(folder):
        acceptance = line.get("acceptance", {})
        if line["run"] == run and acceptance.get("num_drafts"):
            found[line["prompt"]] = [acceptance[f"num_{what}_tokens_per_pos"] for what in ("accepted", "draft")]
    return found


def markdown(document: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    lines = [*_introduction(document, rows), *_acceptance(rows, document["gains"]), *_speed(document)]
    if "vllm" in document:
        lines += _vllm(document["vllm"])
    return "\n".join(lines) + "\n"


def _introduction(document: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    options, source, generated = document["options"], document["measured"], document["generated"]
    hardware = source["hardware"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware.get('cores', '?')} cores"
    tokens = options["steps"] * options["batch"] * 256
    losses = " or ".join(dict.fromkeys(f"{row['greedy']['main_loss']:.4f}" for row in rows if row["greedy"]))
    return [
        f"# {options['model'] or 'SmolLM2-135M-Instruct'} with four heads",
        "",
        f"`{_command(options)}`, measured {source['date']} at commit {(source['commit'] or 'unknown')[:10]}, "
        f"{machine}. Trained in {options['dtype']}, measured in {document['decoding_dtype']}. One seed.",
        "",
        "Heads start as copies of the trunk's last layer, fitted in closed form (`tools/fit_heads.py`) to text that "
        "training sees too.",
        "",
        f"Each variant's heads saw {tokens:,} tokens: half Python's standard library, half from the "
        f"{generated['tokens']:,} tokens of {generated['documents']} questions and answers that the model wrote. "
        "Measured on functions of HumanEval and questions of MMLU and GSM8K in the chat template, half and half, none "
        "of which was trained on.",
        "",
        "The trunk was frozen, so the main head is the same in every row, by construction: its loss on the prompts is "
        f"{losses} nats a token, and the output is what it was without heads.",
        "",
    ]


def _command(options: dict[str, Any]) -> str:
    words = ["python", "examples/retrofit_smollm2/run.py"]
    for name in ("steps", "batch", "lr", "questions", "answers", "prompts", "dtype", "seed"):
        words += [f"--{name}", f"{options[name]:g}" if isinstance(options[name], float) else str(options[name])]
    if options["model"]:
        words += ["--model", str(options["model"])]
    if options["further"]:
        words += ["--further", "--new-steps", str(options["new_steps"])]
    return shlex.join(words)


def _acceptance(rows: list[dict[str, Any]], gains: dict[str, list[dict[str, float]]]) -> list[str]:
    answers = rows[0]["answers"]
    greedy = {row["title"]: row["greedy"] for row in rows if row["greedy"]}
    sampled = {row["title"]: row["sampled"] for row in rows if row["sampled"]}
    number = next(iter(greedy.values()))["num_prompts"]
    lines = [
        "## Acceptance",
        "",
        "CAR_k: heads 1 to k all accepted, in % of the drafts; the interval of CAR_4 (95 %) takes drafts as "
        "independent, and the tokens of a step are the main head's one and the mean of what is accepted.",
        "",
        f"Greedily, had a draft begun at each of the {answers['main_loss_tokens']:,} tokens of the model's answers to "
        f"{answers['num_prompts']} prompts, of which the main head's loss is {answers['main_loss']:.4f} nats a token "
        "(more than four heads: to a quarter of the prompts):",
        "",
        *_table({row["title"] + ("" if row["trained"] else ", untrained"): row["answers"] for row in rows}),
        "",
        f"Greedily, by decoding, up to 64 tokens for each of {number} prompts:",
        "",
        *_table(greedy),
        "",
        "Sampled at temperature 1, drafts too (rejection sampling), on half of these prompts:",
        "",
        *_table(sampled),
        "",
        "MTP-D less plain MTP, in points, with the 95 % interval of a bootstrap over the prompts:",
        "",
        "| | " + " | ".join(f"CAR_{k}" for k in range(1, 5)) + " |",
        "|---" * 5 + "|",
    ]
    for how, name in (("greedy, every token", "answers"), ("greedy", "acceptance"), ("sampled", "sampled")):
        cells = [f"{x['points']:+.2f} ({x['low']:+.2f} to {x['high']:+.2f})" for x in gains[name]]
        lines.append(f"| {how} | {' | '.join(cells)} |")
    last = gains["answers"][3]
    verdict = "more" if last["low"] > 0 or last["high"] < 0 else "no more"
    lines += ["", f"At every token, CAR_4 differs by {verdict} than chance explains."]
    return [*lines, "", "![acceptance](retrofit_smollm2.png)", ""]


def _table(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each stage, by its title."""
    most = max(len(one["cumulative_acceptance_rate"]) for one in found.values())
    shown = [k for k in SHOWN if k <= most]
    lines = [
        "| heads | " + " | ".join(f"CAR_{k}" for k in shown) + " | CAR_4 between | tokens/step | drafts |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for title, one in found.items():
        rates = [_percent(one["cumulative_acceptance_rate"], k) for k in shown]
        low, high = one["cumulative_acceptance_rate_interval"][3]
        lines.append(
            f"| {title} | {' | '.join(rates)} | {100 * low:.2f} - {100 * high:.2f} | {one['acceptance_length']:.3f} | "
            f"{one['num_drafts']} |"
        )
    return lines


def _speed(document: dict[str, Any]) -> list[str]:
    speed = document["speed"]
    best = max((row for row in speed["rows"] if row["num_heads"]), key=lambda row: row["over_transformers"])
    rounding = " In bf16, passes over other numbers of tokens round otherwise, which decides near ties."
    return [
        "## Speed",
        "",
        f"MTP-D's heads, one sequence at a time, {speed['threads']} threads, {speed['prompts']} prompts, "
        f"{speed['new_tokens']} tokens each whatever the model ends, prompts' passes included. All take turns at each "
        "prompt; ratios are medians over the prompts, with the smallest and the largest; outputs are equal or not to "
        "transformers' (`tools/benchmark_generate.py`).",
        "",
        *end_to_end.table(speed).splitlines(),
        "",
        f"Fastest with heads: {best['decoding'].removeprefix('ours, ')}, at {best['over_transformers']:.2f} times the "
        "speed of transformers' plain decoding." + (rounding if speed["dtype"] == "bf16" else ""),
        "",
    ]


def _vllm(found: dict[str, Any]) -> list[str]:
    return [
        "## In vLLM",
        "",
        f"vLLM {found['version']} on the CPU, fp32, greedy, with the four heads of the export: tokens equal to ours on "
        f"{found['equal_tokens']} of {found['prompts']} prompts. Accepted drafts by position: "
        + ", ".join(f"{who} {found['accepted_per_pos'][who]} of {found['drafts'][who]}" for who in ("vllm", "ours"))
        + " (with `--mask-position-0`).",
    ]


def vllm_command(folder: Path, heads: int = 4) -> str:
    """What serves the export."""
    config = json.dumps({"method": "mtp", "num_speculative_tokens": heads})
    return f"VLLM_MLA_DISABLE=1 VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {folder} --speculative-config '{config}'"


def _percent(rates: list[float | None], k: int) -> str:
    rate = rates[k - 1] if k <= len(rates) else None
    return "" if rate is None else f"{100 * rate:.1f}" if rate > 0.1 else f"{100 * rate:.2f}"


def draw(rows: list[dict[str, Any]], speed: list[dict[str, Any]], path: Path) -> None:
    """Cumulative acceptance by head of all stages, and the speed of each way of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for number, row in enumerate(rows):
        rates = [100 * (rate or 0.0) for rate in row["answers"]["cumulative_acceptance_rate"]]
        style = "-" if row["trained"] else "--"
        curves.plot(range(1, len(rates) + 1), rates, style, marker=".", color=f"C{number}", label=row["title"])
    curves.set(
        title="heads 1 to k all accepted, greedy, from every token",
        xlabel="k",
        ylabel="% of drafts",
        xticks=range(1, max(row["heads"] for row in rows) + 1),
    )
    curves.set_yscale("log")  # no point where nothing was accepted
    curves.set_ylim(0.02, 100)
    curves.legend(fontsize=8)
    names, ratios = [row["decoding"] for row in speed], [row["over_transformers"] for row in speed]
    spread = [[abs(row["over_transformers_range"][end] - row["over_transformers"]) for row in speed] for end in (0, 1)]
    bars.barh(names, ratios, xerr=spread, color=["C3"] + ["C0"] * (len(speed) - 1))
    bars.invert_yaxis()
    bars.axvline(1, color="C3", linewidth=0.8)
    bars.set(title="one sequence at a time, MTP-D's heads", xlabel="x transformers' tokens a second")
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
