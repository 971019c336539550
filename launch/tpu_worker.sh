#!/usr/bin/env bash
# The part of launch/tpu_train.sh that runs on every machine of a slice, in the synced tree.
#
#   launch/tpu_worker.sh setup             # the environment
#   launch/tpu_worker.sh run ARGUMENTS     # famjax train --distributed ARGUMENTS, until it ends
#   launch/tpu_worker.sh stop              # ends the run of before, and nothing else
#   launch/tpu_worker.sh alive             # says "running" or "idle"
#
# A run goes on in a session of its own: when the connection that began it breaks, it is still known
# by its file, so that the next round can end it and take the chips.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# Process group and start time of the run: a number that the system has given to another process
# since then has another start time.
run_file=run.pid
grace="${FAMJAX_GRACE:-120}" # seconds to save in

started() { awk '{ sub(/^.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null || true; }

run_pid() {
  local pid when
  [[ -r "$run_file" ]] && read -r pid when <"$run_file" || return 1
  [[ -n "$when" && "$(started "$pid")" == "$when" ]] && printf '%s' "$pid"
}

stop() {
  local pid left
  pid="$(run_pid)" || return 0
  kill -TERM -- "-$pid" 2>/dev/null || true
  for ((left = grace * 5; left > 0; left--)); do
    run_pid >/dev/null || break
    sleep 0.2
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  rm -f "$run_file"
}

run() {
  stop
  # The port that jax takes by itself (8482) is closed in some networks.
  export JAX_COORDINATOR_PORT="${JAX_COORDINATOR_PORT:-8476}"
  : >run.log
  setsid famjax train --distributed "$@" >>run.log 2>&1 &
  local pid=$! status=0
  printf '%s %s\n' "$pid" "$(started "$pid")" >"$run_file"
  tail -n +1 -F --pid="$pid" run.log 2>/dev/null &
  wait "$pid" || status=$?
  wait || true # for the last lines
  rm -f "$run_file"
  return "$status"
}

verb="${1:-}"
shift || true
case "$verb" in
  setup) famjax_environment tpu ;;
  run)
    # What the environment says goes to standard error: standard output is the run's.
    famjax_environment tpu >&2
    run "$@"
    ;;
  stop) stop ;;
  alive) if run_pid >/dev/null; then echo running; else echo idle; fi ;;
  *) fail "tpu_worker.sh: unknown verb '$verb': setup, run, stop or alive" ;;
esac
