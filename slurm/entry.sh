# shellcheck shell=bash
# What the job scripts share: settings, sizes, start of the ranks, signals, restarts. They source it; nobody runs it.
#
# A job is one attempt after another at the same work, under one job id. How an attempt can end:
#   the ranks are done             the job is done
#   the time limit is near (USR1)  the ranks save and exit, the job is requeued
#   somebody asks for that (USR2)  the same, at once
#   a node dies                    Slurm requeues the job
#   a rank fails                   requeued if this attempt saved a checkpoint; else the job has failed, because what
#                                  fails before that (a wrong option, a bad node) would fail again
#   scancel (TERM)                 the job is over
# Every attempt resumes from the last checkpoint. The settings are in slurm/README.md.
set -uo pipefail

SETTINGS="ROOT MODEL LAYOUT RUN_DIR LOAD HEADS TRAIN PYTHON TOOL RANKS_PER_NODE MASTER_PORT MAX_RESTARTS REQUEUE \
PREFLIGHT DRY_RUN CONTAINER CONTAINER_MOUNTS WRAPPER SRUN_ARGS"

say() { echo "[$(date '+%F %T')] $*"; }
fail() {
    echo "error: $*" >&2
    exit 2
}
dry_run() { [ "${MTPD_DRY_RUN:-0}" != 0 ]; }

# --- settings and sizes -----------------------------------------------------------------------------------------------

check_settings() {
    local name
    for name in $(compgen -A variable MTPD_); do
        [[ " $SETTINGS " == *" ${name#MTPD_} "* ]] ||
            fail "$name is not a setting. There are:$(printf ' MTPD_%s' $SETTINGS)"
    done
}

# arguments_of FILE: its words, one a line. Quotes as in a shell, # starts a comment.
arguments_of() { sed 's/#.*//' "$1" | xargs -r printf '%s\n'; }

