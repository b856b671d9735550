"""Greedy continuations by vLLM on the CPU, with and without an export's heads; run by the Python that has vLLM.

    python vllm_client.py FOLDER HEADS NEW_TOKENS < prompts.json > answer.json

Prompts are lists of token ids. For each, one after the other, the answer holds its tokens and vLLM's counts:
`num_drafts` and `num_accepted_tokens_per_pos`.
"""

import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",
    # Distinct heads need the newer runner, and that needs Triton, which has no CPU: its interpreter has to do.
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def use_triton_on_cpu() -> None:
    """Name the CPU as Triton's device; its interpreter never asks more of it."""
    import torch
    import triton
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        def __init__(self) -> None:
            super().__init__()

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> object:
            return triton.backends.compiler.GPUTarget("cpu", 0, 1)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_device_interface(self) -> object:
            return torch.cpu

        def get_benchmarker(self) -> None:
            return None

    backends["cpu"] = Backend(compiler=BaseBackend, driver=Driver)
    triton.runtime.driver.set_active(Driver())


def counts(llm: object) -> tuple[int, list[int]]:
    drafts, per_pos = 0, []
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            per_pos = list(metric.values)
    return drafts, per_pos


def main() -> None:
    folder, heads, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    prompts = json.load(sys.stdin)
    answer_file, sys.stdout = sys.stdout, sys.stderr  # whatever vLLM prints is no part of the answer
    use_triton_on_cpu()
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        gpu_memory_utilization=0.1,
        max_model_len=256,
        disable_log_stats=False,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        speculative_config={"method": "mtp", "num_speculative_tokens": heads} if heads else None,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    found, before = [], (0, [0] * heads)
    for prompt in prompts:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        after = counts(llm)
        accepted = [a - b for a, b in zip(after[1] or [0] * heads, before[1], strict=True)]
        tokens = list(output.outputs[0].token_ids)
        found.append({"tokens": tokens, "num_drafts": after[0] - before[0], "num_accepted_tokens_per_pos": accepted})
        before = (after[0], after[1] or [0] * heads)
    json.dump(found, answer_file)


if __name__ == "__main__":
    main()
