#!/usr/bin/env bash
# First process of a node's namespaces: `node.sh FOLDER NAME`. Killing it is what loss of power is to a real node.
set -euo pipefail
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
# Nobody answers for names here. Without this, every look-up of an address waits for its time-out.
mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)"
mount -t tmpfs none "$1/local"
export SLURM_CONF=$1/slurm.conf
slurmd -D -N "$2" -f "$SLURM_CONF" &
wait
