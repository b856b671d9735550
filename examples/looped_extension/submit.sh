#!/usr/bin/env bash
# Looped extension at the paper's sizes, as a chain of Slurm jobs: pretrain with 4 heads, extend to 8 and train those,
# extend to 16 and train those; and after each of them the acceptance, of the trained heads and of the fresh copies.
#
#   MTPD_MODEL=dense-2b PROMPTS="/shared/gsm8k.jsonl /shared/math" SBATCH="--nodes=4 --time=24:00:00 -A ACCOUNT" \
#       examples/looped_extension/submit.sh --data-path /shared/data/corpus \
#       --tokenizer-type SentencePieceTokenizer --tokenizer-model /shared/data/tok.model
#
# What follows goes to every training. Run it in the checkout, on a login node; it submits eight jobs and prints their
# numbers. Each job is requeued by itself (slurm/README.md); a stage starts when the one before is really done.
# Submitted again, every stage goes on from its last checkpoint, and one that was done ends at once.
#
#   RUNS       where everything goes [runs/MODEL-looped], shared by all nodes
#   HEADS      numbers of heads [4 8 16]; the first is that of the configuration
#   NEW_ITERS  steps of each training of new heads [8350: a tenth of dense-2b's]
#   SBATCH     words for every sbatch;  BENCHMARK_SBATCH: for the benchmarks [those of SBATCH]
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }
[ -r slurm/entry.sh ] || fail "run it in the checkout: there is no slurm/entry.sh here."
[ -n "${MTPD_MODEL:-}" ] || fail "MTPD_MODEL is not set: name a folder of slurm/configs, dense-2b or moe-10b-a1b."
[ -n "${PROMPTS:-}" ] || fail "PROMPTS is not set: name the files of the benchmark (tools/benchmark_acceptance.py --help)."
command -v sbatch >/dev/null || fail "there is no sbatch: this is for a Slurm cluster. On one machine: run.py beside this."
unset MTPD_RUN_DIR MTPD_LOAD MTPD_HEADS # each job has its own
RUNS=$(realpath -m "${RUNS:-runs/${MTPD_MODEL##*/}-looped}")
HEADS=(${HEADS:-4 8 16})
read -ra words <<<"${SBATCH:-}"
read -ra benchmark_words <<<"${BENCHMARK_SBATCH:-${SBATCH:-}}"
read -ra prompts <<<"$PROMPTS"
mkdir -p "$RUNS"

# submit NAME AFTER SCRIPT ARGUMENTS...: sets job to the number of a job that starts when job AFTER (or none) is done.
submit() {
    local name=$1 after=$2
    shift 2
    job=$(sbatch --parsable --job-name="$name" --output="$RUNS/$name-%j.out" ${after:+--dependency=afterok:"$after"} \
        ${after:+--kill-on-invalid-dep=yes} "${options[@]}" "$@")
    job=${job%%;*} # a cluster's name may follow
    echo "job $job: $name${after:+, after $after}"
}

benchmark() { # benchmark HEADS CHECKPOINTS AFTER
    options=("${benchmark_words[@]}")
    local sizes=("${HEADS[0]}")
    (($1 == HEADS[0])) || sizes+=("$1")
    MTPD_LOAD=$2 submit "acceptance-$(basename "$(dirname "$2")")-$(basename "$2")" "$3" slurm/benchmark_acceptance.sh \
        --prompts "${prompts[@]}" --num-heads "${sizes[@]}"
}

options=("${words[@]}")
MTPD_RUN_DIR=$RUNS/${HEADS[0]}-heads submit "train-${HEADS[0]}-heads" "" slurm/pretrain_mtpd.sh "$@"
before=$RUNS/${HEADS[0]}-heads/checkpoints trained=$job
benchmark "${HEADS[0]}" "$before" "$trained"
for heads in "${HEADS[@]:1}"; do
    options=("${words[@]}")
    MTPD_LOAD=$before MTPD_HEADS=$heads MTPD_RUN_DIR=$RUNS/$heads-heads \
        submit "train-$heads-heads" "$trained" slurm/loop_extend.sh "$@" --train-iters "${NEW_ITERS:-8350}"
    before=$RUNS/$heads-heads/checkpoints trained=$job
    benchmark "$heads" "$RUNS/$heads-heads/extended" "$trained" # the copies, as they were before this training
    benchmark "$heads" "$before" "$trained"
done
