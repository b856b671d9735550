"""Plan a run from its flags: parameters, memory by rank, operations, a balanced pipeline, the expected step time."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from megatron_mtpd import platform

platform.setup()

from megatron_mtpd.planning.flags import run_from_flags  # noqa: E402
from megatron_mtpd.planning.gpus import GPUS  # noqa: E402
from megatron_mtpd.planning.plan import balanced_stages, plan, table, with_stages  # noqa: E402

EXAMPLE = """\
All flags that are not below are those of tools/pretrain_mtpd.py; @FILE reads them from a file, with # comments:
  python tools/plan_run.py --nodes 32 --gpu H100 --vocab-size 122880 \\
      @slurm/configs/dense-2b/model.args @slurm/configs/dense-2b/nodes-32.args
"""


def read(word: str) -> list[str]:
    return shlex.split(Path(word[1:]).read_text(), comments=True) if word.startswith("@") else [word]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu"], default="H100", help="[%(default)s]")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="instead of the GPU's own")
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that a busy GPU reaches [%(default)s]"
    )
    parser.add_argument("--balance", action="store_true", help="plan with the balanced layout")
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        options, flags = parser.parse_known_args([part for word in sys.argv[1:] for part in read(word)])
        gpu = GPUS.get(options.gpu)
        if gpu and options.gpu_memory:
            gpu = replace(gpu, gib=options.gpu_memory)
        run = run_from_flags(flags, options.nodes * options.gpus_per_node, on_cpu=gpu is None, gpu=gpu)
        if options.balance:
            run = with_stages(run, balanced_stages(run, gpu))
        result = plan(run, gpu, options.mfu)
    except (ValueError, OSError) as error:
        sys.exit(f"plan_run.py: error: {error}")
    print(json.dumps(result.as_json(), indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
