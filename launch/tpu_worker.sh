#!/usr/bin/env bash
# Runs on every machine of a slice, in the synced tree, for launch/tpu_train.sh.
#
#   launch/tpu_worker.sh setup             # makes the environment
#   launch/tpu_worker.sh run ARGUMENTS     # famjax train --distributed ARGUMENTS, until it ends
#   launch/tpu_worker.sh stop              # ends that run, and nothing else
#   launch/tpu_worker.sh alive             # prints whether a run is alive, and whose
#
# A run has a session of its own and goes on when the connection that started it breaks. The same
# `run` again, with the same FAMJAX_ATTEMPT, follows it, or gives the status that it ended with:
# gcloud repeats a command by itself when a connection breaks.
#
# FAMJAX_LAUNCHER  id of the launcher; `stop` refuses to end the run of another one
# FAMJAX_ATTEMPT   id of the run
# FAMJAX_WHO       person and machine of the launcher
# FAMJAX_ADOPT     not empty: take over the run of another launcher
#
# Exit status of `run`: that of famjax train; 75 if this script failed, and not famjax; 76 if
# another run has the machine.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

run_file=run.pid             # process group and start time; then the fields of a run, one a line
status_file=run.status       # attempt and status of the last run that ended
grace="${FAMJAX_GRACE:-120}" # seconds that a run has to save
my_launcher="${FAMJAX_LAUNCHER:-}" my_attempt="${FAMJAX_ATTEMPT:-by-hand-$$-$RANDOM}"
adopt="${FAMJAX_ADOPT:-}"

# Prints a line for the launcher.
tell() { printf '[worker] %s\n' "$*"; }

# Prints when process $1 started, in clock ticks since boot; nothing if it has ended. A number that
# the system has given to another process since then has another start time.
started() {
  awk '{ sub(/^.*\) /, ""); if ($1 != "Z") print $20 }' "/proc/$1/stat" 2>/dev/null || true
}

# Reads the run of this machine: pid, launcher, attempt, sum, since, who, dir. Fails if none is
# alive.
read_run() {
  local when=""
  pid="" launcher="" attempt="" sum="" since="" who="" dir=""
  [[ -r "$run_file" ]] || return 1
  {
    read -r pid when || return 1
    read -r launcher && read -r attempt && read -r sum && read -r since && read -r who &&
      read -r dir
  } <"$run_file" || true
  [[ -n "$when" && "$(started "$pid")" == "$when" ]]
}

# Writes the run of this machine.
write_run() {
  printf '%s\n' "$pid $(started "$pid")" "$launcher" "$attempt" "$sum" "$since" "$who" "$dir" \
    >"$run_file.new"
  mv -f "$run_file.new" "$run_file"
}

# Sets `ended` to the status of attempt $1. Fails if it has none.
read_status() {
  local which=""
  ended=""
  [[ -r "$status_file" ]] && read -r which ended <"$status_file" && [[ "$which" == "$1" ]]
}

write_status() { # attempt, status
  printf '%s %s\n' "$1" "$2" >"$status_file.new"
  mv -f "$status_file.new" "$status_file"
}

# Succeeds if this launcher may end the run that read_run has found.
may_end() { [[ -z "$my_launcher" || "$launcher" == "$my_launcher" || -n "$adopt" ]]; }

# Ends the script because the machine is in use.
refuse() {
  tell "refused: ${dir:-a run} is alive there, started by ${who:-somebody} at ${since:-some time}"
  known=1
  exit 76
}

# Ends the run that read_run has found: SIGTERM, so that it saves, and SIGKILL after the grace.
end_run() {
  local left
  kill -TERM -- "-$pid" 2>/dev/null || true
  for ((left = grace * 5; left > 0; left--)); do
    read_run || break
    sleep 0.2
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  [[ -z "$attempt" ]] || read_status "$attempt" || write_status "$attempt" 137
  rm -f "$run_file"
}

