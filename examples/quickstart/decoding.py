"""The quickstart's last step: decode with the heads that were just trained, on text that was held out.

The acceptance benchmark runs for each variant as a user would run it, one prompt at a time: the speed is that which one
reader sees.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from toy import ROOT, SEQ_LENGTH

from megatron_mtpd.data.stdlib_corpus import stdlib_documents

NEW_TOKENS = SEQ_LENGTH // 2
HELD_OUT = 0.96
"""Training took the first 95% of the documents (--split of the training command); these are well behind."""


def write_prompts(path: Path, number: int, characters: int = 160) -> None:
    """Prompts from the held-out sources, each from the beginning of a line on."""
    documents = [document.text for document in stdlib_documents()]
    documents = documents[int(HELD_OUT * len(documents)) :]
    choose = random.Random(1)
    with open(path, "w") as file:
        for index in range(number):
            lines = documents[index % len(documents)].splitlines(keepends=True)
            begin = choose.randrange(max(1, len(lines) - 8))
            file.write(json.dumps({"prompt": "".join(lines[begin:])[:characters]}) + "\n")


def decode(out: Path, variants: list[str], num_prompts: int, num_heads: list[int]) -> dict[str, dict]:
    """`acceptance.json` of each variant. Exits with the benchmark's errors when it fails."""
    folder = out / "acceptance"
    folder.mkdir()
    write_prompts(folder / "prompts.jsonl", num_prompts)
    found = {}
    for variant in variants:
        words = [ROOT / "tools" / "benchmark_acceptance.py", "--load", out / "checkpoints" / variant]
        words += ["--prompts", f"held-out={folder / 'prompts.jsonl'}", "--num-heads", *num_heads, "--batch-size", 1]
        words += ["--max-new-tokens", NEW_TOKENS, "--ignore-eod", "--output", folder / variant]
        command = [str(word) for word in words]
        if not found:
            shown = (word.replace(f"{ROOT}/", "") for word in command)
            print("$ python " + " ".join(shown), flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}\nDecoding with {variant} failed; the commands above say how.")
        found[variant] = json.loads((folder / variant / "acceptance.json").read_text())
    return found


def print_decoding(titles: dict[str, str], found: dict[str, dict]) -> None:
    """Acceptance and speed for people, and why the one does not give the other here."""
    first = next(iter(found.values()))
    tokens = first["settings"]["max_new_tokens"]
    print(f"\n{first['num_prompts']} held-out prompts, {tokens} tokens each, greedy, one at a time")
    print(f"{'':34}" + "".join(f"{titles[variant]:>12}" for variant in found))

    def row(name: str, values: list[float], digits: int) -> None:
        print(f"{name:34}" + "".join(f"{value:12.{digits}f}" for value in values))

    drafting = [index for index, run in enumerate(first["runs"]) if run["num_heads"]]
    runs = [[one["runs"][index] for one in found.values()] for index in range(len(first["runs"]))]
    for head, _ in enumerate(runs[-1][0]["cumulative_acceptance_rate"]):
        rates = [100 * run["cumulative_acceptance_rate"][head] for run in runs[-1]]
        row(f"head {head + 1}: accepted with all before (%)", rates, 1)
    row("plain decoding: tokens a second", [run["tokens_per_second"] for run in runs[0]], 0)
    for index in drafting:
        heads = runs[index][0]["num_heads"]
        row(f"{heads} head{'s' * (heads > 1)}: tokens a step", [run["acceptance_length"] for run in runs[index]], 2)
        row("   speed over plain decoding", [run["speedup_vs_autoregressive"] for run in runs[index]], 2)
    equal = [one["runs"][index]["outputs_equal_to_plain"] for one in found.values() for index in drafting]
    print(f"Outputs equal to those of plain decoding: {', '.join(equal)}.")
    for variant, one in found.items():
        step = one["step_cost"]
        plain, last = (step["by_num_heads"][index]["measured"] for index in (0, -1))
        unit = plain["verify_seconds_per_step"]
        draft, verify = (last[f"{part}_seconds_per_step"] / unit for part in ("draft", "verify"))
        print(
            f"{titles[variant]}: a step with {step['by_num_heads'][-1]['num_heads']} heads takes {draft + verify:.1f} "
            f"plain steps, {draft:.1f} to draft and {verify:.1f} to check, and gives {last['tokens_per_step']:.1f} "
            f"tokens.\n  Fastest number of heads here, by the cost model: {step['best_num_heads_predicted']}."
        )
    print(
        "A head is a layer, and this model has three, so that drafting is dear. In a model of many layers a head is\n"
        "cheap, and the speed comes near the tokens a step."
    )
