#!/usr/bin/env bash
# First process of the cluster's namespaces: the controller's machine. `control.sh FOLDER NODES`; see minislurm.py.
#
# It holds munged, slurmctld, a bridge that stands for the network, and the nodes, which are namespaces inside its own.
# Whoever kills it ends everything in it: the kernel does so for the first process of a process namespace.
set -euo pipefail
folder=$1 nodes=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SLURM_CONF=$folder/slurm.conf

hostname control
mount --bind "$folder/hosts" /etc/hosts
mkdir -p /run/netns
mount -t tmpfs none /run/netns # `ip netns` keeps its names there: ours are not the machine's
ip link set lo up
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up

munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" --num-threads=4
slurmctld -D -f "$SLURM_CONF" &

for ((i = 1; i <= nodes; i++)); do
    ip netns add "node$i"
    ip link add "veth$i" type veth peer name eth0 netns "node$i"
    ip link set "veth$i" master bridge
    ip -n "node$i" address add "10.77.0.$((10 + i))/24" dev eth0
    ip -n "node$i" link set lo up
    ip -n "node$i" link set eth0 up
done

declare -A power
power_on() {
    ip link set "veth${1#node}" up
    nsenter --net="/run/netns/$1" unshare --mount --uts --pid --fork --kill-child --mount-proc \
        "$here/node.sh" "$folder" "$1" </dev/null &
    power[$1]=$!
}
power_off() { # the link first: nobody is told that the node's connections are gone
    ip link set "veth${1#node}" down
    kill -KILL "${power[$1]}"
}

while read -r command name; do # ends when whoever holds the other end does
    "$command" "$name"
done