# Sets MODEL: the flags of MTPD_MODEL, and of its layout for the most nodes that are not more than the job's.
read_model() {
    local folder=${MTPD_MODEL:-} file size best=0
    [ -n "$folder" ] || fail "MTPD_MODEL is not set: name a folder of $MTPD_ROOT/slurm/configs ($(configs)), or a path."
    [[ $folder == */* ]] || folder=$MTPD_ROOT/slurm/configs/$folder
    [ -r "$folder/model.args" ] || fail "MTPD_MODEL=$MTPD_MODEL: there is no $folder/model.args. Names: $(configs)."
    for file in "$folder"/nodes-*.args; do
        size=${file##*/nodes-} size=${size%.args}
        ((size <= ${MTPD_LAYOUT:-$NODES} && size > best)) && best=$size
    done
    ((best)) || fail "MTPD_MODEL=$MTPD_MODEL has no layout for ${MTPD_LAYOUT:-$NODES} nodes: see $folder/nodes-*.args."
    mapfile -t MODEL < <(arguments_of "$folder/model.args" && arguments_of "$folder/nodes-$best.args")
    say "model $folder, layout for $best or more nodes"
}
configs() { (cd "$MTPD_ROOT/slurm/configs" && echo *); }

# start_job NAME FOLDER: everything up to the first step. FOLDER is where it writes unless MTPD_RUN_DIR says.
# Sets NODES, RANKS (a node), PYTHON, RUN, LOG, CHECKPOINTS, RESTARTS.
start_job() {
    check_settings
    NODES=${SLURM_NNODES:-1}
    RANKS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
    RANKS=${MTPD_RANKS_PER_NODE:-${RANKS##*:}} # --gpus-per-node may name a type: h100:8
    [[ $RANKS =~ ^[1-9][0-9]*$ ]] || fail "$RANKS ranks a node: set MTPD_RANKS_PER_NODE, or --gpus-per-node."
    RESTARTS=${SLURM_RESTART_COUNT:-0}
    if [ -n "${MTPD_PYTHON:-}" ]; then
        PYTHON=$MTPD_PYTHON
    elif [ -z "${MTPD_CONTAINER:-}${MTPD_WRAPPER:-}" ] && [ -x "$MTPD_ROOT/.venv/bin/python" ]; then
        PYTHON=$MTPD_ROOT/.venv/bin/python
    else
        PYTHON=python3
    fi
    RUN=$(realpath -m "${MTPD_RUN_DIR:-$2}")
    LOG=$RUN/logs/$1-${SLURM_JOB_ID:-0}-$RESTARTS
    CHECKPOINTS=$RUN/checkpoints

    export MTPD_RANKS_PER_NODE=$RANKS
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # tensor parallelism overlaps only with this

    say "job ${SLURM_JOB_ID:-none}, start $((RESTARTS + 1)), $NODES nodes x $RANKS ranks: ${SLURM_JOB_NODELIST:-none}"
    say "commit $(git -C "$MTPD_ROOT" describe --always --dirty 2>/dev/null || echo unknown) in $MTPD_ROOT"
    dry_run && return
    [ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job: submit it with sbatch, or see what it would run: MTPD_DRY_RUN=1."
    if ((RESTARTS > ${MTPD_MAX_RESTARTS:=50})); then
        say "this is start $((RESTARTS + 1)) and MTPD_MAX_RESTARTS=$MTPD_MAX_RESTARTS: giving up."
        exit 1
    fi
    mkdir -p "$RUN/logs" && touch "$RUN" || fail "MTPD_RUN_DIR=$RUN cannot be written: choose one that all nodes share."
    claim_run
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR
    trap 'cancelled=1 interrupted=1' TERM
    trap near_the_limit USR1
    trap 'stop_ranks 0' USR2
}

# One job at a time in a run's folder: two would write over each other's checkpoints.
claim_run() {
    local owner
    for _ in 1 2 3; do
        (set -o noclobber && echo "$SLURM_JOB_ID" >"$RUN/job") 2>/dev/null && return
        owner=$(cat "$RUN/job" 2>/dev/null)
        [ "$owner" = "$SLURM_JOB_ID" ] && return
        [ -z "$owner" ] || [ -z "$(squeue -h -j "$owner" -t running,completing,suspended 2>/dev/null)" ] ||
            fail "job $owner is running in MTPD_RUN_DIR=$RUN: choose another, or wait (--dependency=afterany:$owner)."
        rm -f "$RUN/job"
    done
    fail "$RUN/job cannot be written: is the disk full?"
}

# --- steps ------------------------------------------------------------------------------------------------------------

# A port that is free on this node, the first of the ranks' nodes: 20000 to 29999, because the kernel takes those of
# outgoing connections from 32768 on. Jobs start the search at different ports and take long steps, to stay apart.
free_port() {
    local port=${MTPD_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + (port + 997) % 10000)); done
    echo "$port"
}

# set_command NODES RANKS TOOL ARGUMENTS...: sets COMMAND, which runs a Python tool with so many ranks a node; shows it.
set_command() {
    local nodes=$1 ranks=$2
    shift 2
    COMMAND=(srun --nodes="$nodes" --ntasks="$((nodes * ranks))" --ntasks-per-node="$ranks" --distribution=block)
    COMMAND+=(--cpu-bind=none --kill-on-bad-exit=1 --wait=120)
    if [ -n "${MTPD_CONTAINER:-}" ]; then
        COMMAND+=(--container-image="$MTPD_CONTAINER" --container-workdir="$PWD")
        local mounts="$MTPD_ROOT:$MTPD_ROOT,$RUN:$RUN,$PWD:$PWD${MTPD_CONTAINER_MOUNTS:+,$MTPD_CONTAINER_MOUNTS}"
        COMMAND+=(--container-mounts="$mounts")
    fi
    # shellcheck disable=SC2206 # both are lists of words
    COMMAND+=(${MTPD_SRUN_ARGS:-} ${MTPD_WRAPPER:-} "$PYTHON" "$MTPD_ROOT/slurm/rank.py" "$@")
    printf '$' >&2
    printf ' %q' "${COMMAND[@]}" >&2
    echo >&2
}

# run_once TOOL ARGUMENTS...: a Python tool in one process on the first node; what it prints is printed.
run_once() {
    set_command 1 1 "$@"
    dry_run || MTPD_RANKS_PER_NODE=1 "${COMMAND[@]}" </dev/null
}

# run_ranks LOGFILE TOOL ARGUMENTS...: a Python tool on all ranks; returns the exit status of srun.
run_ranks() {
    local log=$1 status process
    set_command "$NODES" "$RANKS" "${@:2}"
    dry_run && return
    MASTER_PORT=$(free_port)
    export MASTER_PORT
    say "log: $log"
    "${COMMAND[0]}" --label --output="$log" "${COMMAND[@]:1}" </dev/null &
    process=$!
    while
        interrupted=
        wait $process
        status=$?
        [ -n "$interrupted" ] # a signal for us ends the wait, not the step
    do :; done
    return $status
}
cancelled='' stopping='' interrupted='' teller='' stop_signal=USR1

# Slurm's USR1 before the time limit. In the first minute and a half of a short job it means that the limit is shorter
# than --signal asks for: half of what is left is used then, instead of nothing.
near_the_limit() {
    local end left=0 delay=0
    end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null) && left=$((end - $(date +%s)))
    ((SECONDS > 90 || left < 0 || left > 1800)) || delay=$((left / 2))
    stop_ranks "$delay"
}

# stop_ranks SECONDS: have the ranks save and exit. Told repeatedly, because ranks that are still starting ignore it.
stop_ranks() {
    interrupted=1
    [ -z "$stopping" ] || ((SECONDS + $1 < told_at)) || return
    [ -z "$teller" ] || kill "$teller" 2>/dev/null
    stopping=1
    told_at=$((SECONDS + $1))
    say "the ranks get $stop_signal in $1 s"
    (
        trap - TERM USR1 USR2
        sleep "$1"
        while scancel --signal="$stop_signal" "$SLURM_JOB_ID"; do sleep 10; done
    ) &
    teller=$!
}

preflight() {
    [ "${MTPD_PREFLIGHT:-1}" != 0 ] || return 0
    local log=$LOG-preflight.log status
    run_ranks "$log" "$MTPD_ROOT/tools/preflight.py" --shared "$RUN"
    status=$?
    dry_run && return
    grep -h 'preflight: ' "$log"
    ((status == 0)) || grep -qs 'preflight: error' "$log" || explain "$log"
    [ -z "$cancelled" ] || exit 143
    ((status == 0)) || fail "the preflight failed: mend the node that it names, or leave it out (sbatch --exclude)."
}

# refuse_flags FLAGS...: those that train gives must not be given again.
refuse_flags() {
    local flag
    for flag; do
        [[ ! $flag =~ ^--(save|load|tensorboard-dir|exit-signal)(=|$) ]] ||
            fail "${flag%%=*}: leave it out, MTPD_RUN_DIR and MTPD_LOAD decide about it."
        [[ ! $flag =~ ^--ckpt-step(=|$) ]] ||
            fail "--ckpt-step: every start of the job would go back to it. Write the number into the" \
                "latest_checkpointed_iteration.txt of those checkpoints instead."
    done
}

# train START FLAGS...: train, from this run's last checkpoint; where there is none, from START (may be empty).
train() {
    local load=$1
    shift
    [ -z "$(tracker)" ] || load=$CHECKPOINTS
    dry_run || mkdir -p "$RUN/flight_recorder"
    attempt "${MTPD_TOOL:-$MTPD_ROOT/tools/pretrain_mtpd.py}" "$@" --save "$CHECKPOINTS" ${load:+--load "$load"} \
        --tensorboard-dir "$RUN/tensorboard" --exit-signal-handler --exit-signal "SIG$stop_signal" \
        --resume-from-last-good \
        --flight-recorder-dump-path "$RUN/flight_recorder"
}

# --- the end of an attempt ------------------------------------------------------------------------------------------

tracker() { cat "$CHECKPOINTS/latest_checkpointed_iteration.txt" 2>/dev/null; }

# Whether a node of the job no longer answers. Slurm takes SlurmdTimeout (300 s) to see it, and then requeues the job.
node_lost() {
    ! timeout 60 srun --overlap --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --quiet true >/dev/null 2>&1
}

requeue() { # requeue REASON: ends this script unless the job may not start again
    if [ "${MTPD_REQUEUE:-1}" = 0 ]; then
        say "$1; not requeued, because MTPD_REQUEUE=0"
    elif ((RESTARTS >= MTPD_MAX_RESTARTS)); then
        say "$1; not requeued, because MTPD_MAX_RESTARTS=$MTPD_MAX_RESTARTS"
    else
        say "$1; requeued"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
}

# Whether the ranks were told to stop, and had not come to their end by themselves.
was_stopped() { [ -n "$stopping" ] && ((SECONDS >= told_at)) && ! grep -qs 'after training is done' "$LOG.log"; }

# attempt TOOL ARGUMENTS...: one attempt at the work, and what follows from its end. Does not return.
attempt() {
    local before status
    before=$(tracker)
    run_ranks "$LOG.log" "$@"
    status=$?
    dry_run && exit 0
    [ -z "$teller" ] || kill "$teller" 2>/dev/null
    if [ -n "$cancelled" ]; then
        say "ended by Slurm: scancel, the time limit, or a node that died"
        exit 143
    elif was_stopped && { ((status == 0)) || [ "$stop_signal" = TERM ]; }; then
        requeue "stopped before the time limit"
        exit 0
    elif ((status == 0)); then
        say "done"
        exit 0
    fi
    say "failed with exit status $status"
    explain "$LOG.log"
    if node_lost; then
        say "a node of this job no longer answers: waiting for Slurm to see it, and to requeue the job"
        sleep 900 &
        wait $! # until Slurm ends us
    elif [ "$(tracker)" != "$before" ]; then
        requeue "this attempt went on to checkpoint $(tracker)"
    fi
    exit "$status"
}

explain() { # explain LOGFILE
    [ -e "$1" ] || return
    "$PYTHON" "$MTPD_ROOT/slurm/explain.py" "$1" --ranks-per-node "$RANKS" \
        --nodes "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)" || tail -n 40 "$1"
}
