"""Main loss against acceptance: the quickstart's model over objectives and gradient shares, several seeds.

Heads that a main head pays for are not better heads. So every variant is a point: the main head's loss relative to
plain MTP of the same seed on one axis, what the heads get accepted on the other; the frontier is what nothing beats on
both. Results go to runs/frontier: frontier.json, frontier.png and a table. Variants that are there already are not run
again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy import AS_PUBLISHED, PLAIN_MTP, ROOT, final_validation, prepare_data, train, training_command

from megatron_mtpd.provenance import provenance


def shares(**values: float) -> list[str]:
    """`shares(kd_trunk=0, ce_output=0.5)` as flags."""
    return [word for name, value in values.items() for word in (f"--mtpd-{name.replace('_', '-')}-share", str(value))]


KD_CUT = {"kd_trunk": 0, "kd_embedding": 0, "kd_output": 0}
OTHER_OBJECTIVES = ("kl", "reverse_kl", "tv", "lk", "e2e_tv")
LATE = ["--mtpd-distill-start", "{late}"]  # of the steps' last third
ALL_CUT = {**KD_CUT, "ce_trunk": 0, "ce_embedding": 0, "ce_output": 0}
CHANGES = {
    "mtp": PLAIN_MTP,
    "mtp, output cut": [*PLAIN_MTP, *shares(ce_output=0)],
    "mtp, all cut": [*PLAIN_MTP, *shares(**ALL_CUT)],
    "topn_kl": [],
    "topn_kl, kd output cut": shares(kd_output=0),
    "topn_kl, output cut": shares(ce_output=0, kd_output=0),
    "topn_kl, kd cut": shares(**KD_CUT),
    "topn_kl, kd and output cut": shares(**KD_CUT, ce_output=0),
    "topn_kl, all cut": shares(**ALL_CUT),
    "topn_kl, late": LATE,
    "topn_kl, kd output cut, late": [*shares(kd_output=0), *LATE],
    "topn_kl, output cut, late": [*shares(ce_output=0, kd_output=0), *LATE],  # the default
    "topn_kl, kd cut, late": [*shares(**KD_CUT), *LATE],
    "topn_kl, all cut, late": [*shares(**ALL_CUT), *LATE],
    **{f"{name}, all cut": ["--mtpd-objective", name, *shares(**ALL_CUT)] for name in OTHER_OBJECTIVES},
}
VARIANTS = {variant: [*AS_PUBLISHED, *changes] for variant, changes in CHANGES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="example: python examples/frontier/run.py --seeds 1 2 --steps 400 --only mtp 'topn_kl, all cut'",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=600, help="of each run [%(default)s]")
    parser.add_argument("--heads", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="VARIANT", help="; ".join(VARIANTS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "frontier", metavar="DIR")
    options = parser.parse_args()
    out = options.output.resolve() / f"{options.heads}-heads-{options.steps}-steps"
    chosen = dict.fromkeys(["mtp", *(options.only or VARIANTS)])  # plain MTP is what all are compared with

    data = prepare_data(ROOT / "runs" / "quickstart" / "data")
    commands = {
        f"{variant} seed {seed}": training_command(
            data,
            options.steps,
            40,
            out / f"{variant} seed {seed}",
            None,
            seed,
            [
                "--mtp-num-layers",
                options.heads,
                *(str(f).format(late=2 * options.steps // 3) for f in VARIANTS[variant]),
            ],
        )
        for seed in options.seeds
        for variant in chosen
    }
    finished = out / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    missing = {name: command for name, command in commands.items() if not (finished / name).exists()}
    train(missing, out / "logs", options.steps, on_done=lambda name: (finished / name).touch())
    points = {
        variant: [final_validation(commands[f"{variant} seed {seed}"]) for seed in options.seeds] for variant in chosen
    }
    report = summarize(points)
    document = {"points": report, "runs": points, "options": vars(options), "provenance": provenance()}
    (out / "frontier.json").write_text(json.dumps(document, indent=1, default=str))
    draw(report, out / "frontier.png")
    print(table(report))
    print(f"\n{out}/frontier.png, {out}/frontier.json")


def summarize(points: dict[str, list[dict]]) -> list[dict]:
    """A row a variant: means over the seeds, and of the main loss the difference to plain MTP, seed by seed, in %."""
    rows = []
    for variant, runs in points.items():
        changes = [100 * (r["main_loss"] / p["main_loss"] - 1) for r, p in zip(runs, points["mtp"], strict=True)]
        rows.append(
            {
                "variant": variant,
                "main_loss": mean(r["main_loss"] for r in runs),
                "main_loss_change_percent": mean(changes),
                "main_loss_change_error": stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
                "tokens_per_step": mean(r["tokens_per_step"] for r in runs),
                "cumulative_acceptance_rate": by_head(runs, "cumulative_acceptance_rate"),
                "overlap": by_head(runs, "overlap"),
            }
        )
    for row in rows:
        row["on_frontier"] = not any(
            other["main_loss_change_percent"] <= row["main_loss_change_percent"]
            and other["tokens_per_step"] > row["tokens_per_step"]
            for other in rows
        )
    return rows


def by_head(runs: list[dict], metric: str) -> list[float]:
    """Mean over the seeds, of each head."""
    return [mean(heads) for heads in zip(*([h[metric] for h in r["heads"]] for r in runs), strict=True)]


def table(rows: list[dict]) -> str:
    """The rows as text; * marks the frontier."""
    heads = len(rows[0]["overlap"])
    lines = [f"{'variant':30}{'main loss':>10}{'change':>16}  {'tokens/step':>11}  CAR_1..CAR_{heads} (%), overlap"]
    for row in sorted(rows, key=lambda row: row["main_loss_change_percent"]):
        error = row["main_loss_change_error"]
        change = f"{row['main_loss_change_percent']:+.2f}" + (f" ± {error:.2f}" if error is not None else "") + " %"
        rates = " ".join(f"{100 * rate:4.1f}" for rate in row["cumulative_acceptance_rate"])
        star = "*" if row["on_frontier"] else " "
        lines.append(
            f"{row['variant']:30}{row['main_loss']:10.4f}{change:>16}{star} {row['tokens_per_step']:11.3f}  {rates}"
            f"  {100 * row['overlap'][-1]:.1f}"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """The points, with the standard error of the main loss over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 6), constrained_layout=True)
    for row in rows:
        x, y = row["main_loss_change_percent"], row["tokens_per_step"]
        marker = "o" if row["on_frontier"] else "x"
        axis.errorbar(
            x, y, xerr=row["main_loss_change_error"] or 0, marker=marker, color="C0" if marker == "o" else "C7"
        )
        axis.annotate(row["variant"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.axvspan(-0.1, 0.1, color="C2", alpha=0.15, label="main head within 0.1 % of plain MTP")
    axis.set(xlabel="main head's loss against plain MTP (%)", ylabel="tokens a step, teacher-forced, held-out text")
    axis.legend(loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
