# Sourced on every node before the run starts, by every script of this folder. Copy the folder and change this file.
# shellcheck shell=bash

# Without this every process starts a thread per core, and they get in each other's way.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
    processes=${SLOTS:-${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 2))}}
    OMP_NUM_THREADS=$((($(nproc) + processes - 1) / processes))
fi
export OMP_NUM_THREADS

# The interface that the nodes share. gloo (CPU runs) is told by sparsek itself: that of the route to rank 0. NCCL (GPU
# runs) takes the fastest InfiniBand or else the first interface that is neither lo nor docker*, which can be wrong.
#export GLOO_SOCKET_IFNAME=eth0
#export NCCL_SOCKET_IFNAME=eth0
#export NCCL_IB_HCA=mlx5                 # which InfiniBand cards; NCCL_IB_DISABLE=1 does without them
#export NCCL_DEBUG=WARN                  # INFO tells which way NCCL takes between two GPUs

# Nodes without internet: the tokenizer and the corpus must be in the cache already.
#export HF_HUB_OFFLINE=1
#export HF_HOME=/shared/huggingface
