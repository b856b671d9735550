"""What the stages of looped extension show: one row a stage, the main head's loss before any acceptance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mtpd.provenance import provenance

SHOWN = (1, 2, 3, 4, 8, 16)
TITLES = {"mtpd": "MTP-D", "mtp": "plain MTP"}


def summarize(stages: Sequence[Any], out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`stages`: a row each; `options` and `provenance`: what it takes to get them again.

    A row: `stage, heads, trained_steps, main_loss` (nats, on the prompts), of decoding with all heads
    `cumulative_acceptance_rate` by head, `tokens_per_step`, `speedup_vs_plain` and `speedup_vs_one_head`, and
    `teacher_forced_cumulative_acceptance_rate` by head.
    """
    rows = []
    for stage in stages:
        found = json.loads((stage.folder(out) / "acceptance" / "acceptance.json").read_text())
        decoded = next(run for run in found["runs"] if run["num_heads"] == stage.heads)
        forced = found["teacher_forced"]
        rows.append(
            {
                "variant": stage.variant,
                "stage": stage.name,
                "heads": stage.heads,
                "trained_steps": stage.steps,
                "main_loss": forced["main_loss"],
                "tokens_per_step": decoded["acceptance_length"],
                "speedup_vs_plain": decoded["speedup_vs_autoregressive"],
                "speedup_vs_one_head": decoded["speedup_vs_one_head"],
                "cumulative_acceptance_rate": decoded["cumulative_acceptance_rate"],
                "teacher_forced_cumulative_acceptance_rate": forced["cumulative_acceptance_rate"],
                "complete": found["complete"],
            }
        )
    return {"stages": rows, "options": options, "provenance": provenance()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text. CAR: heads 1 to k all accepted, in % of the drafts."""
    shown = [k for k in SHOWN if k <= max(row["heads"] for row in rows)]
    heads = "".join(f"{k:>6}" for k in shown)
    width = 6 * len(shown)
    lines = [
        "",
        f"{'':42}{'':9}  {'decoding':30}{'CAR_k (%), decoding':^{width}}   {'CAR_k (%), on the text':^{width}}",
        f"{'stage':42}{'main loss':>9}  {'tokens/step':>11}{'x plain':>9}{'x 1 head':>10}{heads}   {heads}",
    ]
    for row in rows:
        how = "" if row["trained_steps"] else " (copies, untrained)"
        speed = [row[name] for name in ("tokens_per_step", "speedup_vs_plain", "speedup_vs_one_head")]
        numbers = "".join(
            f"{'-' if x is None else format(x, '.2f'):>{w}}" for x, w in zip(speed, (11, 9, 10), strict=True)
        )
        rates = [
            "".join(_percent(row[name], k) for k in shown)
            for name in ("cumulative_acceptance_rate", "teacher_forced_cumulative_acceptance_rate")
        ]
        title = f"{TITLES[row['variant']]} {row['stage'].removesuffix('-extended')}{how}"
        lines.append(f"{title:42}{row['main_loss']:9.4f}  {numbers}{'   '.join(rates)}")
    lines.append(
        "\nOne seed of a toy: a demonstration, not a result. A main head that is easier to predict is accepted"
    )
    lines.append("more often too: look at its loss first.")
    return "\n".join(lines)


def _percent(rates: list[float | None], k: int) -> str:
    rate = rates[k - 1] if k <= len(rates) else None
    return f"{'':>6}" if rate is None else f"{100 * rate:6.1f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Cumulative acceptance by head, and tokens of a step, at each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    titles = []
    palette = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, row in enumerate(rows):
        color = palette[(2 * number + number // 10) % 20]  # the strong ones first
        trained = bool(row["trained_steps"])
        titles.append(f"{TITLES[row['variant']]}, {row['stage']}")
        rates = [100 * rate for rate in row["cumulative_acceptance_rate"] if rate is not None]
        style = "-" if trained else "--"
        curves.plot(range(1, len(rates) + 1), rates, style, marker=".", color=color, label=titles[-1])
        bars.barh(number, row["tokens_per_step"], color=color, alpha=1.0 if trained else 0.5)
        bars.text(
            row["tokens_per_step"], number, f" {row['tokens_per_step']:.2f} (loss {row['main_loss']:.3f})", va="center"
        )
    curves.set(title="heads 1 to k all accepted", xlabel="k", ylabel="% of drafts, decoding", ylim=(0, None))
    curves.legend(fontsize=8)
    bars.set_yticks(range(len(rows)), titles)
    bars.invert_yaxis()
    bars.set(title="tokens of a step (dashed and pale: right after extension)", xlabel="tokens a step, decoding")
    bars.margins(x=0.35)
    for axis in (curves, bars):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
