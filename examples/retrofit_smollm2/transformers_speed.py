"""transformers' `generate` on the exported model: plain decoding, one sequence at a time, beside our own decoding.

Prompts, dtype, threads and number of new tokens are those of the acceptance benchmark's run in `--results`, and the
outputs are compared with its plain decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mtpd.checkpoint.files import written_whole
from megatron_mtpd.speculative.prompts import read_prompts
from megatron_mtpd.speculative.results import read_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported for transformers")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="PATH", help="as in the acceptance benchmark")
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="of it; gets transformers.json")
    parser.add_argument("--new-tokens", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--max-prompt-tokens", type=int, default=512, help="[%(default)s]")
    options = parser.parse_args()

    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    model.generation_config.eos_token_id = None  # go on behind the end, as the benchmark does
    if torch.cuda.is_available():
        model.cuda()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [prompt.text for prompt in read_prompts(options.prompts)]
    prompts = [tokenizer(text).input_ids[-options.max_prompt_tokens :] for text in texts]
    fixed = {"do_sample": False, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

    @torch.inference_mode()
    def outputs(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=model.device)
        done = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **fixed)
        return done[0, len(prompt) :].tolist()

    outputs(prompts[0])  # to warm up
    start = time.perf_counter()
    found = [outputs(prompt) for prompt in prompts]
    seconds = time.perf_counter() - start
    ours = _plain_outputs(options.results)
    equal = sum(tokens == ours[index] for index, tokens in enumerate(found))
    values = {
        "tokens_per_second": len(prompts) * options.new_tokens / seconds,
        "outputs_equal_to_ours": f"{equal} of {len(prompts)}",
        "threads": torch.get_num_threads(),
    }
    with written_whole(options.results / "transformers.json") as file:
        file.write(json.dumps(values).encode())
    print(values)


def _plain_outputs(results: Path) -> dict[int, list[int]]:
    """New tokens of each prompt by plain decoding, as the benchmark kept them."""
    return {line["prompt"]: line["tokens"] for line in read_lines(results) if line["run"] == 0}


if __name__ == "__main__":
    main()
