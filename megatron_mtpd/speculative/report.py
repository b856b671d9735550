"""What the benchmark shows: `acceptance.json`, a table, pictures, TensorBoard and a page of HTML, from the same
numbers.

Deliberately absent: the numbers; `summary` makes them.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from megatron_mtpd.checkpoint.files import written_whole

SHOWN_SETTINGS = ("iteration", "temperature", "batch_size", "max_new_tokens", "dtype")


def write(summary: dict[str, Any], directory: Path) -> None:
    """acceptance.json, .txt, .png, .html and TensorBoard events; each file appears whole or not at all."""
    text, picture = table(summary), draw(summary)
    files = {
        "acceptance.json": json.dumps(summary, indent=1).encode(),
        "acceptance.txt": text.encode(),
        "acceptance.png": picture,
        "acceptance.html": page(summary, text, picture).encode(),
    }
    for name, data in files.items():
        with written_whole(directory / name) as file:
            file.write(data)
    to_tensorboard(summary, directory)


def write_checkpoints(whole: dict[str, Any], directory: Path) -> None:
    """checkpoints.json, .txt, and TensorBoard events with all checkpoints of a run."""
    files = {"checkpoints.json": json.dumps(whole, indent=1), "checkpoints.txt": checkpoints_table(whole)}
    for name, text in files.items():
        with written_whole(directory / name) as file:
            file.write(text.encode())
    for summary in whole["checkpoints"]:
        to_tensorboard(summary, directory)


def for_terminal(found: dict[str, Any], directory: Path) -> str:
    """What a run, or one over many checkpoints, ends with."""
    if "checkpoints" in found:
        return (
            f"{checkpoints_table(found)}\nAll: {directory}/checkpoints.json; each checkpoint has a page in its folder."
        )
    return f"{table(found)}\nPictures: {directory}/acceptance.html, all numbers: acceptance.json there."


def checkpoints_table(whole: dict[str, Any]) -> str:
    """The checkpoints of a run for a terminal: teacher-forced, and the run with the most heads where there are any."""
    lines = [
        f"{'iteration':>9} {'main loss':>9} {'decoded length':>14} {'x plain':>7}  teacher-forced AR | CAR (%) by head"
    ]
    for summary in whole["checkpoints"]:
        forced = summary["teacher_forced"]
        run = summary["runs"][-1] if summary["runs"] else {"acceptance_length": None, "speedup_vs_autoregressive": None}
        numbers = (forced["main_loss"], run["acceptance_length"], run["speedup_vs_autoregressive"])
        shown = ["-" if x is None else f"{x:.{d}f}" for x, d in zip(numbers, (4, 2, 2), strict=True)]
        rates = [_percent(forced.get(name, [])) for name in ("acceptance_rate", "cumulative_acceptance_rate")]
        iteration = str(summary["settings"]["iteration"])
        lines.append(f"{iteration:>9} {shown[0]:>9} {shown[1]:>14} {shown[2]:>7}  {' | '.join(rates)}")
    if not whole["complete"]:
        lines += ["", "Some results are missing: run the same command again."]
    return "\n".join(lines) + "\n"


def _percent(rates: list[float | None]) -> str:
    return " ".join("   -" if rate is None else f"{100 * rate:4.0f}" for rate in rates)


def table(summary: dict[str, Any]) -> str:
    """The runs for a terminal; the main head's loss first."""
    forced = summary["teacher_forced"]
    lines = []
    if forced["main_loss"] is not None:
        lines += [
            f"main head's loss on the prompts: {forced['main_loss']:.4f} nats a token",
            f"teacher-forced CAR (%):          {_percent(forced['cumulative_acceptance_rate'])}",
            "",
        ]
    lines.append(
        f"{'heads':>5} {'drafts':>8} {'length':>7} {'tokens/s':>9} {'x plain':>8} {'x 1 head':>8}  AR | CAR (%) by head"
    )
    for run in summary["runs"]:
        numbers = [run["acceptance_length"], run["tokens_per_second"]]
        numbers += [run["speedup_vs_autoregressive"], run["speedup_vs_one_head"]]
        shown = ["-" if x is None else f"{x:.{d}f}" for x, d in zip(numbers, (3, 0, 2, 2), strict=True)]
        rates = f"{_percent(run['acceptance_rate'])} | {_percent(run['cumulative_acceptance_rate'])}"
        front = f"{run['num_heads']:>5} {run['num_drafts']:>8} {shown[0]:>7} {shown[1]:>9} {shown[2]:>8} {shown[3]:>8}"
        lines.append(f"{front}  {rates}")
    if summary["runs"] and len(summary["runs"][-1]["benchmarks"]) > 1:
        lines += ["", f"by benchmark, {summary['runs'][-1]['num_heads']} heads"]
        lines += [_benchmark_row(name, values) for name, values in summary["runs"][-1]["benchmarks"].items()]
    if step := summary["step_cost"]:
        lines += [
            "",
            "a step, without the prompts' own passes: measured, and in brackets what the cost model makes of it",
            f"{'heads':>5} {'draft ms':>16} {'verify ms':>16} {'tokens':>14} {'tokens/s':>16}",
            *(_cost_row(row) for row in step["by_num_heads"]),
            f"fastest number of heads: {step['best_num_heads_predicted']} by the cost model, "
            f"{step['best_num_heads_measured']} among those measured",
        ]
    if summary["failed_prompts"]:
        lines += ["", f"{len(summary['failed_prompts'])} bad prompts, for example {summary['failed_prompts'][0]}"]
    if not summary["complete"]:
        lines += ["", f"{summary['num_missing']} results are missing: run the same command again."]
    return "\n".join(lines) + "\n"


