#!/usr/bin/env bash
# Give a trained checkpoint more heads, then train them:
#   MTPD_MODEL=dense-2b MTPD_LOAD=/shared/runs/dense-2b/checkpoints MTPD_HEADS=16 \
#       sbatch --nodes=4 --time=24:00:00 slurm/loop_extend.sh --data-path ... --train-iters 17000
# What follows the script goes to tools/pretrain_mtpd.py, after the configuration, and wins. See slurm/README.md.
#SBATCH --job-name=loop_extend
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

start_job loop_extend "runs/${MTPD_MODEL##*/}-${MTPD_HEADS:-}"
read_model
refuse_flags "$@"
[ -n "${MTPD_LOAD:-}" ] || fail "MTPD_LOAD is not set: name the checkpoints whose heads are extended."
[[ ${MTPD_HEADS:-} =~ ^[1-9][0-9]*$ ]] || fail "MTPD_HEADS=${MTPD_HEADS:-}: say how many heads the model is to have."
found=$(run_once "$MTPD_ROOT/tools/inspect_checkpoint.py" --load "$MTPD_LOAD" --json) ||
    fail "MTPD_LOAD=$MTPD_LOAD cannot be read, see above."
old_heads=$(sed -n 's/^ "heads": \([0-9]*\).*/\1/p' <<<"$found")
preflight
if [ ! -e "$RUN/extended" ]; then # it is there whole or not at all
    run_once "$MTPD_ROOT/tools/loop_extend.py" --load "$MTPD_LOAD" --save "$RUN/extended" --num-heads "$MTPD_HEADS" ||
        fail "the extension failed, see above."
fi
train "$RUN/extended" "${MODEL[@]}" --mtp-num-layers "$MTPD_HEADS" --mtpd-train "${MTPD_TRAIN:-new-heads}" \
    --mtpd-old-heads "${old_heads:-K}" "$@"
