#!/usr/bin/env bash
# Trains on TPU slices of Google Cloud, from a machine that has gcloud.
#
#   launch/tpu_train.sh VERB --name=NAME --type=TYPE --zone=ZONE [OPTIONS] [-- ARGUMENTS]
#
#   train    the whole round: create or find the slice, sync, set up, run; again when the slice is
#            preempted or a machine fails, from the last checkpoint, until the run has ended
#   create   ask for the slice and wait until it is there
#   sync     copy this tree to every machine (tracked and new files, not ignored ones)
#   setup    make the environment on every machine
#   run      famjax train --distributed ARGUMENTS on every machine, once
#   status   what the slice and its machines do
#   logs     follow the first machine's log
#   stop     end the run; it saves first
#   delete   give the slice back
#   local    famjax train ARGUMENTS on the machine that this is
#
# ARGUMENTS go to famjax train as they are. They name the run's directory, where every machine can
# reach it, and the next slice too: --gin.RUN_DIR=gs://BUCKET/RUN.
#
#   --name=NAME        of the slice and its logs               (TPU_NAME)
#   --type=TYPE        v5litepod-32, v5p-64, v6e-32, v4-64     (TPU_TYPE)
#   --zone=ZONE        us-central1-a, say                      (ZONE)
#   --project=PROJECT  gcloud's own, if left out               (PROJECT)
#   --slices=N         so many slices of that type (1)
#   --spot             cheaper, and taken away at any time
#   --image=IMAGE      the type's own, if left out
#   --data=gs://B/DIR  copied into ~/data of every machine before a run: --gin.DATA='../data/*.tsv'
#   --retries=N        rounds after the first that train may take (10)
#   --wait=SECONDS     before the first of them; doubles each time, up to 15 minutes (30)
#   --poll=SECONDS     between two looks at a slice (20)
#   --logs=DIR         logs/NAME/ROUND/SLICE-WORKER.log is kept there (logs)
#   --internal_ip      reach machines by their inner addresses
#   --dry_run          say every command, and run none
#
# Exit status: that of famjax train; 3 when there are no retries left.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd -- "$root"
source launch/environment.sh

name="${TPU_NAME:-}" type="${TPU_TYPE:-}" zone="${ZONE:-}" project="${PROJECT:-}"
slices=1 spot="" image="" retries=10 wait=30 poll=20 logs=logs internal="" dry=""
data=""
round="" # the directory of the present round's logs

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }

# Says a command, quoted so that it can be copied; runs it unless this is a dry run.
do_it() {
  local line
  printf -v line ' %q' "$@"
  if [[ -n "$dry" ]]; then
    printf '+%s\n' "$line"
  else
    "$@"
  fi
}

tpu() { do_it gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet; }

nodes() {
  local i
  if ((slices == 1)); then
    printf '%s\n' "$name"
  else
    for ((i = 0; i < slices; i++)); do printf '%s-%d\n' "$name" "$i"; done
  fi
}

state() {
  local found
  [[ -z "$dry" ]] || return 0
  found="$(tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null)" || true
  printf '%s' "${found:-NONE}"
}

runtime_image() {
  case "${image:-$type}" in
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-[0-9]* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) [[ -n "$image" ]] || fail "--type=$type: no image is known for it; name one: --image=..."
      echo "$image" ;;
  esac
}

create() {
  local now runtime nodes_flag=(--node-id="$name")
  runtime="$(runtime_image)" || exit 2
  if ((slices > 1)); then nodes_flag=(--node-prefix="$name" --node-count="$slices"); fi
  now="$(state)"
  case "$now" in
    FAILED | SUSPENDED | SUSPENDING)
      say "$name is $now: giving it back before asking anew"
      delete
      now=NONE
      ;;
  esac
  if [[ "$now" == NONE || -n "$dry" ]]; then
    say "asking for $slices x $type ($runtime) in $zone as $name"
    tpu queued-resources create "$name" "${nodes_flag[@]}" --accelerator-type="$type" \
      --runtime-version="$runtime" ${spot:+--spot} || return 75
  fi
  [[ -z "$dry" ]] || return 0
  while now="$(state)" && [[ "$now" != ACTIVE ]]; do
    case "$now" in FAILED | SUSPENDED | NONE) say "$name is $now"; return 75 ;; esac
    say "$name is $now; looking again in $poll s"
    sleep "$poll"
  done
  say "$name is there"
}

delete() { tpu queued-resources delete "$name" --force || true; }

# How many machines a node has.
workers() {
  local addresses
  if [[ -n "$dry" ]]; then echo 1; return; fi
  addresses="$(tpu tpu-vm describe "$1" --format='value(networkEndpoints[].ipAddress)')" || return 75
  tr ';, ' '\n' <<<"$addresses" | grep -c .
}

