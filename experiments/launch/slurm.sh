#!/usr/bin/env bash
# Train one variant of a suite on all GPUs of one or several nodes, by torchrun under Slurm.
#
#   one node:   sbatch --nodes=1 --gpus-per-node=8 experiments/launch/slurm.sh cifar10 indm-vp-nll --seed 0
#   two nodes:  sbatch --nodes=2 --gpus-per-node=8 experiments/launch/slurm.sh cifar10 indm-vp-nll --seed 0
#
# What follows the script's name goes to `indm-bench $STAGE`, by default train: SUITE VARIANT, --seed N, --dataset NAME, --set KEY=VALUE.
# train.batch_size is the global batch; it must be divisible by the number of processes, nodes x GPUs.
#
# Submit it in the repository, with the virtual environment activated, from a file system that all nodes share: each
# process reads the checkpoints, the first one writes. A job that was requeued, or submitted again with any number of
# processes, continues from the last checkpoint. With STAGE=evaluate in the environment the processes share the
# evaluation instead, which continues likewise.

#SBATCH --job-name=indm-bench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# ahead of the end of its time, torchrun passes this on and waits up to 30 s: the processes write a checkpoint and stop
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

set -euo pipefail

if (( $# < 2 )); then
    echo "usage: sbatch [--nodes=N] [--gpus-per-node=N] $0 SUITE VARIANT [option ...]" >&2
    exit 2
fi

cd "${SLURM_SUBMIT_DIR:-.}"

# "8" or, with a type, "h100:8"
processes=${SLURM_GPUS_PER_NODE:-1}
processes=${processes##*:}

# The first node of the job is where all meet. Two jobs may share it: the port follows from the job's number.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=${nodes%%$'\n'*}
port=$(( 20000 + SLURM_JOB_ID % 20000 ))

export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1

# One torchrun a node, which starts one process a GPU. With --workers 1 the runs, if there are several, are trained one
# after the other, each on all processes.
srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$processes" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$host:$port" \
    --max-restarts=0 \
    -m bench.cli "${STAGE:-train}" "$@" --workers 1
