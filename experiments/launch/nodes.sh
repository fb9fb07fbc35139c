#!/usr/bin/env bash
# Train one variant of a suite on all GPUs of several nodes, by torchrun, without a scheduler. On two, at the same time:
#
#   on the first:    experiments/launch/nodes.sh 0 HOST cifar10 indm-vp-nll --seed 0
#   on the second:   experiments/launch/nodes.sh 1 HOST cifar10 indm-vp-nll --seed 0
#
# HOST is the first node as the others reach it. What follows goes to `indm-bench $STAGE`. Variables, with their defaults:
#   STAGE=train (or evaluate)  NODES=2  PORT=29500  GPUS=(all of this node)
# train.batch_size is the global batch; it must be divisible by the number of processes, nodes x GPUs.
#
# Run it in the repository, with the virtual environment activated, on a file system that all nodes share: each process
# reads the checkpoints, the first one writes. The same commands, on any number of nodes, continue from the last
# checkpoint.

set -euo pipefail

if (( $# < 4 )); then
    echo "usage: [NODES=2] [PORT=29500] [GPUS=N] $0 RANK HOST SUITE VARIANT [option ...]" >&2
    exit 2
fi

rank=$1
host=$2
shift 2
found=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || found=0

export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1

exec torchrun \
    --nnodes="${NODES:-2}" \
    --node-rank="$rank" \
    --master-addr="$host" \
    --master-port="${PORT:-29500}" \
    --nproc-per-node="${GPUS:-$(( found > 0 ? found : 1 ))}" \
    --max-restarts=0 \
    -m bench.cli "${STAGE:-train}" "$@" --workers 1