def _benchmark_row(name: str, values: dict[str, Any]) -> str:
    numbers = (values["acceptance_length"], values["speedup_vs_autoregressive"])
    length, speedup = ("-" if x is None else f"{x:.{d}f}" for x, d in zip(numbers, (3, 2), strict=True))
    rates = _percent(values["cumulative_acceptance_rate"])
    return f"{name:>20} {values['num_prompts']:>6} prompts  length {length:>6}  x plain {speedup:>5}  CAR (%) {rates}"


def _cost_row(row: dict[str, Any]) -> str:
    shown = [f"{row['num_heads']:>5}"]
    for name, scale, digits, width in (
        ("draft_seconds_per_step", 1000, 2, 7),
        ("verify_seconds_per_step", 1000, 2, 7),
        ("tokens_per_step", 1, 2, 5),
        ("tokens_per_second", 1, 0, 7),
    ):
        measured = f"{row['measured'][name] * scale:.{digits}f}" if row["measured"] else "-"
        predicted = f"({row['predicted'][name] * scale:.{digits}f})"
        shown.append(f"{measured:>{width}} {predicted:>{width + 1}}")
    return " ".join(shown)


def draw(summary: dict[str, Any]) -> bytes:
    """AR and CAR by head with their intervals, and speedup by number of heads, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    runs = [run for run in summary["runs"] if run["num_heads"]]
    if runs:
        run = max(runs, key=lambda run: run["num_heads"])
        for axis, name, title in (
            (axes[0], "acceptance_rate", "AR: accepted, if reached"),
            (axes[1], "cumulative_acceptance_rate", "CAR: accepted with all before"),
        ):
            bars = [(k, r, i) for k, (r, i) in enumerate(zip(run[name], run[name + "_interval"], strict=True), 1) if i]
            for k, rate, (low, high) in bars:
                axis.bar(k, 100 * rate, color="C0")
                axis.errorbar(k, 100 * rate, [[100 * (rate - low)], [100 * (high - rate)]], color="black", capsize=3)
            axis.set(title=title, xlabel="head", ylabel="%", ylim=(0, 105))
            axis.set_xticks(range(1, run["num_heads"] + 1))
    speeds = [(r["num_heads"], r["speedup_vs_autoregressive"]) for r in summary["runs"]]
    speeds = [(k, s) for k, s in speeds if s is not None]
    if speeds:
        axes[2].plot(*zip(*speeds, strict=True), "o-", label="measured")
    if step := summary["step_cost"]:
        speeds = [row["predicted"]["tokens_per_second"] for row in step["by_num_heads"]]
        axes[2].plot(range(len(speeds)), [speed / speeds[0] for speed in speeds], ":", label="cost model")
    axes[2].set(title="Speedup over plain decoding", xlabel="heads", ylabel="x")
    axes[2].axhline(1.0, color="grey", linewidth=0.8)
    if axes[2].get_legend_handles_labels()[0]:
        axes[2].legend()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def to_tensorboard(summary: dict[str, Any], directory: Path) -> None:
    """The same numbers as scalars at the checkpoint's iteration, so that the checkpoints of a run make curves."""
    from torch.utils.tensorboard import SummaryWriter

    step = summary["settings"]["iteration"]
    step = step if isinstance(step, int) else 0
    with SummaryWriter(str(directory / "tensorboard")) as writer:
        for run in summary["runs"]:
            prefix = f"acceptance/{run['num_heads']} heads"
            for name in ("acceptance_length", "tokens_per_second", "speedup_vs_autoregressive"):
                if run[name] is not None:
                    writer.add_scalar(f"{prefix}/{name}", run[name], step)
            for short, name in (("AR", "acceptance_rate"), ("CAR", "cumulative_acceptance_rate")):
                for k, rate in enumerate(run[name], 1):
                    if rate is not None:
                        writer.add_scalar(f"{prefix}/{short} {k}", rate, step)
        if summary["teacher_forced"]["main_loss"] is not None:
            writer.add_scalar("acceptance/main loss", summary["teacher_forced"]["main_loss"], step)
        writer.add_text("acceptance", f"```\n{table(summary)}\n```", step)


def page(summary: dict[str, Any], text: str, picture: bytes) -> str:
    """One file of HTML that needs nothing else."""
    image = base64.b64encode(picture).decode()
    details = html.escape(json.dumps(summary, indent=1))
    source, settings = summary["provenance"], summary["settings"]
    facts = [f"{name.replace('_', ' ')} {settings[name]}" for name in SHOWN_SETTINGS]
    if settings.get("draft_vocab_size"):
        facts.append(f"drafts of the first {settings['draft_vocab_size']:,} ids")
    facts += [f"{summary['num_prompts']} prompts", f"{source['date']}, commit {source['commit']}", source["command"]]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Acceptance</title>'
        "<style>body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "pre{overflow:auto;background:#f6f6f6;padding:1em}img{max-width:100%}</style>"
        f"<h1>Acceptance of {html.escape(summary['settings']['checkpoint'])}</h1>"
        f"<p>{html.escape(' · '.join(map(str, facts)))}</p>"
        f'<pre>{html.escape(text)}</pre><img alt="rates and speedup" src="data:image/png;base64,{image}">'
        f"<details><summary>All numbers</summary><pre>{details}</pre></details></html>\n"
    )
