#!/usr/bin/env bash
# Makes the environment and runs every test.
#
#   tests/run.sh                          # PYTHON=python3.12 takes another interpreter
#   tests/run.sh tests/model -k causal    # arguments go on to pytest
#   tests/run.sh -n 0 -x --pdb            # one process, to debug
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

famjax_environment "${EXTRAS:-test,hf,tpu,eval}"  # hf: to compare with; eval: what is asked
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
say "running the tests"
# Whole files go to a worker: tests of one file share what they compiled.
python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  --durations=40 --durations-min=4 "$@"
