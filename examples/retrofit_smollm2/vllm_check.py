"""The export in vLLM on the CPU: its tokens and its accepted drafts beside those of our own benchmark.

Prompts and number of new tokens are those of the run in `--results`, which has counted with `--mask-position-0`, as
vLLM computes. vLLM has an environment of its own (`make test-serving` makes it); the tests' client runs in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

from transformers import AutoTokenizer

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.speculative.prompts import read_prompts
from megatron_mtpd.speculative.results import read_lines

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "tests" / "serving" / "vllm_client.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported in the format deepseek-v3")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="PATH", help="as in the acceptance benchmark")
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="of it; gets compared.json")
    parser.add_argument("--heads", type=int, default=4, metavar="K", help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="[%(default)s]")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="that has vLLM")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [prompt.text for prompt in read_prompts(options.prompts)]
    prompts = [tokenizer(text).input_ids[-options.max_prompt_tokens :] for text in texts]
    question = {"folder": str(options.model), "heads": options.heads, "prompts": prompts}
    question |= {"new_tokens": options.new_tokens, "max_model_len": options.max_prompt_tokens + options.new_tokens + 64}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(options.python), str(CLIENT)]
    words = json.dumps(question) + "\n"
    done = subprocess.run(command, input=words, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    theirs = json.loads(done.stdout)
    ours = {line["prompt"]: line for line in read_lines(options.results) if line["run"] == options.heads}
    counts = [ours[number]["acceptance"] for number in range(len(prompts))]
    accepted = [sum(column) for column in zip(*(c["num_accepted_tokens_per_pos"] for c in counts), strict=True)]
    found = {
        "version": theirs["version"],
        "prompts": len(prompts),
        "equal_tokens": sum(tokens == ours[number]["tokens"] for number, tokens in enumerate(theirs["tokens"])),
        "drafts": {"vllm": theirs["num_drafts"], "ours": sum(c["num_drafts"] for c in counts)},
        "accepted_per_pos": {"vllm": theirs["num_accepted_tokens_per_pos"], "ours": accepted},
    }
    with written_whole(options.results / "compared.json") as file:
        file.write(json.dumps(found).encode())
    print(found)


if __name__ == "__main__":
    main()
