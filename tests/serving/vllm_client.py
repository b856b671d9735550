"""Greedy continuations by vLLM on the CPU with an export's heads; run by the Python that has vLLM.

    python vllm_client.py < questions > answers

A question is a line of JSON: `folder`, `heads` (draft tokens a step), `prompts` (lists of token ids), `new_tokens`, and
`max_model_len` where a prompt with its new tokens is longer than 256. The
prompts run as one batch, in an engine of their own. Its answer is a line too: of each prompt its `tokens`, and how many
drafts each of its steps `accepted`; and vLLM's counters over all, `num_drafts` and `num_accepted_tokens_per_pos`.
"""

import gc
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


def answer(
    folder: str, heads: int, prompts: list[list[int]], new_tokens: int, max_model_len: int = 256
) -> dict[str, object]:
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        gpu_memory_utilization=0.1,
        max_model_len=max_model_len,
        max_num_seqs=len(prompts),
        disable_log_stats=False,
        per_request_spec_decode_metrics="detailed",
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        speculative_config={"method": "mtp", "num_speculative_tokens": heads},
    )
    settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [output.outputs[0] for output in llm.generate(asked, settings, use_tqdm=False)]
    counters = {metric.name: metric for metric in llm.get_metrics()}
    found = {
        "version": vllm.__version__,
        "tokens": [list(output.token_ids) for output in outputs],
        "accepted": [output.spec_decode_metrics.per_step_accepted for output in outputs],
        "num_drafts": counters["vllm:spec_decode_num_drafts"].value,
        "num_accepted_tokens_per_pos": counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values,
    }
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever vLLM prints is no part of an answer
    use_triton_on_cpu()
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