# Starts a run. The process that leads its group waits for famjax and keeps its status.
begin() { # arguments
  local argument
  launcher="$my_launcher" attempt="$my_attempt" since="$(date '+%F %T %Z')"
  who="${FAMJAX_WHO:-somebody}" dir="" sum="$(printf '%s\0' "$@" | cksum | tr ' ' '-')"
  for argument in "$@"; do
    case "$argument" in --gin.RUN_DIR=*) dir="${argument#--gin.RUN_DIR=}" ;; esac
  done
  dir="${dir//$'\n'/ }"
  # The port that jax takes by itself (8482) is closed in some networks.
  export JAX_COORDINATOR_PORT="${JAX_COORDINATOR_PORT:-8476}"
  : >run.log
  rm -f "$status_file"
  # shellcheck disable=SC2016  # the inner shell expands these
  setsid bash -c 'file="$1" attempt="$2" status=0
    shift 2
    trap : TERM HUP INT # a signal is for famjax; this shell waits for its status
    famjax train --distributed "$@" || status=$?
    printf "%s %s\n" "$attempt" "$status" >"$file.new" && mv -f "$file.new" "$file"' \
    famjax-run "$status_file" "$attempt" "$@" >>run.log 2>&1 </dev/null 8>&- &
  pid=$!
  write_run
}

# Prints the log of the run from byte $1 on until the run has ended; returns its status.
follow() {
  local shown="$1" size alive=1 looks=0 delays=(0.05 0.05 0.1 0.2 0.5 1)
  while [[ -n "$alive" ]]; do
    [[ -n "$(started "$pid")" ]] || alive="" # asked before the log is read, so that nothing is lost
    size="$(stat -c %s run.log)"
    if ((size > shown)); then
      tail -c "+$((shown + 1))" run.log | head -c "$((size - shown))"
      shown="$size"
    fi
    [[ -z "$alive" ]] || sleep "${delays[looks]}"
    ((looks + 1 >= ${#delays[@]})) || looks=$((looks + 1))
  done
  read_status "$attempt" || ended=137 # nothing but SIGKILL leaves no status
  known=1
  return "$ended"
}

# Prints the byte at which the last 100 lines of the log begin.
recent() { echo $(($(stat -c %s run.log) - $(tail -n 100 run.log | wc -c))); }

run() { # arguments
  exec 8>run.lock
  flock 8 # two launchers may ask at once
  if read_run; then
    if [[ "$attempt" == "$my_attempt" ]]; then
      if [[ "$launcher" != "$my_launcher" ]]; then
        may_end || refuse
        launcher="$my_launcher" who="${FAMJAX_WHO:-somebody}"
        write_run
      fi
      exec 8>&-
      tell "following the run that began at $since; the last lines of its log:"
      follow "$(recent)"
      return
    fi
    refuse # a launcher that may end this run does it with `stop`, on all machines
  elif read_status "$my_attempt"; then
    tell "this run has ended"
    tail -n 100 run.log 2>/dev/null || true
    known=1
    return "$ended"
  fi
  begin "$@"
  exec 8>&-
  tell "started"
  follow 0
}

stop() {
  exec 8>run.lock
  flock 8
  if read_run; then
    may_end || refuse
    end_run
  fi
  # A call of `run` that is still on its way must not start this attempt any more.
  [[ -z "${FAMJAX_ATTEMPT:-}" ]] || read_status "$my_attempt" || write_status "$my_attempt" 143
}

# Prints "idle", or "running" and the fields of the run.
alive() {
  if read_run; then
    printf '[worker] running\x1f%s\x1f%s\x1f%s\x1f%s\x1f%s\x1f%s\n' \
      "$launcher" "$attempt" "$sum" "$since" "$who" "$dir"
  else
    tell idle
  fi
}

verb="${1:-}"
shift || true
case "$verb" in
  setup) famjax_environment tpu ;;
  run)
    # 1 and 2 have a meaning only if they come from famjax.
    known=""
    trap '[[ -n "$known" ]] || exit 75' EXIT
    # The messages of the environment go to standard error; standard output is the run's.
    famjax_environment tpu >&2
    run "$@"
    ;;
  stop) stop ;;
  alive) alive ;;
  *) fail "tpu_worker.sh: unknown verb '$verb'; use setup, run, stop or alive" ;;
esac
