"""The model card of an export: what it is, which engine runs it with which settings, and what was measured.

And the few lines of code that transformers needs to find heads in a folder whose architecture it knows without them: it
looks for them where the model class says, and no class of an ordinary dense model says anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_mtpd.checkpoint.hf.architectures.architecture import Architecture
from megatron_mtpd.checkpoint.hf.formats import DEEPSEEK, MIMO, TRANSFORMERS, TRUNK, Format
from megatron_mtpd.checkpoint.hf.shape import Shape

CODE = "modeling_mtp"
CLASS = "MTPForCausalLM"

_CODE = '''"""The model of transformers, told where its multi-token prediction heads are: behind the last layer."""

from transformers import {base}


class {name}({base}):
    def __init__(self, config):
        super().__init__(config)
        first = config.num_hidden_layers
        layers = range(first, first + config.num_mtp_layers)
        self._keys_to_ignore_on_load_unexpected = {{rf"^model\\.layers\\.{{n}}\\." for n in layers}}
'''

_USE = {
    TRUNK.name: """transformers, vLLM, SGLang: as any {class_name}.
""",
    TRANSFORMERS.name: """transformers >= 5.20, one sequence at a time:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)  # for the {lines} lines of {code}.py
tokenizer = AutoTokenizer.from_pretrained("{name}")
text = "Once upon a time there was a small model that wanted to say many things at once, and so it"
inputs = tokenizer(text, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, use_mtp=True, do_sample=False, max_new_tokens=64)[0]))
```

A prompt of fewer tokens than there are heads raises an error there (5.23). Without `trust_remote_code=True` it is the
main model alone, an ordinary {class_name}. {others}
""",
    DEEPSEEK.name: """\
vLLM >= 0.32, with its V2 model runner. The older one uses head 1 at every depth, without an error: the output
stays right, and acceptance falls. (Its warning about the same layer being run several times is printed for both.)

```sh
VLLM_MLA_DISABLE=1 VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {name} \\
    --speculative-config '{{"method": "mtp", "num_speculative_tokens": {heads}}}'
```

`num_speculative_tokens` may be less than {heads}; a multiple of it would use the heads again from the first. vLLM
zeroes the heads' embedding at position 0, which was not so in training: `tools/benchmark_acceptance.py
--mask-position-0` counts as it does. While a text has fewer tokens than there are heads, 0.32 drafts something else
(it runs the heads anew from before the first position), and accepts less. No other program reads this folder: its
model type is DeepSeek-V3's, its layers are a {class_name}'s.
""",
    MIMO.name: """\
SGLang, with one draft token a step (more would use the head again). Made from its source, not run by this
project's tests:

```sh
python -m sglang.launch_server --model-path {name} --speculative-algorithm EAGLE \\
    --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2
```

Like vLLM, SGLang zeroes the head's embedding at position 0: `tools/benchmark_acceptance.py --mask-position-0` counts
as they do. vLLM reads this folder too, and hands the head a hidden state before the final norm, which was not so in
training: the output stays right, and acceptance falls. Use `--format deepseek-v3` there.
""",
}


def files(
    architecture: Architecture, shape: Shape, form: Format, name: str, acceptance: dict[str, Any] | None
) -> dict[str, str]:
    """Text files of an export by name. Raises ValueError where `acceptance` is not what the benchmark writes."""
    code = _CODE.format(base=architecture.class_name, name=CLASS)
    lines = len(code.splitlines())
    use = _USE[form.name].format(
        name=name,
        class_name=architecture.class_name,
        heads=shape.num_heads,
        code=CODE,
        lines=lines,
        others=_others(architecture, shape),
    )
    heads = f" with {shape.num_heads} multi-token prediction heads" if shape.num_heads else ""
    text = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [multi-token-prediction, speculative-decoding]" if shape.num_heads else "tags: []",
        "---",
        "",
        f"# {name}",
        "",
        f"A {architecture.class_name}{heads}, {shape.num_layers} layers of width {shape.hidden_size}, {shape.dtype}; "
        "exported by megatron_mtpd.",
        "",
        "## Which engine runs it",
        "",
        use,
        "## Measured acceptance",
        "",
        _measured(acceptance, shape) if shape.num_heads else "It has no heads.",
    ]
    code_files = {f"{CODE}.py": code} if form is TRANSFORMERS else {}
    return {"README.md": "\n".join(text) + "\n", **code_files}


def _others(architecture: Architecture, shape: Shape) -> str:
    """What vLLM and SGLang make of a folder in the format of transformers."""
    if architecture.copied:
        return (
            "vLLM and SGLang know this format, with the heads. vLLM runs more than one as trained with "
            "`VLLM_USE_V2_MODEL_RUNNER=1` alone; neither engine was run with it by this project."
        )
    able = [f"`--format {DEEPSEEK.name}`"] if not DEEPSEEK.refuse(shape) else []
    if not MIMO.refuse(replace(shape, num_heads=1)):
        able.append(f"`--format {MIMO.name}{' --num-heads 1' if shape.num_heads > 1 else ''}`")
    remedy = f"export with {' or '.join(able)} for them" if able else "no format of theirs can hold this model's"
    return f"vLLM and SGLang do not find heads here: {remedy}."


def auto_map() -> dict[str, str]:
    """Of config.json: where transformers finds the class."""
    return {"AutoModelForCausalLM": f"{CODE}.{CLASS}"}


def _measured(acceptance: dict[str, Any] | None, shape: Shape) -> str:
    if acceptance is None:
        return "Not measured: `tools/benchmark_acceptance.py` writes an acceptance.json for `--acceptance`."
    try:
        settings, source = acceptance["settings"], acceptance["provenance"]
        runs = [run for run in acceptance["runs"] if 0 < run["num_heads"] <= shape.num_heads]
        loss = acceptance["teacher_forced"]["main_loss"]
        rows = [
            f"| {run['num_heads']} | {run['acceptance_length']:.3f} | {_percent(run['acceptance_rate'])} | "
            f"{_percent(run['cumulative_acceptance_rate'])} | {run['num_drafts']} |"
            for run in runs
            if run["num_drafts"]
        ]
        decoding = "greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']}"
        if settings.get("draft_vocab_size"):
            decoding += f", drafts of the first {settings['draft_vocab_size']:,} ids alone"
        where = [
            f"{acceptance['num_prompts']} prompts, {decoding}, up to {settings['max_new_tokens']} new tokens, "
            f"weights in {settings['dtype']}; {_source(source)}."
        ]
        if loss is not None:
            where.append(f"The main head's loss on the prompts is {loss:.4f} nats a token.")
        if not rows:
            return " ".join([*where, "No run with heads is in it."])
        return "\n".join(
            [
                " ".join(where),
                "",
                "| heads | acceptance length | AR by head (%) | CAR by head (%) | drafts |",
                "|---|---|---|---|---|",
                *rows,
                "",
                "Acceptance length: tokens a step. AR: accepted drafts among those whose earlier heads were right. "
                "CAR: among all.",
            ]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"--acceptance: it is not what tools/benchmark_acceptance.py writes: {error} is missing or of another kind."
        ) from error


def _source(provenance: dict[str, Any]) -> str:
    """Date, code and machine of a measurement."""
    hardware = provenance["hardware"]
    machine = hardware.get("gpu") or hardware["cpu"]
    return f"{provenance['date']}, commit {(provenance['commit'] or 'unknown')[:10]}, {machine}"


def _percent(rates: list[float | None]) -> str:
    return " ".join("-" if rate is None else f"{100 * rate:.1f}" for rate in rates)
