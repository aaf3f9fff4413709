#!/usr/bin/env bash
# Starts a run on all hosts of a hostfile, over ssh and pdsh, from one of them.
# Usage: launch/hostfile.sh HOSTFILE doctor
#        launch/hostfile.sh HOSTFILE train CONFIG [key=value ...], or eval RUN_OR_FOLDER
# HOSTFILE has a line `NAME slots=PROCESSES` for each host. All need this repository and its Python at the same path, and
# ssh without a password from here. MASTER_ADDR and MASTER_PORT (29500) say where rank 0 listens. DRY_RUN=1 only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage_unless 2 $# "${1:-}"
find_environment
hostfile=$1
shift
check_hostfile "$hostfile"
check_arguments "$@"
[[ ${DRY_RUN:-0} == 1 ]] || command -v pdsh >/dev/null || fail "pdsh is not installed here (package pdsh); launch/mpirun.sh and launch/no_ssh.sh do without it"

# Never ask for a password; notice within half a minute when a host is gone, instead of waiting for it for ever.
ssh_options="-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=2"
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} $ssh_options"

for name in OMP_NUM_THREADS "${!GLOO_@}" "${!HF_@}"; do
    [[ -z ${!name:-} ]] || echo "note: $name is set on this host only; for all hosts put it into launch/env.sh" >&2
done
# The remote shells know nothing of this one: env.sh tells them. --force_multi: one host that is not this one works, too.
run deepspeed --log_level error --hostfile "$hostfile" --force_multi --venv_script "$folder/env.sh" \
    ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}" --module sparsek_dist "$@"
