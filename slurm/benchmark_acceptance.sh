#!/usr/bin/env bash
# Measure the acceptance of a checkpoint's heads on prompts that are dealt over all ranks:
#   MTPD_LOAD=/shared/runs/dense-2b/checkpoints sbatch --nodes=2 --time=4:00:00 slurm/benchmark_acceptance.sh \
#       --prompts /shared/data/gsm8k.jsonl --num-heads 1 2 4
# What follows the script goes to tools/benchmark_acceptance.py. See slurm/README.md.
#SBATCH --job-name=benchmark_acceptance
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@120
MTPD_ROOT=${MTPD_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}} # Slurm runs a copy of this file, from a folder of its own
source "$MTPD_ROOT/slurm/entry.sh" || { echo "error: submit from the checkout, or set MTPD_ROOT to it" >&2; exit 2; }

[ -n "${MTPD_LOAD:-}" ] || fail "MTPD_LOAD is not set: name the checkpoints to measure."
start_job benchmark_acceptance "${MTPD_LOAD%/}-acceptance"
stop_signal=TERM # a rerun goes on from what is done: nothing has to be saved first
preflight
attempt "$MTPD_ROOT/tools/benchmark_acceptance.py" --load "$MTPD_LOAD" --output "$RUN" "$@"
