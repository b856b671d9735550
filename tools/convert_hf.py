"""Convert between Hugging Face folders and checkpoints: import a model to give it heads, export one to serve it.

Works on files alone, with a block of a tensor in memory, however large model and tensors are.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mtpd.checkpoint.hf.exporting import export_hf
from megatron_mtpd.checkpoint.hf.formats import FORMATS
from megatron_mtpd.checkpoint.hf.importing import DTYPES, import_hf

EXAMPLES = """\
examples:
  python tools/convert_hf.py import --hf SmolLM2-135M --save runs/smollm2 --num-heads 4
  python tools/pretrain_mtpd.py $(grep -v '^#' runs/smollm2/model.args) --load runs/smollm2 --mtpd-train heads ...
  python tools/convert_hf.py export --load runs/trained --hf runs/smollm2/hf --save served --format deepseek-v3
"""


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="Llama-like models and DeepSeek-V3 to a checkpoint").add_argument
    add("--hf", dest="source", type=Path, required=True, metavar="PATH", help="a folder with safetensors, or a .gguf")
    add("--save", type=Path, required=True, metavar="DIR", help="where the checkpoint goes")
    add("--num-heads", type=int, metavar="K", help="heads it has [those of the folder]")
    add("--init", choices=("last-layer", "random"), help="of new heads; fit_heads.py: a better start [last-layer]")
    add("--dtype", choices=DTYPES, help="of the weights [the folder's; of a .gguf fp32]")
    add("--max-position-embeddings", dest="max_positions", type=int, metavar="N", help="longest text [the folder's]")
    add("--seed", type=int, default=1234, help="of random heads [%(default)s]")
    add("--force", action="store_true", help="replace what is in --save, all of it")
    add = commands.add_parser("export", help="a checkpoint to a folder for a serving engine").add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="a run's checkpoints, or one of them")
    add("--save", type=Path, required=True, metavar="DIR", help="where the folder goes")
    add("--format", choices=FORMATS, default="transformers", help="deepseek-v3: vLLM; mimo: SGLang [%(default)s]")
    add("--hf", type=Path, metavar="DIR", help="config.json and tokenizer [those of the import]")
    add("--acceptance", type=Path, metavar="FILE", help="acceptance.json of the benchmark, for the model card")
    add("--num-heads", type=int, metavar="K", help="the first K heads [all]")
    add("--ckpt-step", type=int, metavar="N", help="export iteration N [the run's latest]")
    add("--dtype", choices=DTYPES, help="of the weights [as trained]")
    add("--vocab-size", type=int, metavar="V", help="rows of the embedding [as imported, or as trained]")
    add("--verify", dest="full", action="store_true", help="compare the checksums of all bytes first")
    add("--force", action="store_true", help="replace what is in --save, all of it")
    options = vars(parser.parse_args(argv))
    try:
        done = {"import": import_hf, "export": export_hf}[options.pop("command")](**options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    made = f"{options['save']}: {done.architecture.class_name}, {done.shape.num_heads} heads, {done.shape.dtype}"
    print("\nnote: ".join([made, *done.notes]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
