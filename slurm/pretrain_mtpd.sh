#!/usr/bin/env bash
# Pretrain one of slurm/configs, from the checkout:
#   MTPD_MODEL=dense-2b MTPD_RUN_DIR=/shared/runs/dense-2b sbatch --nodes=4 --time=24:00:00 slurm/pretrain_mtpd.sh \
#       --data-path /shared/data/corpus --tokenizer-type SentencePieceTokenizer --tokenizer-model /shared/data/tok.model
# What follows the script goes to tools/pretrain_mtpd.py, after the configuration, and wins. See slurm/README.md.
#SBATCH --job-name=pretrain_mtpd
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@600
MTPD_ROOT=${MTPD_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}} # Slurm runs a copy of this file, from a folder of its own
source "$MTPD_ROOT/slurm/entry.sh" || { echo "error: submit from the checkout, or set MTPD_ROOT to it" >&2; exit 2; }

start_job pretrain_mtpd "runs/${MTPD_MODEL##*/}"
read_model
refuse_flags "$@"
preflight
train "${MTPD_LOAD:-}" "${MODEL[@]}" "$@"
