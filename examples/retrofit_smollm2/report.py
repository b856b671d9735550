"""What the retrofit shows: RESULTS.md, retrofit_smollm2.png and all numbers in retrofit_smollm2.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toy import final_validation

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.provenance import provenance

SHOWN = (1, 2, 3, 4, 8, 16)


def write(stages: Sequence[tuple[Any, Path]], out: Path, options: dict[str, Any]) -> str:
    """Write all three into `out`, and return the text of RESULTS.md. `stages`: each with its folder."""
    rows = [_row(stage, folder) for stage, folder in stages]
    speed = json.loads((out / "speed" / "acceptance.json").read_text())
    theirs = json.loads((out / "speed" / "transformers.json").read_text())
    generated = json.loads((out / "generated" / "summary.json").read_text())
    found = {"stages": rows, "speed": speed["runs"], "transformers": theirs, "generated": generated}
    document = {**found, "options": options, "provenance": provenance()}
    text = markdown(document, rows)
    with written_whole(out / "retrofit_smollm2.json") as file:
        file.write(json.dumps(document, indent=1, default=str).encode())
    draw(rows, speed["runs"], theirs, out / "retrofit_smollm2.png")
    with written_whole(out / "RESULTS.md") as file:
        file.write(text.encode())
    return text


def _row(stage: Any, folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "acceptance" / "acceptance.json").read_text())
    run = next(run for run in found["runs"] if run["num_heads"] == stage.heads)
    forced = found["teacher_forced"]
    names = ("cumulative_acceptance_rate", "cumulative_acceptance_rate_interval", "acceptance_length", "num_drafts")
    command = ["--tensorboard-dir", str(folder / "tensorboard")]
    return {
        "name": stage.name,
        "title": stage.title,
        "heads": stage.heads,
        "trained": stage.trains,
        "main_loss": forced["main_loss"],
        "overlap": forced["overlap"],
        **{name: run[name] for name in names},
        "benchmarks": {name: {n: one[n] for n in names} for name, one in run["benchmarks"].items()},
        "equal": run["outputs_equal_to_plain"],
        "num_prompts": found["num_prompts"],
        "validation": final_validation(command) if stage.trains else None,
    }


def markdown(document: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as a page."""
    options, source, speed = document["options"], document["provenance"], document["speed"]
    first, plain = rows[0], document["speed"][0]["tokens_per_second"]
    by_name = {row["name"]: row for row in rows}
    hardware, generated = source["hardware"], document["generated"]
    machine = hardware.get("gpu") or f"{hardware['cpu']}, {hardware.get('cores', '?')} cores"
    tokens = options["steps"] * options["batch"] * 256
    best = max(speed[1:], key=lambda run: run["tokens_per_second"])
    theirs = document["transformers"]
    names = ("steps", "batch", "lr", "questions", "prompts")
    shown = [k for k in SHOWN if k <= max(row["heads"] for row in rows)]
    flags = " ".join([*(f"--{name} {options[name]:g}" for name in names), *["--further"][: options["further"]]])
    lines = [
        "# SmolLM2-135M-Instruct with four heads",
        "",
        f"`python examples/retrofit_smollm2/run.py {flags}`, {source['date']}, commit "
        f"{(source['commit'] or 'unknown')[:10]}, {machine}, bf16. One seed.",
        "",
        f"Each variant's heads saw {tokens:,} tokens: half Python's standard library, half from the "
        f"{generated['tokens']:,} tokens of {generated['documents']} questions and answers that the model wrote. "
        f"Measured greedily on {first['num_prompts']} prompts, half of HumanEval, half questions of MMLU and GSM8K in "
        "the chat template; none was trained on.",
        "",
        "The trunk was frozen, so the main head is the same in every row, by construction: its loss on the prompts is "
        f"{_losses(rows)} nats a token, and the output is what it was without heads.",
        "",
        "## Acceptance",
        "",
        "CAR_k: heads 1 to k all accepted, in % of the drafts; for k = 4 with its 95 % interval. Overlap 1: how often "
        "head 1 is accepted when drafts are sampled, in %, on the prompts' own text.",
        "",
        "| heads | " + " | ".join(f"CAR_{k}" for k in shown) + " | CAR_4 between | tokens/step | overlap 1 | drafts |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for row in rows:
        rates = [_percent(row["cumulative_acceptance_rate"], k) for k in shown]
        low, high = row["cumulative_acceptance_rate_interval"][3]
        lines.append(
            f"| {row['title']}{'' if row['trained'] else ', untrained'} | {' | '.join(rates)} | {100 * low:.2f} - "
            f"{100 * high:.2f} | {row['acceptance_length']:.3f} | {100 * row['overlap'][0]:.1f} | {row['num_drafts']} |"
        )
    lines += ["", "By benchmark, CAR_1 and CAR_4 (%):", "", "| heads | " + " | ".join(first["benchmarks"]) + " |"]
    lines.append("|---" * (len(first["benchmarks"]) + 1) + "|")
    for row in rows:
        cells = []
        for one in row["benchmarks"].values():
            rates = one["cumulative_acceptance_rate"]
            cells.append(f"{_percent(rates, 1)}, {_percent(rates, 4)}")
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    lines += ["", compared(by_name["mtp"], by_name["mtpd"]), "", "![acceptance](retrofit_smollm2.png)", ""]
    lines += [
        "## Speed",
        "",
        f"MTP-D's heads, one sequence at a time, {theirs['threads']} threads, {speed[0]['num_prompts']} prompts, "
        f"{speed[0]['num_tokens'] // speed[0]['num_prompts']} tokens each, prompts' passes included.",
        "",
        "| decoding | tokens/s | x transformers | x plain | tokens/step |",
        "|---|---|---|---|---|",
        f"| transformers, plain | {theirs['tokens_per_second']:.1f} | 1 | "
        f"{theirs['tokens_per_second'] / plain:.2f} | 1 |",
    ]
    for run in speed:
        name = "plain" if not run["num_heads"] else f"{run['num_heads']} head{'s' * (run['num_heads'] > 1)}"
        rate = run["tokens_per_second"]
        lines.append(
            f"| ours, {name} | {rate:.1f} | {rate / theirs['tokens_per_second']:.2f} | {rate / plain:.2f} | "
            f"{run['acceptance_length'] or 1:.2f} |"
        )
    lines += [
        "",
        f"Fastest with heads: {best['num_heads']}, at {best['tokens_per_second'] / theirs['tokens_per_second']:.2f} "
        f"times the speed of transformers' plain decoding. Our plain outputs equal to transformers': "
        f"{theirs['outputs_equal_to_ours']}; with heads equal to ours without: "
        f"{', '.join(run['outputs_equal_to_plain'] for run in speed[1:])}. In bf16 passes over other numbers of "
        "tokens round otherwise, which decides near ties.",
    ]
    return "\n".join(lines) + "\n"


def compared(plain: dict[str, Any], distilled: dict[str, Any]) -> str:
    """Whether self-distillation gains more at head 4 than chance explains."""
    a, b = (row["cumulative_acceptance_rate"][3] for row in (plain, distilled))
    # The 95 % interval of a difference of two independent rates, from the normal distribution.
    spread = 1.96 * sum(x * (1 - x) / row["num_drafts"] for x, row in ((a, plain), (b, distilled))) ** 0.5
    verdict = "more than" if abs(b - a) > spread else "within"
    return (
        f"CAR_4 of MTP-D less that of plain MTP: {100 * (b - a):+.2f} points, {verdict} its 95 % interval of "
        f"{100 * spread:.2f} either way."
    )


def vllm_command(folder: Path, heads: int = 4) -> str:
    """What serves the export."""
    config = json.dumps({"method": "mtp", "num_speculative_tokens": heads})
    return f"VLLM_MLA_DISABLE=1 VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {folder} --speculative-config '{config}'"


def _losses(rows: list[dict[str, Any]]) -> str:
    return " or ".join(dict.fromkeys(f"{row['main_loss']:.4f}" for row in rows))


def _percent(rates: list[float | None], k: int) -> str:
    rate = rates[k - 1] if k <= len(rates) else None
    return "" if rate is None else f"{100 * rate:.1f}" if rate > 0.1 else f"{100 * rate:.2f}"


def draw(rows: list[dict[str, Any]], speed: list[dict[str, Any]], theirs: dict[str, Any], path: Path) -> None:
    """Cumulative acceptance by head of all stages, and tokens a second by number of heads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for number, row in enumerate(rows):
        rates = [100 * (rate or 0.0) for rate in row["cumulative_acceptance_rate"]]
        style = "-" if row["trained"] else "--"
        curves.plot(range(1, len(rates) + 1), rates, style, marker=".", color=f"C{number}", label=row["title"])
    curves.set(title="heads 1 to k all accepted, greedy", xlabel="k", ylabel="% of drafts", xlim=(0.8, 8.2))
    curves.set_ylim(0, None)
    curves.legend(fontsize=8)
    bars.bar([str(run["num_heads"]) for run in speed], [run["tokens_per_second"] for run in speed])
    bars.axhline(theirs["tokens_per_second"], color="C3", label="transformers, plain")
    bars.set(title="one sequence at a time, MTP-D", xlabel="heads", ylabel="tokens a second")
    bars.legend(fontsize=8)
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
