"""Check that every node is fit for a long job: imports, versions, GPUs, shared folder, disk, clocks, an all-reduce.

torchrun --nproc-per-node 8 tools/preflight.py --shared /shared/runs/dense-2b
"""

from megatron_mtpd.training.preflight import main

if __name__ == "__main__":
    main()
