"""Retrofit: a real model that has no multi-token prediction heads gets four, and serves with them.

SmolLM2-135M-Instruct (from a package, see `packages.py`) is imported with four heads, copies of its last layer. Its
trunk stays frozen, so that it says what it said before, whatever the heads are worth. The heads are fitted, in closed
form, to Python's standard library and to questions and answers that the model writes itself, and trained on both as
plain MTP and as MTP-D, and measured on prompts that nothing was trained on: at every token of what the model answers
greedily, and by decoding, greedily and sampled. MTP-D's are exported for transformers and vLLM with the measured
acceptance in the model card, timed against transformers' plain decoding, also with drafts of few ids, and copied to 8
and 16. `--further` adds the LK objective, and MTP-D from random heads and from the copies without a fit, `--new-steps`
a training of heads 5 to 8. RESULTS.md says what came of it, and how long it took.

A CPU trains in bf16 if it is fast in it, and is measured in fp32, so that every decoder can be compared token by token.
What is done is not done again, so that it can be stopped at any time. On a GPU give it more: --further --steps 5000
--batch 32 --questions 20000 --prompts 150 --new-steps 1000.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import packages
import report
import torch
from toy import PLAIN_MTP, ROOT, keep_settings, train

from megatron_mtpd.checkpoint.iterations import read_tracker
from megatron_mtpd.data.tokenizers import HuggingFaceTokenizer
from megatron_mtpd.speculative.chat import user_turn

HEADS, SEQ_LENGTH, LONGEST = 4, 256, 1024
NEW_TOKENS = 64
DRAFTED = 8192
"""Ids that heads draft among where that is compared with drafting among all."""
IMPORTED = "last-layer"
"""What heads start as before they are fitted."""
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
CORES = len(os.sched_getaffinity(0))
RANKS = torch.cuda.device_count() or CORES
# glibc gives large blocks back to the system at once, whose pages are then zeroed again and again: half the time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}


@dataclass(frozen=True)
class Stage:
    """A checkpoint with heads: trained from an import, or (`source`) copied from another stage or trained on."""

    name: str
    title: str
    init: str = "fitted"
    flags: tuple[str, ...] = ()
    heads: int = HEADS
    source: str | None = None
    trains: bool = True


FITTED = Stage("fitted", "fitted", trains=False)
COMPARED = (Stage("mtp", "plain MTP", flags=tuple(PLAIN_MTP)), Stage("mtpd", "MTP-D"))
FURTHER = (
    Stage("lk", "LK", flags=("--mtpd-objective", "lk")),
    Stage("mtpd-random", "MTP-D from random heads", init="random"),
    Stage("mtpd-last-layer", "MTP-D from the last layer", init=IMPORTED),
)


def looped(new_steps: int) -> list[Stage]:
    """MTP-D's heads copied to 8 and 16, and with `new_steps` heads 5 to 8 trained, and copied to 16 then."""
    stages = [Stage("8-copied", "MTP-D, copied to 8", heads=8, source="mtpd", trains=False)]
    if not new_steps:
        return [*stages, Stage("16-copied", "MTP-D, copied to 16", heads=16, source="8-copied", trains=False)]
    trained = f"8-after-{new_steps}"
    return [
        *stages,
        Stage(trained, "MTP-D, 8 heads", flags=("--mtpd-train", "new-heads"), heads=8, source="8-copied"),
        Stage(f"16-of-{trained}", "MTP-D, 8 copied to 16", heads=16, source=trained, trains=False),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="example: python examples/retrofit_smollm2/run.py --steps 100 --questions 100",
    )
    add = parser.add_argument
    add("--steps", type=int, default=60, help="of each variant's training [%(default)s]")
    add("--further", action="store_true", help="also LK, and MTP-D from other starts")
    add("--new-steps", type=int, default=0, help="of training heads 5 to 8; 0: copies alone [%(default)s]")
    add("--dtype", choices=("fp32", "bf16"), help="of training [bf16 on a GPU and on a CPU with AMX, else fp32]")
    add("--batch", type=int, default=2, help=f"sequences of {SEQ_LENGTH} tokens a step [%(default)s]")
    add("--lr", type=float, default=3e-4, help="[%(default)s]")
    add("--questions", type=int, default=200, help="that the model asks itself, and answers [%(default)s]")
    add("--answers", type=int, default=40, help="to prompts of each benchmark, measured at every token [%(default)s]")
    add("--prompts", type=int, default=16, help="of each of the two benchmarks, decoded with heads [%(default)s]")
    add("--at-once", type=int, default=min(2, CORES), help="trainings at a time [%(default)s]")
    add("--seed", type=int, default=1234, help="[%(default)s]")
    add("--output", type=Path, default=ROOT / "runs" / "retrofit_smollm2", metavar="DIR", help="[%(default)s]")
    add("--model", type=Path, metavar="PATH", help="another instruct model, as convert_hf.py takes it")
    add("--vllm", type=Path, default=VLLM, metavar="PYTHON", help="that has vLLM [what make test-serving makes]")
    options = parser.parse_args()
    fast = torch.cuda.is_available() or torch.cpu.get_capabilities().get("amx_bf16")
    options.dtype = options.dtype or ("bf16" if fast else "fp32")
    # On a CPU every decoder is exact in fp32, so that they can be compared token by token.
    options.decoding_dtype = options.dtype if torch.cuda.is_available() else "fp32"
    least = {
        "steps": 2,
        "new_steps": 0,
        "batch": 1,
        "questions": 50,  # some are validated on
        "answers": 1,
        "prompts": 1,
        "at_once": 1,
    }
    for name, value in least.items():
        if getattr(options, name) < value:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {value}.")
    Retrofit(options, options.output.resolve()).run()


