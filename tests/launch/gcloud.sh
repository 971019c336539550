#!/usr/bin/env bash
# A cloud in the directory $CLOUD, for tests of launch/tpu_train.sh. Machines are folders of it.
#
#   state            of the queued resource; without this file there is none
#   labels, created  its labels, as --labels gave them, and its time of creation
#   states           states that it goes through, one for each look
#   create_failures  number of creations that end in FAILED
#   copy_fails       the next copy of data fails
#   calls            every call, one a line
#   machines/NODE-W  the home of a machine
#   fails.VERB       what the next calls of VERB do instead, one a line; VERB is create, describe,
#                    delete, nodes (tpu-vm describe), scp, storage, or ssh-WORD, where WORD is the
#                    word after tpu_worker.sh. A line is
#                      ok                  as usual
#                      STATUS MESSAGE      prints the message as an error and ends with the status
#                      hangs               never answers
#                      done STATUS MESSAGE does its work, and then fails
#                      breaks SECONDS      ssh alone: the connection breaks after so long
set -euo pipefail
all=("$@")

# Prints the value of an option.
value() { for a in "${all[@]}"; do case "$a" in "$1"=*) printf '%s' "${a#*=}" ;; esac; done; }

# Takes the next line of fails.$1 and does what it says; sets `later` to what is left to do.
may_fail() {
  local file="$CLOUD/fails.$1" line="" lock
  later=""
  [[ -s "$file" ]] || return 0
  exec {lock}>>"$CLOUD/fails.lock"
  flock "$lock"
  line="$(head -n 1 "$file")"
  sed -i 1d "$file"
  exec {lock}>&-
  case "$line" in
    ok | "") ;;
    hangs) exec sleep 300 ;;
    "done "*) later="${line#done }" ;;
    "breaks "*) later="$line" ;;
    *) complain "$line" ;;
  esac
}

# Fails with "STATUS MESSAGE".
complain() {
  printf '%b\n' "${1#* }" >&2
  exit "${1%% *}"
}

machine() { # node, worker
  local home="$CLOUD/machines/$1-$2"
  mkdir -p "$home"
  printf '%s' "$home"
}

create() {
  local left
  [[ ! -f "$CLOUD/state" ]] || complain "1 ERROR: (gcloud.compute.tpus.queued-resources.create) \
ALREADY_EXISTS: Resource 'projects/p/locations/z/queuedResources/t' already exists"
  left="$(cat "$CLOUD/create_failures" 2>/dev/null || echo 0)"
  value --labels >"$CLOUD/labels"
  date +%FT%T.%NZ >"$CLOUD/created"
  if ((left > 0)); then
    echo $((left - 1)) >"$CLOUD/create_failures"
    echo FAILED >"$CLOUD/state"
  else
    echo ACTIVE >"$CLOUD/state"
  fi
}

describe() {
  local labels state
  [[ -f "$CLOUD/state" ]] || complain "1 ERROR: (gcloud.compute.tpus.queued-resources.describe) \
NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/$1' was not found. This command is \
authenticated as a@b.c which is the active account specified by the [core/account] property"
  state="$(<"$CLOUD/state")"
  if [[ -s "$CLOUD/states" ]]; then
    state="$(head -n 1 "$CLOUD/states")"
    sed -i 1d "$CLOUD/states"
  fi
  labels="$(cat "$CLOUD/labels" 2>/dev/null || true),"
  label() { grep -o "$1=[^,]*" <<<"$labels" | cut -d = -f 2 || true; }
  printf '%s|%s|%s|%s\n' "$state" "$(cat "$CLOUD/created" 2>/dev/null || true)" \
    "$(label famjax_id)" "$(label famjax_owner)"
}

delete() {
  local file pid
  for file in "$CLOUD"/machines/*/famjax/run.pid; do
    [[ -f "$file" ]] && read -r pid _ <"$file" && kill -KILL -- "-$pid" 2>/dev/null || true
  done
  rm -rf "$CLOUD/state" "$CLOUD/machines" "$CLOUD/labels" "$CLOUD/created"
}

connect() { # node, worker, command
  local home verb=other
  home="$(machine "$1" "$2")"
  [[ ! "$3" =~ tpu_worker.sh\ ([a-z]+) ]] || verb="${BASH_REMATCH[1]}"
  [[ ! "$3" =~ tpu_worker.sh\ ([a-z]+)\; ]] || verb="${BASH_REMATCH[1]}"
  may_fail "ssh-$verb"
  if [[ -d "$home/famjax/launch" ]]; then # an environment needs no minutes here
    printf '%s\n' 'say() { :; }' 'fail() { exit 2; }' 'famjax_environment() { :; }' \
      >"$home/famjax/launch/environment.sh"
  fi
  export MACHINE="$1-$2"
  cd "$home"
  [[ -n "$later" ]] || exec bash -c "$3"
  setsid bash -c "$3" &
  sleep "${later#breaks }"
  kill -KILL -- "-$!" 2>/dev/null || true
  complain "255 Connection reset by peer\nERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] \
exited with return code [255]."
}

printf '%s\n' "$*" >>"$CLOUD/calls"
case "$1 $2 ${3:-} ${4:-}" in
  "compute tpus queued-resources "*)
    may_fail "$4"
    [[ "$4" == describe ]] || [[ "$4" == create ]] || [[ -f "$CLOUD/state" ]] ||
      complain "1 ERROR: (gcloud.compute.tpus.queued-resources.$4) NOT_FOUND: Resource \
'projects/p/locations/z/queuedResources/$5' was not found"
    "$4" "$5"
    [[ -z "$later" ]] || complain "$later"
    ;;
  "compute tpus tpu-vm describe")
    may_fail nodes
    printf '10.0.0.%s;' $(seq "${WORKERS:-1}")
    ;;
  "compute tpus tpu-vm scp")
    may_fail scp
    node="${6%%:*}"
    for ((w = 0; w < ${WORKERS:-1}; w++)); do cp "$5" "$(machine "$node" "$w")/famjax.tar.gz"; done
    ;;
  "compute tpus tpu-vm ssh") connect "$5" "$(value --worker)" "$(value --command)" ;;
  "config get-value project"*) cat "$CLOUD/project" 2>/dev/null || true ;;
  "storage cp"*) may_fail storage; cat >/dev/null; [[ ! -f "$CLOUD/no_bucket" ]] ;;
  "storage rm"*) ;;
  "storage ls"*) may_fail storage; [[ "$3" != *missing* ]] ;;
  "storage rsync"*)
    if [[ -f "$CLOUD/copy_fails" ]]; then rm "$CLOUD/copy_fails"; exit 1; fi
    echo "of $4" >"$5/pairs.tsv"
    ;;
  *) complain "1 what is $*?" ;;
esac
