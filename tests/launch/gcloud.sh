#!/usr/bin/env bash
# A cloud in the directory $CLOUD, for tests of launch/tpu_train.sh. Machines are folders of it.
#
#   state            of the queued resource; no file: there is none
#   create_failures  so many creations end in FAILED
#   copy_fails       the next copy of data does
#   calls            every call, one a line
#   machines/NODE-W  the home of a machine
set -euo pipefail
printf '%s\n' "$*" >>"$CLOUD/calls"
value() { for a in "${all[@]}"; do case "$a" in "$1"=*) printf '%s' "${a#*=}" ;; esac; done; }
all=("$@")

machine() { # node, worker
  local home="$CLOUD/machines/$1-$2"
  mkdir -p "$home"
  printf '%s' "$home"
}

case "$1 $2 ${3:-} ${4:-}" in
  "compute tpus queued-resources create")
    [[ ! -f "$CLOUD/state" ]] || { echo "exists" >&2; exit 1; }
    left="$(cat "$CLOUD/create_failures" 2>/dev/null || echo 0)"
    if ((left > 0)); then
      echo $((left - 1)) >"$CLOUD/create_failures"
      echo FAILED >"$CLOUD/state"
    else
      echo ACTIVE >"$CLOUD/state"
    fi
    ;;
  "compute tpus queued-resources describe") cat "$CLOUD/state" ;;
  "compute tpus queued-resources delete")
    for file in "$CLOUD"/machines/*/famjax/run.pid; do
      [[ -f "$file" ]] && read -r pid _ <"$file" && kill -KILL -- "-$pid" 2>/dev/null || true
    done
    rm -rf "$CLOUD/state" "$CLOUD/machines"
    ;;
  "compute tpus tpu-vm describe") printf '10.0.0.%s;' $(seq "${WORKERS:-1}") ;;
  "compute tpus tpu-vm scp")
    node="${6%%:*}"
    for ((w = 0; w < ${WORKERS:-1}; w++)); do cp "$5" "$(machine "$node" "$w")/famjax.tar.gz"; done
    ;;
  "compute tpus tpu-vm ssh")
    home="$(machine "$5" "$(value --worker)")"
    command="$(value --command)"
    if [[ -d "$home/famjax/launch" ]]; then # an environment needs no minutes here
      printf '%s\n' 'say() { :; }' 'fail() { exit 2; }' 'famjax_environment() { :; }' \
        >"$home/famjax/launch/environment.sh"
    fi
    MACHINE="$5-$(value --worker)"
    export MACHINE
    cd "$home" && exec bash -c "$command"
    ;;
  "storage cp"*) cat >/dev/null; [[ ! -f "$CLOUD/no_bucket" ]] ;;
  "storage rm"*) ;;
  "storage ls"*) [[ "$3" != *missing* ]] ;;
  "storage rsync"*)
    if [[ -f "$CLOUD/copy_fails" ]]; then rm "$CLOUD/copy_fails"; exit 1; fi
    echo "of $4" >"$5/pairs.tsv"
    ;;
  *) echo "what is $*?" >&2; exit 1 ;;
esac