class Retrofit:
    """The stages, each of which leaves a file that says that it is done."""

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out = options, out
        os.environ.update(KEEP_MEMORY)
        kept = ("steps", "batch", "lr", "questions", "answers", "prompts", "seed", "dtype", "model")
        keep_settings(out, {name: str(getattr(options, name)) for name in kept})
        self.packages = out / "packages"
        self.packages.mkdir(exist_ok=True)

    def run(self) -> None:
        self.import_model(IMPORTED)
        self.turn = user_turn(HuggingFaceTokenizer(str(self.tokenizer())))
        self.prompts = packages.write_prompts(self.packages, self.turn, self.options.prompts)
        self.data = [1, self.real_text(), 1, self.own_text()]
        self.fit()
        self.train(COMPARED, self.options.steps)
        for stage in COMPARED:
            self.measure_answers(stage)
            self.measure(stage)
            self.measure_sampled(stage)
        exported = {form: self.export("mtpd", form) for form in ("transformers", "deepseek-v3")}
        self.measure_speed("mtpd", exported["transformers"])
        self.compare_vllm("mtpd", exported["deepseek-v3"])
        stages = [*COMPARED, *self.further()]
        folders = [(stage, self.folder(stage.name)) for stage in stages]
        print(report.write(folders, self.out, vars(self.options)))
        print(f"\nServed by vLLM:\n{report.vllm_command(exported['deepseek-v3'])}")

    def further(self) -> list[Stage]:
        """What is not needed for the comparison of plain MTP and MTP-D: measured by the answers alone."""
        others = FURTHER if self.options.further else ()
        for stage in others:
            if stage.init not in ("fitted", IMPORTED):
                self.import_model(stage.init)
        self.train(others, self.options.steps)
        stages = [FITTED, *others, *looped(self.options.new_steps)]
        for stage in stages:
            if stage.source and stage.trains:
                self.train([stage], self.options.new_steps)
            elif stage.source:
                self.extend(stage)
            self.measure_answers(stage)
        return stages

    def imported(self, init: str) -> Path:
        return self.out / "imported" / init

    def folder(self, stage: str) -> Path:
        return self.out / "stages" / stage

    def checkpoints(self, stage: str) -> Path:
        return self.imported(stage) if stage == FITTED.name else self.folder(stage) / "checkpoints"

    # What everything starts from -----------------------------------------------------------------------------------

    def import_model(self, init: str) -> None:
        save = self.imported(init)
        if read_tracker(save) is None:
            source = self.options.model or packages.model(self.packages)
            words = ["import", "--hf", source, "--save", save, "--num-heads", HEADS, "--init", init]
            words += ["--dtype", self.options.dtype]
            tool("convert_hf.py", *words, "--max-position-embeddings", LONGEST)

    def fit(self) -> None:
        """The heads that training starts from: what text there is, as often as it is drawn."""
        save = self.imported(FITTED.name)
        if read_tracker(save) is None:
            words = ["--load", self.imported(IMPORTED), "--save", save, "--data-path", *self.data]
            tool("fit_heads.py", *words, "--seq-length", SEQ_LENGTH, "--seed", self.options.seed, ranks=RANKS)

    def real_text(self) -> Path:
        return self.tokenized("stdlib", "--input", "python-stdlib")

    def own_text(self) -> Path:
        words = ["--questions", self.options.questions, "--max-new-tokens", 192, "--temperature", 0.6]
        written = self.written("generated", *words, "--seed", self.options.seed)
        return self.tokenized("own", "--input", written, "--json-key", "tokens")

    def answers(self) -> list[Path]:
        """What the model says to the prompts, greedily: by benchmark."""
        prompts = packages.write_prompts(self.packages, self.turn, self.options.answers)
        words = ("--max-new-tokens", 128, "--temperature", 0, "--dtype", self.options.decoding_dtype)
        return [self.written(f"answers/{p.stem}", "--prompts", p, *words) for p in prompts]

    def written(self, name: str, *words: object) -> Path:
        """Text that the model writes, with its main head alone."""
        folder = self.out / name
        if not (folder / "generated.jsonl").exists():
            load = ("--load", self.imported(IMPORTED), "--output", folder, "--batch-size", 64)
            tool("generate_data.py", *load, *words, ranks=RANKS)
        return folder / "generated.jsonl"

    def tokenized(self, name: str, *words: object) -> Path:
        prefix = self.out / "data" / name
        if not prefix.with_suffix(".idx").exists():
            tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer()]
            tool("preprocess_data.py", *words, *tokenizer, "--output-prefix", prefix, "--workers", CORES, "--force")
        return prefix

    def tokenizer(self) -> Path:
        return self.imported(IMPORTED) / "hf"

    # Stages --------------------------------------------------------------------------------------------------------

    def train(self, stages: Sequence[Stage], steps: int) -> None:
        commands = {s.name: self.command(s, steps) for s in stages if read_tracker(self.checkpoints(s.name)) != steps}
        if commands:
            print(f"\nTraining {', '.join(commands)}: {steps} steps", flush=True)
            train(commands, self.out / "logs", steps, min(self.options.at_once, len(commands)))

    def command(self, stage: Stage, steps: int) -> list[str]:
        """The training of a stage, from what it saved before it was interrupted, its source, or the import."""
        own, options = self.checkpoints(stage.name), self.options
        start = self.checkpoints(stage.source) if stage.source else self.imported(stage.init)
        lines = (self.imported(IMPORTED) / "model.args").read_text().splitlines()
        command = [ROOT / "tools" / "pretrain_mtpd.py", *" ".join(x for x in lines if x[0] != "#").split()]
        command += ["--mtp-num-layers", stage.heads, "--mtpd-train", "heads", *stage.flags]
        command += ["--load", start if read_tracker(own) is None else own, "--save", own]
        command += ["--save-interval", max(1, steps // 2), "--no-initialization", "--ckpt-format", "torch_dist"]
        command += ["--data-path", *self.data, "--split", "95,5,0", "--data-cache-path", self.out / "data" / "index"]
        command += ["--seq-length", SEQ_LENGTH, "--num-workers", 0, "--no-create-attention-mask-in-dataloader"]
        command += ["--train-iters", steps, "--micro-batch-size", options.batch, "--global-batch-size", options.batch]
        command += ["--lr", options.lr, "--min-lr", options.lr / 20, "--lr-decay-style", "cosine"]
        command += ["--lr-warmup-iters", max(1, steps // 20), "--weight-decay", 0, "--adam-beta2", 0.95]
        command += ["--clip-grad", 1.0, "--seed", options.seed, "--log-interval", 10]
        command += ["--eval-interval", steps, "--eval-iters", max(2, min(16, steps // 10))]
        command += ["--tensorboard-dir", self.folder(stage.name) / "tensorboard", "--tensorboard-log-interval", 1]
        return [str(word) for word in command]

    def extend(self, stage: Stage) -> None:
        save = self.checkpoints(stage.name)
        if read_tracker(save) is None:
            assert stage.source is not None
            words = ["--load", self.checkpoints(stage.source), "--save", save, "--num-heads", stage.heads]
            tool("loop_extend.py", *words)

    def measure_answers(self, stage: Stage) -> None:
        """Greedy acceptance of a draft from every token of the model's answers, in one pass over each."""
        results = self.folder(stage.name) / "answers"
        if not done(results / "acceptance.json"):
            answers = [f"{path.parent.name}={path}" for path in self.answers()]
            few = ["--limit", max(1, self.options.answers // 4)] if stage.heads > HEADS else []  # each head takes time
            self.benchmark(stage.name, results, answers, [stage.heads], "--teacher-forced", *few, ranks=RANKS)

    def measure(self, stage: Stage) -> None:
        """Greedy acceptance with all heads, and the main head's loss; all cores, and no claim on speed."""
        results = self.folder(stage.name) / "acceptance"
        if not done(results / "acceptance.json"):
            self.benchmark(stage.name, results, self.prompts, [stage.heads], "--batch-size", 16, ranks=RANKS)

    def measure_sampled(self, stage: Stage) -> None:
        """Acceptance by rejection sampling, at temperature 1, of half the prompts."""
        results = self.folder(stage.name) / "sampled"
        if not done(results / "acceptance.json"):
            words = ["--batch-size", 16, "--temperature", 1, "--draft", "sampled", "--limit"]
            words.append(max(1, self.options.prompts // 2))
            self.benchmark(stage.name, results, self.prompts, [stage.heads], *words, ranks=RANKS)

    def benchmark(
        self, stage: str, results: Path, prompts: Sequence[object], heads: Iterable[int], *words: object, ranks: int = 1
    ) -> None:
        words = ("--load", self.checkpoints(stage), "--prompts", *prompts, "--output", results, *words)
        words = (*words, "--num-heads", *heads, "--max-new-tokens", NEW_TOKENS, "--max-prompt-tokens", 768)
        words = (*words, "--dtype", self.options.decoding_dtype)
        tool("benchmark_acceptance.py", *words, ranks=ranks)

    def export(self, stage: str, form: str) -> Path:
        """The folder that transformers or vLLM reads."""
        save = self.out / "exported" / form
        if not (save / "config.json").exists():
            acceptance = self.folder(stage) / "acceptance" / "acceptance.json"
            words = ["export", "--load", self.checkpoints(stage), "--save", save, "--format", form]
            words += ["--dtype", self.options.decoding_dtype]
            tool("convert_hf.py", *words, "--hf", self.tokenizer(), "--acceptance", acceptance, "--force")
        return save

    def measure_speed(self, stage: str, exported: Path) -> None:
        """One sequence at a time with all cores: what one reader sees, ours and transformers', in turns."""
        results = self.out / "speed.json"
        if not results.exists():
            few = packages.write_prompts(self.packages, self.turn, min(3, self.options.prompts))
            ids = min(DRAFTED, HuggingFaceTokenizer(str(self.tokenizer())).vocab_size)
            words = ["--load", self.checkpoints(stage), "--hf", exported, "--prompts", *few, "--num-heads", 1, 2, HEADS]
            words += ["--draft-vocab-size", ids, "--new-tokens", NEW_TOKENS, "--json", results]
            tool("benchmark_generate.py", *words)

    def compare_vllm(self, stage: str, exported: Path) -> None:
        """In vLLM what the export is for, where `make test-serving` has made an environment with it."""
        results = self.out / "vllm"
        if not self.options.vllm.exists():
            print(f"\nNot run in vLLM: there is no {self.options.vllm}; `make test-serving` makes one.")
        elif not (results / "compared.json").exists():
            few = packages.write_prompts(self.packages, self.turn, min(6, self.options.prompts))
            words = ["--batch-size", 1, "--ignore-eod", "--mask-position-0"]
            if not done(results / "acceptance.json"):
                self.benchmark(stage, results, few, [HEADS], *words)
            words = ["--model", exported, "--prompts", *few, "--results", results, "--new-tokens", NEW_TOKENS]
            call([Path(__file__).with_name("vllm_check.py"), *words, "--python", self.options.vllm], CORES)


def done(acceptance: Path) -> bool:
    return acceptance.exists() and json.loads(acceptance.read_text())["complete"]


def tool(name: str, *words: object, ranks: int = 1) -> None:
    """Run a tool as a user would: with all cores for one process, or a core for each of some ranks."""
    many = ["-m", "torch.distributed.run", "--nproc-per-node", ranks] if ranks > 1 else []
    call([*many, ROOT / "tools" / name, *words], max(1, CORES // ranks))


def call(words: Sequence[object], threads: int) -> None:
    command = [str(word) for word in words]
    print("\n$ python " + " ".join(os.path.relpath(w) if w.startswith("/") else w for w in command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    if subprocess.run([sys.executable, *command], env=environment, check=False).returncode:
        sys.exit("That failed; run the same again to go on from here.")


if __name__ == "__main__":
    main()
