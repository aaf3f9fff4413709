#!/usr/bin/env bash
# Starts this node's share of a run; start it on every node. For containers and Kubernetes: no ssh, no hostfile.
# Usage: NODES=2 NODE_RANK=0 MASTER_ADDR=HOST_OF_NODE_0 launch/no_ssh.sh doctor
#        NODES=2 NODE_RANK=1 MASTER_ADDR=HOST_OF_NODE_0 launch/no_ssh.sh train CONFIG [key=value ...], or eval RUN
# NODE_RANK may come from a Kubernetes indexed job or from Slurm. SLOTS is the number of processes per node (its GPUs, or
# one), the same on all; MASTER_PORT (29500) must be free on node 0. DRY_RUN=1 only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage_unless 1 $# "${1:-}"
find_environment
NODE_RANK=${NODE_RANK:-${JOB_COMPLETION_INDEX:-${SLURM_NODEID:-}}}
[[ ${NODES:-} =~ ^[1-9][0-9]*$ ]] || fail "NODES = '${NODES:-}': set it to the number of nodes"
if ! [[ $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= NODES)); then
    fail "NODE_RANK = '$NODE_RANK': set it to this node's number, 0 to $((NODES - 1))"
fi
[[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set: the name or address under which all nodes reach node 0"

if [[ -z ${SLOTS:-} ]]; then
    count=$(gpus)
    SLOTS=$((count > 0 ? count : 1))
fi
source "$folder/env.sh"

# DeepSpeed wants a hostfile to count with; its names are not looked up. Deleted at once: the open descriptor is enough.
hostfile=$(mktemp)
for ((node = 0; node < NODES; node++)); do echo "node-$node slots=$SLOTS"; done >"$hostfile"
exec 9<"$hostfile"
rm "$hostfile"
run deepspeed --log_level error --hostfile /dev/fd/9 --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" \
    --master_port "${MASTER_PORT:-29500}" --module sparsek_dist "$@"
