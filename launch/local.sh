#!/usr/bin/env bash
# Trains on this machine: one process per GPU, or two processes where there is no GPU.
# Usage: launch/local.sh CONFIG [key=value ...]
set -euo pipefail
config=${1:?usage: launch/local.sh CONFIG [key=value ...]}
shift

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=$((gpus > 0 ? gpus : 2))
# Without this every process starts a thread per core, and they get in each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + processes - 1) / processes))}
# All ranks are here: gloo need not resolve this machine's name, which many containers cannot.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

defaults=()
if ((processes == 1)); then defaults+=(parallel.sequence_degree=1); fi
exec deepspeed --log_level error --num_gpus "$processes" --master_port "$port" --module sparsek_dist train "$config" "${defaults[@]}" "$@"
