"""What the quickstart shows of its two runs: summary.json, a table of what was learned, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from toy import TOKENS_PER_STEP, final_validation, metrics_file, records

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.provenance import provenance

TITLES = {"mtp": "plain MTP", "mtpd": "MTP-D"}


def summarize(out: Path, commands: dict[str, list[str]], steps: int, seed: int) -> dict:
    """Losses and acceptance by head at the end of training, on validation text; written to summary.json."""
    summary: dict = {}
    for variant, command in commands.items():
        curve = [[r["iteration"], r["lm loss"]] for r in records(metrics_file(command)) if "lm loss" in r]
        summary[variant] = {**final_validation(command), "curve": curve}
    summary["provenance"] = {**provenance(), "training_tokens": steps * TOKENS_PER_STEP, "seed": seed}
    write(summary, out)
    return summary


def write(summary: dict, out: Path) -> None:
    """summary.json, whole or not at all."""
    with written_whole(out / "summary.json") as file:
        file.write(json.dumps(summary, indent=1).encode())


def print_table(summary: dict) -> None:
    """The summary for people: the main head first, because acceptance means nothing without it."""
    variants = [v for v in TITLES if v in summary]
    print(f"\n{'':34}" + "".join(f"{TITLES[v]:>12}" for v in variants) + f"{'difference':>14}")

    def row(name: str, values: list[float], scale: float = 1.0, digits: int = 3, unit: str = "") -> None:
        shown = "".join(f"{x * scale:12.{digits}f}" for x in values)
        print(f"{name:34}{shown}{(values[-1] - values[0]) * scale:+14.{digits}f}{unit}")

    row("main head: loss (nats)", [summary[v]["main_loss"] for v in variants])
    heads = range(len(summary[variants[0]]["heads"]))
    for metric, title, scale, digits in (
        ("cross_entropy", "cross-entropy (nats)", 1, 3),
        ("kl", "KL to the main head (nats)", 1, 3),
        ("acceptance_rate", "accepted, if reached (%)", 100, 1),
        ("cumulative_acceptance_rate", "accepted with all before (%)", 100, 1),
        ("overlap", "overlap with the main head (%)", 100, 1),
    ):
        for k in heads:
            row(f"head {k + 1}: {title}", [summary[v]["heads"][k][metric] for v in variants], scale, digits)
    row("tokens a step that follow", [summary[v]["tokens_per_step"] for v in variants], 1, 2)
    plain, distilled = (summary[v]["main_loss"] for v in variants)
    print(
        f"\nMTP-D's main head has {100 * (distilled / plain - 1):+.2f} % of plain MTP's loss. A main head that\n"
        "is easier to predict is accepted more often too: compare heads at equal main loss.\n"
        "One seed of a toy: a demonstration, not a result."
    )


def draw(summary: dict, path: Path) -> None:
    """Of both variants: main loss over training, cumulative acceptance by head, and speed of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, acceptance, speed) = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    variants = [v for v in TITLES if v in summary]
    for i, variant in enumerate(variants):
        data, title = summary[variant], f"{TITLES[variant]} (held out: {summary[variant]['main_loss']:.3f})"
        iterations, losses = zip(*smooth(data["curve"]), strict=True)
        loss.plot(iterations, losses, label=title)
        rates = [100 * head["cumulative_acceptance_rate"] for head in data["heads"]]
        places = [k + 1 + (i - 0.5) * 0.38 for k in range(len(rates))]
        bars = acceptance.bar(places, rates, 0.36, label=TITLES[variant])
        acceptance.bar_label(bars, fmt="%.0f", fontsize=8)
        runs = data["decoding"]["runs"]
        heads = [run["num_heads"] for run in runs]
        speedups = [run["speedup_vs_autoregressive"] for run in runs]
        speed.plot(heads, speedups, "o-", color=f"C{i}", label=TITLES[variant])
        limits = [run["acceptance_length"] or 1.0 for run in runs]
        speed.plot(heads, limits, ":", color=f"C{i}", label="its limit: tokens a step")
    loss.set(title="Main head", xlabel="step", ylabel="training loss (nats)")
    acceptance.set(title="Heads: accepted with all before", xlabel="head", ylabel="% of drafts, held-out text")
    speed.set(title="Decoding: speed over plain decoding", xlabel="heads", ylabel="x")
    speed.axhline(1.0, color="grey", linewidth=0.8)
    speed.set_xticks(range(len(summary[variants[0]]["heads"]) + 1))
    acceptance.set_xticks(range(1, len(summary[variants[0]]["heads"]) + 1))
    for axis in (loss, acceptance, speed):
        axis.legend()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smooth(curve: list[list[float]], window: int = 10) -> list[tuple[float, float]]:
    """Means over windows of steps: a curve that can be read."""
    chunks = [curve[i : i + window] for i in range(0, len(curve), window)]
    return [(c[-1][0], sum(x for _, x in c) / len(c)) for c in chunks]
