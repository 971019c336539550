#!/usr/bin/env bash
# From a fresh clone to a working memory: makes the environment, trains a small TransformerFAM and a
# BSWA of the same size on the CPU, and shows which of the two remembers. Leaves a report, a plot
# and checkpoints in runs/quickstart.
#
#   launch/quickstart.sh                        # PYTHON=python3.12 takes another interpreter
#   launch/quickstart.sh --gin.NAME=VALUE ...   # arguments go on to famjax
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

famjax_environment base
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
# The models are so small that compiling takes longer than what the last optimizations save.
fast=--xla_backend_optimization_level=1
case "$(python -c 'import importlib.metadata as m; print(m.version("jax"))')" in
  0.10.*) fast+=" --xla_cpu_use_fusion_emitters=false" ;; # later versions end at this flag
esac
export XLA_FLAGS="${XLA_FLAGS-$fast}"
say "training FAM and BSWA on PassKey"
famjax study --gin_file=gin/runs/quickstart.gin "$@"
say "quickstart done in $SECONDS seconds, installation included"
