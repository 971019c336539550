#!/usr/bin/env bash
# Trains on TPU slices of Google Cloud, from a machine that has gcloud.
#
#   launch/tpu_train.sh VERB --name=NAME --type=TYPE --zone=ZONE [OPTIONS] [-- ARGUMENTS]
#
#   train    everything: creates or finds the slice, syncs, sets up and runs; does so again after a
#            preemption or the failure of a machine, from the last checkpoint, until the run ends
#   create   requests the slice and waits until it is ACTIVE
#   sync     copies this tree to every machine (tracked and new files, not ignored ones)
#   setup    makes the environment on every machine
#   run      famjax train --distributed ARGUMENTS on every machine, once
#   status   prints the state of the slice and of its machines
#   logs     follows the log of the first machine
#   stop     ends the run, which saves first; a launcher that is still there starts it again
#   delete   deletes the slice
#   local    famjax train ARGUMENTS on this machine
#
# ARGUMENTS go to famjax train unchanged. They name the directory of the run, which every machine,
# and the next slice, must reach: --gin.RUN_DIR=gs://BUCKET/RUN.
#
#   --name=NAME        of the slice and its logs               (TPU_NAME)
#   --type=TYPE        v5litepod-32, v5p-64, v6e-32, v4-64     (TPU_TYPE)
#   --zone=ZONE        us-central1-a, for example              (ZONE)
#   --project=PROJECT  default: the project of gcloud          (PROJECT)
#   --slices=N         number of slices of that type (1)
#   --spot             cheaper, but Google may take it away at any time
#   --image=IMAGE      default: the image of the type
#   --data=gs://B/DIR  copied to ~/data of every machine before a run: --gin.DATA='../data/*.tsv'
#   --retries=N        rounds after the first one, and looks after a failed one (10)
#   --wait=SECONDS     before the first retry; doubles each time, up to 15 minutes (30)
#   --poll=SECONDS     between two looks at a slice (20)
#   --timeout=SECONDS  limit for a call of gcloud; five times that for create, delete, scp (120)
#   --logs=DIR         folder for logs/NAME/ROUND/SLICE-WORKER.log and the slice's id (logs)
#   --adopt            use, or delete, a slice that was not made from these logs
#   --internal_ip      connect to the machines by their internal addresses
#   --dry_run          prints every command and runs none
#
# Exit status: that of famjax train; 2 also if the slice or the run belongs to somebody else; 3 if
# no retries are left, or if the state of the slice stays unknown; 75 if a step failed.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "$root"
source launch/environment.sh
source launch/tpu/cloud.sh
source launch/tpu/machines.sh

name="${TPU_NAME:-}" type="${TPU_TYPE:-}" zone="${ZONE:-}" project="${PROJECT:-}"
slices=1 spot="" image="" retries=10 wait=30 poll=20 timeout=120 logs=logs internal="" dry=""
data="" adopt=""
round=""   # folder for the logs of the present round
attempt="" # id of the present run
echoed=1   # the first machine's output is shown too
locked="" phase="" refusal="" id="" adopted=""

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }

# Prints a command, and runs it unless this is a dry run.
do_it() {
  if [[ -n "$dry" ]]; then
    show "$@"
  else
    "$@"
  fi
}

