#!/usr/bin/env bash
# A session on one borrowed GPU, in commands of at most MINUTES each that keep everything under STATE:
#
#   experiments/launch/gpu_session.sh performance   speed of steps, likelihoods and samples; again until nothing is added
#   experiments/launch/gpu_session.sh plan          what the suite will cost on this device
#   experiments/launch/gpu_session.sh run           a piece of the suite; again until the exit code is 0
#   experiments/launch/gpu_session.sh run-all       all pieces, one after the other
#
# Run it in the repository. On a machine without a network the packages that it lacks travel as wheels; where there is one:
#
#   experiments/launch/gpu_session.sh wheels        download those that PYTHON's machine may lack, for FOR_PYTHON, to WHEELS
#
# Variables, with their defaults:
#   SUITE=cifar10-lite  MINUTES=9  STATE=session  PYTHON=python3  WHEELS=wheels  FOR_PYTHON=3.12
#   INDM_BENCH_DATA=data   folder with the images; writable, so that a JPEG archive is decoded once
# Give STATE to the next session, on this machine or another one of the same kind, and it goes on where this one stopped.
# Exit code: 0 when there is nothing left to do, 75 when pieces are left, anything else is a failure.

set -uo pipefail

suite=${SUITE:-cifar10-lite}
minutes=${MINUTES:-9}
state=${STATE:-session}
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
carried="pydantic pydantic-core annotated-types typing-inspection ruamel.yaml diffusers importlib-metadata torch-fidelity"

if [ "${1:-}" = wheels ]; then
    # in the versions of this environment
    for name in $carried; do
        version=$("$python" -c "import importlib.metadata as m; print(m.version('$name'))") || exit 1
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
            --dest "$wheels" "$name==$version" || exit 1
    done
    exit 0
fi

if [ -d "$wheels" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" $carried || exit 1
fi
"$python" - <<'END' || exit 2
import importlib.util, sys
names = "accelerate diffusers filelock jinja2 matplotlib numpy pandas PIL pydantic ruamel.yaml safetensors scipy seaborn sklearn"
names += " tabulate torch torch_fidelity torchvision tqdm typer"
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
missing = [name for name in names.split() if not there(name)]
if missing:
    sys.exit(f"missing packages: {', '.join(missing)}; accepted: a folder WHEELS with their wheels, or an environment with them")
END

mkdir -p "$state" || exit 1
export INDM_BENCH_RUNS=$state/runs INDM_BENCH_CHECKPOINTS=$state/checkpoints INDM_BENCH_REPORTS=$state/reports
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

case "${1:-}" in
performance)
    # the case in hand has a quarter of the limit more; 75 when cases are left
    "$python" -m bench.cli performance --limit-seconds $((minutes * 40))
    ;;
plan)
    "$python" -m bench.cli plan "$suite" --minutes "$minutes" | tee "$state/plan-$suite.txt"
    ;;
run)
    "$python" -m bench.cli run "$suite" --minutes "$minutes"
    ;;
run-all)
    code=75
    while [ "$code" -eq 75 ]; do
        "$python" -m bench.cli run "$suite" --minutes "$minutes"
        code=$?
    done
    exit "$code"
    ;;
*)
    echo "usage: $0 performance | plan | run | run-all" >&2
    exit 2
    ;;
esac