on_worker() { # node, worker, command
  tpu tpu-vm ssh "$1" --worker="$2" ${internal:+--internal-ip} --command="$3"
}

# Runs a command on every machine at once, its output in a log for each; the first machine's is shown
# as well. When one fails, the run is ended on all, so that nobody waits for it for ever.
# Returns the status that matters most: 2 and 1 of famjax, then any other failure.
everywhere() { # what it is, command
  local what="$1" command="$2" i=0 w n log status worst=0 ended file count stopped="" node
  local -a files=() pids=()
  while read -r node; do
    n="$(workers "$node")" || return 75
    for ((w = 0; w < n; w++)); do
      log="$round/$i-$w.log"
      [[ -n "$dry" ]] || printf '# %s\n' "$what" >>"$log"
      if [[ -n "$dry" ]]; then
        on_worker "$node" "$([[ "$n" == 1 ]] && echo all || echo "$w")" "$command"
      else
        ended="$round/$i-$w.$what" # its status, once it has one
        rm -f "$ended"
        (
          status=0
          if ((i == 0 && w == 0)); then
            on_worker "$node" "$w" "$command" 2>&1 </dev/null | tee -a "$log" || status=$?
          else
            on_worker "$node" "$w" "$command" >>"$log" 2>&1 </dev/null || status=$?
          fi
          printf '%s\n' "$status" >"$ended"
        ) &
        files+=("$ended") pids+=("$!")
      fi
    done
    i=$((i + 1))
  done < <(nodes)
  [[ -z "$dry" ]] || return 0
  while :; do
    count=0 worst=0
    for file in "${files[@]}"; do
      [[ -s "$file" ]] || continue
      count=$((count + 1))
      status="$(<"$file")"
      case "$worst:$status" in
        *:0) ;;
        2:* | *:2) worst=2 ;;
        1:* | *:1) worst=1 ;;
        0:*) worst="$status" ;;
      esac
    done
    ((count < ${#files[@]})) || break
    if ((worst != 0)) && [[ "$what" == run ]]; then
      [[ -n "$stopped" ]] ||
        say "a machine ended with status $worst: ending the run on all; logs are in $round"
      stopped=1
      stop_run >/dev/null 2>&1 || true # again and again: one may only just have begun
    fi
    if [[ "$what" == run && "$(state)" != ACTIVE ]]; then
      say "$name is no longer there"
      kill "${pids[@]}" 2>/dev/null || true
      wait || true
      return 75
    fi
    sleep "$poll"
  done
  wait || true
  ((worst == 0)) || say "$what: status $worst; logs are in $round"
  return "$worst"
}

# A new directory for the logs of a round.
new_round() {
  local i=1
  while [[ -e "$logs/$name/$i" ]]; do i=$((i + 1)); done
  round="$logs/$name/$i"
  [[ -n "$dry" ]] || mkdir -p "$round"
}

sync_tree() {
  local tar node
  if [[ -n "$dry" ]]; then tar=famjax.tar.gz; else tar="$(mktemp -d)/famjax.tar.gz"; fi
  if [[ -n "$dry" ]]; then
    say "packs the tree into $tar"
  elif git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' f; do [[ ! -f "$f" ]] || printf '%s\0' "$f"; done |
      tar --null --files-from=- -czf "$tar" || return 75
  else
    tar --exclude=./.venv --exclude=./runs --exclude=./logs -czf "$tar" . || return 75
  fi
  while read -r node; do
    tpu tpu-vm scp "$tar" "$node:famjax.tar.gz" --worker=all ${internal:+--internal-ip} ||
      return 75
  done < <(nodes)
  everywhere sync 'mkdir -p famjax && tar -xzf famjax.tar.gz -C famjax'
}

setup() {
  local copy=""
  [[ -z "$data" ]] || printf -v copy 'mkdir -p data && gcloud storage rsync --recursive %q data && ' "$data"
  everywhere setup "${copy}cd famjax && launch/tpu_worker.sh setup"
}
stop_run() { everywhere stop 'cd famjax && launch/tpu_worker.sh stop'; }

run() {
  local quoted
  printf -v quoted ' %q' "$@"
  everywhere run "cd famjax && launch/tpu_worker.sh run$quoted"
}

# The run's directory must outlive the machines: found out before one is paid for.
check_run_dir() {
  local argument dir="" probe
  for argument in "$@"; do
    case "$argument" in --gin.RUN_DIR=*) dir="${argument#--gin.RUN_DIR=}" ;; esac
  done
  [[ -n "$dir" ]] || fail "name the run's directory: -- ... --gin.RUN_DIR=gs://BUCKET/RUN"
  [[ "$dir" == gs://?* ]] ||
    fail "--gin.RUN_DIR=$dir is on a machine that goes away: name one in a bucket, gs://BUCKET/RUN"
  probe="$dir/.can-be-written"
  if [[ -n "$dry" ]]; then
    do_it gcloud storage cp - "$probe"
  elif ! { echo famjax | gcloud storage cp - "$probe" && gcloud storage rm "$probe"; } >/dev/null 2>&1
  then
    fail "--gin.RUN_DIR=$dir cannot be written: make the bucket (gcloud storage buckets create), or" \
      "sign in (gcloud auth login)"
  fi
}

# Likewise the data.
check_data() {
  [[ -n "$data" ]] || return 0
  [[ "$data" == gs://?* ]] || fail "--data=$data is not in a bucket: name gs://BUCKET/DIRECTORY"
  if [[ -n "$dry" ]]; then
    do_it gcloud storage ls "$data"
  elif ! gcloud storage ls "$data" >/dev/null 2>&1; then
    fail "--data=$data cannot be read: is it there, and are you signed in (gcloud auth login)?"
  fi
}

one_round() {
  # 1 and 2 mean something of famjax train alone: whatever fails before it may go better later.
  if ! { create && sync_tree && setup; }; then return 75; fi
  run "$@"
}

train() {
  local attempt status pause="$wait"
  check_run_dir "$@"
  check_data
  for ((attempt = 0; ; attempt++)); do
    new_round
    status=0
    one_round "$@" || status=$?
    case "$status" in
      0) say "done"; return 0 ;;
      1) say "the loss diverged: not tried again"; return 1 ;;
      2) say "bad input: not tried again; $round says which"; return 2 ;;
    esac
    if ((attempt >= retries)); then
      say "no retries left after $((attempt + 1)) rounds; $name is still there if you pay for it:" \
        "launch/tpu_train.sh delete --name=$name --zone=$zone"
      return 3
    fi
    if [[ "$(state)" != ACTIVE ]]; then delete; fi
    say "status $status: once more in $pause s (retry $((attempt + 1)) of $retries)"
    sleep "$pause"
    pause="$(awk -v p="$pause" 'BEGIN { p *= 2; if (p > 900) p = 900; print p }')"
  done
}

status() {
  say "$name: $(state)"
  new_round
  everywhere status 'cd famjax && launch/tpu_worker.sh alive' || true
  [[ -n "$dry" ]] || tail -n 1 "$round"/*.log
}

follow() {
  local newest i=1
  while [[ -d "$logs/$name/$i" ]]; do i=$((i + 1)); done
  newest="$logs/$name/$((i - 1))/0-0.log"
  [[ -f "$newest" ]] || fail "there are no logs of $name in $logs"
  do_it tail -n 100 -F "$newest"
}

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
    --logs=*) logs="${1#*=}" ;;
    --internal_ip) internal=1 ;;
    --dry_run) dry=1 ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1; options of famjax train go after --. See launch/tpu_train.sh --help" ;;
  esac
  shift
done

for number in "$slices" "$retries"; do
  [[ "$number" =~ ^[0-9]+$ ]] || fail "'$number' is not a number of slices or retries"
done
((slices > 0)) || fail "--slices=0: use at least 1"
case "$verb" in
  create | sync | setup | run | train | status | logs | stop | delete)
    [[ -n "$name" ]] || fail "$verb needs --name=NAME, or TPU_NAME"
    [[ "$verb" == logs || -n "$zone" ]] || fail "$verb needs --zone=ZONE, or ZONE"
    ;;
esac
case "$verb" in
  create | train) [[ -n "$type" ]] || fail "$verb needs --type=v5litepod-32, say, or TPU_TYPE" ;;
esac
trap 'say "interrupted: $name may still run. launch/tpu_train.sh stop (or delete) --name=$name" \
  "--zone=$zone"; exit 130' INT

case "$verb" in
  create) create ;;
  sync) new_round; sync_tree ;;
  setup) check_data; new_round; setup ;;
  run) check_run_dir "$@"; new_round; run "$@" ;;
  train) train "$@" ;;
  status) status ;;
  logs) follow ;;
  stop) new_round; stop_run ;;
  delete) delete ;;
  local)
    [[ -n "$dry" ]] || famjax_environment tpu
    do_it famjax train "$@"
    ;;
  -h | --help | help | "") usage ;;
  *) fail "unknown verb '$verb': train, create, sync, setup, run, status, logs, stop, delete, local" ;;
esac
