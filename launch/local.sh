#!/usr/bin/env bash
# Trains or evaluates on this machine: one process per GPU, or two processes where there is no GPU.
# Usage: launch/local.sh CONFIG [key=value ...]
#        launch/local.sh eval RUN_OR_FOLDER [--task passkey ...]
#        launch/local.sh doctor
# DRY_RUN=1 only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
usage_unless 1 $# "${1:-}"
find_environment
# What follows the script's name may be any command of sparsek that runs on many processes.
[[ $1 == doctor || $1 == train || $1 == eval ]] || set -- train "$@"

count=$(gpus)
SLOTS=$((count > 0 ? count : 2))
source "$folder/env.sh"
port=${MASTER_PORT:-$(free_port)}

defaults=()
if [[ $1 == train ]] && ((SLOTS == 1)); then defaults+=(parallel.sequence_degree=1); fi
run deepspeed --log_level error --num_gpus "$SLOTS" --master_port "$port" --module sparsek_dist "${@:1:2}" "${defaults[@]}" "${@:3}"
