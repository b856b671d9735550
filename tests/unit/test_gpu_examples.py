"""The flags in examples/gpu: Megatron accepts each file with the model that it is for, and the plan of it fits.

Transformer Engine and GPUs are only said to be there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.gpus import GPUS  # noqa: E402
from megatron_mtpd.planning.plan import plan  # noqa: E402

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "gpu").glob("*.args"))
MODEL = ROOT / "slurm" / "configs" / "dense-2b"
WHOLE = {"deepseek-v3-671b": ("H100", 2048)}
"""Files with a model of their own: what they are for. Others say a GPU, and are added to the 2B model."""

# As rank 0 of the real number of ranks, in a process each, because Megatron keeps its arguments.
PARSE = """
import json, os, sys
from unittest.mock import patch
from megatron_mtpd import platform
from megatron_mtpd.training import pretrain
import megatron.core.utils, packaging.version, torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from megatron.training import arguments
megatron.core.utils._te_version = packaging.version.Version("2.20.2")
rope_utils.fused_apply_rotary_pos_emb = object()
for name in vars(moe_utils):
    if name.startswith("fused_") and getattr(moe_utils, name) is None:
        setattr(moe_utils, name, object())
found = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Megatron's messages
for ranks, capability, flags in json.load(sys.stdin):
    if os.fork() == 0:
        torch.cuda.get_device_capability = lambda *device: tuple(capability)
        platform.uses_transformer_engine = lambda: True
        with patch.object(torch.cuda, "is_available", lambda: True):
            platform.check_flags(flags)
        platform.check_flags = lambda flags: None
        arguments.get_device_arch_version = lambda: capability[0]
        os.environ |= {"WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
        args = pretrain.parse(flags)
        transformer = pretrain.model_config_from_args(args).transformer
        names = ["fp8", "fp8_recipe", "fp8_param", "bf16", "fp8_output_proj", "transformer_impl",
                 "attention_backend", "num_layers", "num_layers_at_start_in_bf16"]
        values = {name: str(getattr(transformer, name)) for name in names}
        values |= {"reset_attention_mask": str(args.reset_attention_mask), "rope_fusion": str(args.apply_rope_fusion)}
        print(json.dumps(values), file=found, flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""


def words(*files: Path, without: str = "# ") -> list[str]:
    """Of the lines that are no comments and do not begin with `without`."""
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith(("#", without))]
    return [word.strip("'") for line in lines for word in line.split()]


def cases() -> dict[str, tuple[str, int, list[str]]]:
    """GPU, how many, all flags."""
    found = {}
    for example in EXAMPLES:
        if example.stem in WHOLE:
            found[example.stem] = (*WHOLE[example.stem], words(example))
            continue
        gpu = example.stem.split("-")[0].upper()
        found[example.stem] = (gpu, 8, words(MODEL / "model.args", MODEL / "nodes-1.args", example))
    fp8, experts = ROOT / "examples" / "gpu" / "h100-fp8.args", MODEL.with_name("moe-10b-a1b")
    found["h100-fp8, TP 2"] = ("H100", 2048, words(MODEL / "model.args", MODEL / "nodes-256.args", fp8))
    found["h100-fp8, experts"] = ("H100", 256, words(experts / "model.args", experts / "nodes-32.args", fp8))
    for line in re.findall(r"(?m)^# .*: (--fp8-[^(.\n]*)", fp8.read_text()):  # what its comments offer instead
        recipe = line.split("--fp8-recipe ")[1].split()[0]
        own = words(fp8, without="--first-last-layers-bf16") if recipe == "delayed" else words(fp8)
        model = words(MODEL / "model.args", MODEL / "nodes-1.args")
        found[f"h100-fp8, {recipe}"] = ("H100", 8, [*model, *own, *line.split()])
    return found


@pytest.fixture(scope="module")
def parsed() -> dict[str, dict[str, str]]:
    """By example: what the model's configuration says."""
    own = [
        "--mock-data",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "122879",
        "--train-iters",
        "10",
        "--lr",
        "1e-4",
    ]
    requests = []
    for gpu, ranks, flags in cases().values():
        requests.append((ranks, (10, 0) if gpu == "B200" else (9, 0), [*own, *flags]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE], input=json.dumps(requests), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = map(json.loads, done.stdout.splitlines())
    return dict(zip(cases(), answers, strict=True))


def test_megatron_accepts_each(parsed):
    assert parsed.keys() >= {"h100-bf16", "h100-fp8", "b200-mxfp8", "deepseek-v3-671b"}
    for name, values in parsed.items():
        assert values["bf16"] == "True", name
        assert values["fp8_output_proj"] == "False", f"{name}: the losses read the output layer's weight"
        assert values["transformer_impl"] == "transformer_engine", name
        assert values["fp8_param"] == str("--fp8-param-gather" in cases()[name][2]), name
        # Its kernels are a package that the extra [te] does not bring.
        assert "flash" not in values["attention_backend"], name
        found, expected = (values["fp8"], values["fp8_recipe"]), ("hybrid", "tensorwise")
        others = {"bf16": ("None", "delayed"), "mxfp8": ("e4m3", "mxfp8"), "blockwise": ("e4m3", "blockwise")}
        others |= {"delayed": ("hybrid", "delayed")}
        assert found == next((other for end, other in others.items() if name.endswith(end)), expected), name
    h100 = parsed["h100-fp8"]
    assert (h100["num_layers"], h100["num_layers_at_start_in_bf16"]) == ("56", "2"), "two of 56 are one block of 28"


@pytest.mark.parametrize("name", cases())
def test_the_plan_of_each_fits(name):
    gpu, ranks, flags = cases()[name]
    flags += [] if "--vocab-size" in flags else ["--vocab-size", "122880"]
    result = plan(run_from_flags(flags, ranks), GPUS[gpu])
    assert result.fits
    assert result.seconds is not None and result.seconds > 0
    assert result.run.step.fp8 == ("--fp8-format" in flags)