# Checks before anything is paid for that the directory of the run outlives the machines.
check_run_dir() { # arguments
  local argument dir="" probe
  for argument in "$@"; do
    case "$argument" in --gin.RUN_DIR=*) dir="${argument#--gin.RUN_DIR=}" ;; esac
  done
  [[ -n "$dir" ]] || fail "name the run's directory: -- ... --gin.RUN_DIR=gs://BUCKET/RUN"
  [[ "$dir" == gs://?* ]] ||
    fail "--gin.RUN_DIR=$dir is on a machine that goes away: name one in a bucket, gs://BUCKET/RUN"
  probe="$dir/.can-be-written"
  echo famjax >"$scratch/probe"
  if ! { ask "$timeout" storage cp "$scratch/probe" "$probe" &&
    ask "$timeout" storage rm "$probe"; }; then
    read_problem
    fail "--gin.RUN_DIR=$dir cannot be written: make the bucket (gcloud storage buckets create)," \
      "or sign in (gcloud auth login). The message of gcloud: $problem"
  fi
}

# Checks that --data can be read.
check_data() {
  [[ -n "$data" ]] || return 0
  [[ "$data" == gs://?* ]] || fail "--data=$data is not in a bucket: name gs://BUCKET/DIRECTORY"
  if ! ask "$timeout" storage ls "$data"; then
    read_problem
    fail "--data=$data cannot be read: is it there, and are you signed in (gcloud auth login)?" \
      "The message of gcloud: $problem"
  fi
}

# Takes the lock, unless this is a dry run.
begin_work() { # what is done
  if [[ -n "$dry" ]]; then read_identity; else take_lock "$*"; fi
}

# Ends the script unless the slice is ACTIVE and owned; lists its machines.
reach_slice() {
  look_until_known || leave "$?"
  if [[ -z "$dry" ]]; then
    [[ "$state" != NONE ]] || fail "there is no slice $name in $zone; 'create' or 'train' makes one"
    claim
    [[ "$state" == ACTIVE ]] || fail "$name is $state; its machines can be used when it is ACTIVE"
  fi
  list_machines || leave "$?"
}

# Ends the script if a run is alive on the machines: new files would break it.
expect_idle() {
  find_run "a run of nobody" || leave "$?"
}

# Ends the script with status $1, which is that of a step: 76 is a refusal, 77 an unknown state.
leave() {
  (($1 != 76)) || fail "$refusal"
  (($1 != 77)) || exit 3
  exit "$1"
}

# Creates or finds the slice, prepares its machines and runs. 1 and 2 have a meaning only if they
# come from famjax train: all that fails before it returns 75, and may go better later.
one_round() { # arguments
  phase="while $name was being made or looked at"
  create || return
  list_machines || return
  find_run "$@" || return
  if [[ -z "$attempt" ]]; then
    phase="while the machines were being set up"
    if ! { sync_tree && setup; }; then return 75; fi
  fi
  run "$@"
}

# Succeeds if a round that ended with 70, an error of the program, may go better next time. The same
# error twice in a row will not, nor will three errors in a row.
may_go_better() {
  local traceback
  traceback="$(last_traceback)"
  errors=$((errors + 1))
  if [[ -n "$traceback" && "$traceback" == "$last_error" ]]; then
    say "the program failed twice with the same error: not tried again; the traceback is in $round"
    return 1
  fi
  last_error="$traceback"
  ((errors < 3)) || { say "the program failed three times in a row: not tried again"; return 1; }
}

# Runs rounds until one ends well, or until another one would not help.
train() { # arguments
  local tries status delay="$wait" errors=0 last_error=""
  check_run_dir "$@"
  check_data
  for ((tries = 0; ; tries++)); do
    new_round
    status=0
    one_round "$@" || status=$?
    case "$status" in
      0) say "done"; return 0 ;;
      1) say "the loss diverged: not tried again"; return 1 ;;
      2) say "bad input: not tried again; the message is in $round"; return 2 ;;
      70) may_go_better || return 70 ;;
      76) fail "$refusal" ;;
      77) say "giving up: while the state is unknown, nothing is created or deleted"; return 3 ;;
    esac
    [[ "$status" == 70 ]] || { errors=0 last_error=""; }
    if ((tries >= retries)); then
      say "no retries left after $((tries + 1)) rounds; $name may still cost money. To delete it:" \
        "launch/tpu_train.sh delete$options"
      return 3
    fi
    say "status $status: once more in $delay s (retry $((tries + 1)) of $retries)"
    phase="while waiting for the next round"
    pause_for "$delay"
    delay="$(longer "$delay")"
  done
}

# Runs once on a slice that has been synced and set up.
run_once() { # arguments
  check_run_dir "$@"
  new_round
  reach_slice
  find_run "$@" || leave "$?"
  run "$@" || leave "$?"
}

# Prints the state of the slice and of every machine. Changes nothing, and leaves no logs.
status() {
  local machine line what run since who dir retries=0
  read_identity
  look
  say "$name: $state${problem:+ ($problem)}${owner:+, made by $owner}"
  [[ "$state" == ACTIVE || -n "$dry" ]] || return 0
  list_machines || return
  round="$scratch"
  echoed="" everywhere alive "$timeout" "$(worker_if_there alive)" || true
  [[ -z "$dry" ]] || return 0
  for machine in "${machines[@]}"; do
    line="$(last_answer "$machine")"
    IFS=$'\x1f' read -r what _ run _ since who dir <<<"$line" || true
    what="${what#\[worker\] }"
    [[ -z "$dir" ]] || what+=" $dir since $since, started by $who, attempt $run"
    say "machine ${machine##* }: ${what:-not reached: $(tail -n 1 "$round/${machine##* }.log")}"
  done
}

# Follows the newest log of the first machine.
follow() {
  local newest
  newest="$(find "$logs/$name" -mindepth 2 -maxdepth 2 -name 0-0.log 2>/dev/null |
    awk -F/ '{ print $(NF - 1), $0 }' | sort -n | tail -n 1 | cut -d ' ' -f 2- || true)"
  [[ -f "$newest" ]] || fail "there are no logs of $name in $logs"
  do_it tail -n 100 -F "$newest"
}

# Ends the run on all machines.
stop() {
  read_identity
  reach_slice
  round="$scratch"
  stop_run || refuse_stop "$?"
}

# Says why `stop` did not work.
refuse_stop() { # status
  (($1 != 76)) || fail "the run on $name belongs to another launcher and goes on; --adopt ends it." \
    "$(grep -ah '^\[worker\] refused' "$round"/*.log | tail -n 1 || true)"
  fail "the run could not be ended on all machines: $(tail -qn 3 "$round"/*.log | tr '\n' ' ')"
}

# Deletes the slice if it is owned.
delete_slice() {
  begin_work delete
  look_until_known || leave "$?"
  if [[ -z "$dry" ]]; then
    if [[ "$state" == NONE ]]; then
      say "there is no slice $name in $zone"
      return 0
    fi
    claim
  fi
  delete || leave "$?"
}

