"""Looped extension: train 4 heads, copy them to 8, train the new ones, copy to 16, train those; measure every stage.

Every stage is the command that a user would type, on the quickstart's model and text. What is done is not done again:
an interrupted run goes on with the last checkpoint that it saved. --training-free adds the comparison that shows why
self-distillation matters here: MTP-D and plain MTP, extended from 1 and from 4 heads to 8 and used as they are. The
same schedule for a cluster is submit.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import draw, summarize, table
from toy import PLAIN_MTP, ROOT, keep_settings, prepare_data, train, training_command

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.checkpoint.iterations import read_tracker
from megatron_mtpd.data.stdlib_corpus import stdlib_files

VARIANTS = {"mtpd": [], "mtp": PLAIN_MTP}
NEW_TOKENS = 48  # of the model's 128 positions; prompts have the others
HELD_OUT = 0.05  # of the documents, the last ones: not trained on (`--split 95,5,0`)


@dataclass(frozen=True)
class Stage:
    """A checkpoint of the schedule, and how it is made: by training for `steps`, or (0) by extending `source`."""

    variant: str
    name: str
    heads: int
    source: Stage | None = None
    steps: int = 0

    def folder(self, out: Path) -> Path:
        return out / self.variant / self.name

    def checkpoints(self, out: Path) -> Path:
        return self.folder(out) / "checkpoints"

    def is_done(self, out: Path) -> bool:
        return read_tracker(self.checkpoints(out)) == (self.steps or "release")


def schedule(variant: str, sizes: list[int], steps: int, new_steps: int) -> list[Stage]:
    """Train the first number of heads, then extend and train the new heads, again and again."""
    stages = [Stage(variant, f"{sizes[0]}-heads", sizes[0], None, steps)]
    for size in sizes[1:]:
        stages.append(Stage(variant, f"{size}-heads-extended", size, stages[-1]))
        stages.append(Stage(variant, f"{size}-heads", size, stages[-1], new_steps))
    return stages


def training_free(steps: int) -> list[Stage]:
    """1 and 4 heads of MTP-D and of plain MTP, extended to 8. Stages of the schedule are not repeated."""
    stages = []
    for variant in VARIANTS:
        four, one = Stage(variant, "4-heads", 4, None, steps), Stage(variant, "1-head", 1, None, steps)
        stages += [four, Stage(variant, "8-heads-extended", 8, four), one, Stage(variant, "1-to-8-heads", 8, one)]
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="example: python examples/looped_extension/run.py --steps 200 --new-steps 50 --training-free",
    )
    parser.add_argument("--steps", type=int, default=600, help="of the first training [%(default)s]")
    parser.add_argument("--new-steps", type=int, default=120, help="of each training of new heads [%(default)s]")
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 8, 16], metavar="K", help="[4 8 16]")
    parser.add_argument("--training-free", action="store_true", help="extended MTP-D against extended plain MTP, too")
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time, where there are two [%(default)s]")
    parser.add_argument("--prompts", type=int, default=64, help="of the benchmark [%(default)s]")
    parser.add_argument("--seed", type=int, default=1234, help="[%(default)s]")
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "quickstart" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "looped_extension", metavar="DIR")
    options = parser.parse_args()
    out = options.output.resolve()
    if min(options.steps, options.new_steps) < 2:
        parser.error(f"--steps {options.steps}, --new-steps {options.new_steps}: give at least 2, one warms up.")
    if sorted(set(options.heads)) != options.heads or options.heads[0] < 1:
        parser.error(f"--heads {options.heads}: give numbers of at least 1, each more than the one before.")

    keep_settings(out, {name: getattr(options, name) for name in ("steps", "new_steps", "prompts", "seed")})
    data = prepare_data(options.data.resolve())
    prompts = write_prompts(out / "prompts.jsonl", options.prompts)
    stages = schedule("mtpd", options.heads, options.steps, options.new_steps)
    if options.training_free:
        stages = list(dict.fromkeys([*stages, *training_free(options.steps)]))

    run(stages, out, lambda stage: command_of(stage, out, data, options.seed), options.at_once, prompts)
    document = summarize(stages, out, vars(options))
    with written_whole(out / "looped_extension.json") as file:
        file.write(json.dumps(document, indent=1, default=str).encode())
    draw(document["stages"], out / "looped_extension.png")
    print(table(document["stages"]))
    shown = os.path.relpath(out)
    print(f"\nPicture: {shown}/looped_extension.png, all numbers: {shown}/looped_extension.json")


def write_prompts(path: Path, count: int) -> Path:
    """Excerpts of the held-out files, a different place in each."""
    files = stdlib_files()
    files = [Path(file) for file in files[-int(len(files) * HELD_OUT) :]]
    lines = []
    for number in range(count):
        text = files[number % len(files)].read_text(encoding="utf-8")
        start = len(text) * (number + 1) // (count + 2)
        lines.append(json.dumps({"prompt": text[start : start + 400] or text}))
    path.write_text("\n".join(lines) + "\n")
    return path


def command_of(stage: Stage, out: Path, data: tuple[Path, Path], seed: int) -> list[str]:
    """The training of a stage."""
    own = stage.checkpoints(out)
    flags = ["--mtp-num-layers", stage.heads, *VARIANTS[stage.variant]]
    if stage.source is not None:
        flags += ["--mtpd-train", "new-heads"]
    start = own if read_tracker(own) is not None else stage.source and stage.source.checkpoints(out)
    if start is not None:  # what it saved before it was interrupted, or its source
        flags += ["--load", start]
    command = training_command(data, stage.steps, 10, stage.folder(out) / "tensorboard", own, seed, flags)
    return [*command, "--save-interval", str(max(1, stage.steps // 4))]  # the last of two counts


def run(stages: list[Stage], out: Path, command: Callable[[Stage], list[str]], at_once: int, prompts: Path) -> None:
    """Make and measure all stages, each as soon as its source is there."""
    left = [stage for stage in stages if not stage.is_done(out)]
    for stage in stages:
        if stage not in left:
            measure(stage, out, prompts)
    while left:
        ready = [stage for stage in left if stage.source is None or stage.source.is_done(out)]
        for stage in ready:
            if read_tracker(stage.checkpoints(out)) is None:
                shutil.rmtree(stage.folder(out), ignore_errors=True)  # of a training that had saved nothing yet
        for stage in ready:
            if stage.source is not None and not stage.steps:
                load, save = stage.source.checkpoints(out), stage.checkpoints(out)
                tool("loop_extend.py", "--load", load, "--save", save, "--num-heads", stage.heads)
        trained = [stage for stage in ready if stage.steps]
        for steps in {stage.steps for stage in trained}:
            batch = {f"{s.variant}-{s.name}": command(s) for s in trained if s.steps == steps}
            print(f"\nTraining {', '.join(batch)}: {steps} steps", flush=True)
            train(batch, out / "logs", steps, min(at_once, len(batch)))
        for stage in ready:
            measure(stage, out, prompts)
        left = [stage for stage in left if stage not in ready]


def measure(stage: Stage, out: Path, prompts: Path) -> None:
    """Acceptance of all heads of a stage, with its main head's loss."""
    results = stage.folder(out) / "acceptance"
    if not (results / "acceptance.json").exists():
        words = ["--load", stage.checkpoints(out), "--prompts", prompts, "--output", results]
        words += ["--num-heads", *sorted({min(4, stage.heads), stage.heads}), "--max-new-tokens", NEW_TOKENS]
        tool("benchmark_acceptance.py", *words, "--batch-size", 16, quiet=True)


def tool(name: str, *words: object, quiet: bool = False) -> None:
    """Run a tool as a user would."""
    command = [str(word) for word in (ROOT / "tools" / name, *words)]
    print("$ python " + " ".join(os.path.relpath(w) if w.startswith("/") else w for w in command), flush=True)
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{name} failed.")


if __name__ == "__main__":
    main()
