#!/usr/bin/env bash
# A session on one borrowed GPU, in commands of at most MINUTES each that keep everything under STATE:
#
#   experiments/launch/gpu_session.sh performance   speed of steps, likelihoods and samples; again until nothing is added
#   experiments/launch/gpu_session.sh plan          what the suite will cost on this device
#   experiments/launch/gpu_session.sh run           a piece of the suite; again until the exit code is 0
#   experiments/launch/gpu_session.sh run-all       all pieces, one after the other
#
# Run it in the repository, with the virtual environment activated. Variables, with their defaults:
#   SUITE=cifar10-lite  MINUTES=9  STATE=session
#   INDM_BENCH_DATA=data   folder with the images; writable, so that a JPEG archive is decoded once
# Give STATE to the next session, on this machine or another one of the same kind, and it goes on where this one stopped.
# Exit code: 0 when there is nothing left to do, 75 when pieces are left, anything else is a failure.

set -uo pipefail

suite=${SUITE:-cifar10-lite}
minutes=${MINUTES:-9}
state=${STATE:-session}

mkdir -p "$state" || exit 1
export INDM_BENCH_RUNS=$state/runs INDM_BENCH_CHECKPOINTS=$state/checkpoints INDM_BENCH_REPORTS=$state/reports
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

case "${1:-}" in
performance)
    # the case in hand is finished after the limit
    indm-bench performance --limit-seconds $((minutes * 40))
    ;;
plan)
    indm-bench plan "$suite" --minutes "$minutes" | tee "$state/plan-$suite.txt"
    ;;
run)
    indm-bench run "$suite" --minutes "$minutes"
    ;;
run-all)
    code=75
    while [ "$code" -eq 75 ]; do
        indm-bench run "$suite" --minutes "$minutes"
        code=$?
    done
    exit "$code"
    ;;
*)
    echo "usage: $0 performance | plan | run | run-all" >&2
    exit 2
    ;;
esac
