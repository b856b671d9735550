"""Pretrain a model with MTP-D heads: Megatron's training loop and flags, and --mtpd-* for the method.

python tools/pretrain_mtpd.py --num-layers 4 --mtp-num-layers 4 ...               one process
torchrun --nproc-per-node 8 tools/pretrain_mtpd.py --tensor-model-parallel-size 4 ...
"""

from megatron_mtpd.training.pretrain import main

if __name__ == "__main__":
    main()