# Ends the launcher on a signal. The machines notice nothing of it.
interrupted() { # status
  local running
  trap '' INT TERM HUP
  running="$(jobs -p)"
  # shellcheck disable=SC2086  # one word for each process
  [[ -z "$running" ]] || kill $running 2>/dev/null || true
  say "interrupted ${phase:-before anything was changed}; $name, and a run on it, go on." \
    "To take it up again: the same command. To end the run: launch/tpu_train.sh stop$options." \
    "To stop paying: launch/tpu_train.sh delete$options"
  exit "$1"
}

# A message is no reason to end when its reader has gone away.
say() { printf '[famjax %4ds] %s\n' "$SECONDS" "$*" 2>/dev/null || true; }

verb="${1:-}"
[[ $# -eq 0 ]] || shift
while [[ $# -gt 0 ]]; do
  case "$1" in
    --) shift; break ;;
    --name=*) name="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --spot) spot=1 ;;
    --image=*) image="${1#*=}" ;;
    --data=*) data="${1#*=}" ;;
    --retries=*) retries="${1#*=}" ;;
    --wait=*) wait="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --timeout=*) timeout="${1#*=}" ;;
    --logs=*) logs="${1#*=}" ;;
    --adopt) adopt=1 ;;
    --internal_ip) internal=1 ;;
    --dry_run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    *)
      fail "unknown option $1; options of famjax train go after --. See launch/tpu_train.sh --help"
      ;;
  esac
  shift
done

for number in slices retries timeout; do
  [[ "${!number}" =~ ^[0-9]{1,6}$ ]] || fail "--$number: '${!number}' is not a number"
done
for number in wait poll; do
  [[ "${!number}" =~ ^[0-9]{1,6}(\.[0-9]+)?$ ]] || fail "--$number: '${!number}' is not a number"
done
((slices > 0)) || fail "--slices=0: use at least 1"
((timeout > 0)) || fail "--timeout=0: use at least 1"
case "$verb" in
  create | sync | setup | run | train | status | logs | stop | delete)
    [[ -n "$name" ]] || fail "$verb needs --name=NAME, or TPU_NAME"
    [[ "$verb" == logs || -n "$zone" ]] || fail "$verb needs --zone=ZONE, or ZONE"
    # Names become parts of file names and of patterns.
    [[ "$name" =~ ^[a-z0-9A-Z][a-z0-9A-Z-]*$ ]] || fail "--name=$name: use letters, digits and -"
    [[ "$zone" =~ ^[a-z0-9-]*$ ]] || fail "--zone=$zone is not a zone, such as us-central1-a"
    [[ "$project" =~ ^[a-zA-Z0-9.:-]*$ ]] || fail "--project=$project is not the id of a project"
    ;;
esac
case "$verb" in
  create | train)
    [[ -n "$type" ]] || fail "$verb needs --type=TYPE (v5litepod-32, for example), or TPU_TYPE"
    runtime="$(runtime_image)" || exit
    ;;
esac

scratch="$(mktemp -d)"
trap 'rm -rf -- "$scratch"' EXIT
me="$(printf '%s_on_%s' "$(id -un)" "${HOSTNAME%%.*}" | tr 'A-Z.' 'a-z_' | tr -cd 'a-z0-9_-')"
me="${me:0:63}"
case "$verb" in
  create | train | sync | setup | run | stop | delete | status)
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    trap 'interrupted 129' HUP
    trap '' PIPE # a run outlives the pipe that its log goes through
    # Found out once: `gcloud config set project` elsewhere must not turn this launcher to another
    # project, where the slice would be missing.
    if [[ -z "$project" && -z "$dry" ]]; then
      ask "$timeout" config get-value project || true
      [[ ! "$reply" =~ ^[a-zA-Z0-9.:-]+$ ]] || project="$reply"
    fi
    ;;
esac
identity_file="$logs/$name/slice.${project:-default}.$zone.id"
lock_file="$logs/$name/slice.${project:-default}.$zone.lock"
printf -v options ' --name=%q --zone=%q' "$name" "$zone"
[[ -z "$project" ]] || printf -v options '%s --project=%q' "$options" "$project"
[[ "$logs" == logs ]] || printf -v options '%s --logs=%q' "$options" "$logs"

case "$verb" in
  create) begin_work create; create || leave "$?" ;;
  sync) begin_work sync; new_round; reach_slice; expect_idle; sync_tree || exit 75 ;;
  setup) check_data; begin_work setup; new_round; reach_slice; expect_idle; setup || exit 75 ;;
  run) begin_work "run $*"; run_once "$@" ;;
  train) begin_work "train $*"; train "$@" ;;
  status) status ;;
  logs) follow ;;
  stop) stop ;;
  delete) delete_slice ;;
  local)
    [[ -n "$dry" ]] || famjax_environment tpu
    do_it famjax train "$@"
    ;;
  -h | --help | help | "") usage ;;
  *)
    fail "unknown verb '$verb'; use train, create, sync, setup, run, status, logs, stop, delete" \
      "or local"
    ;;
esac
