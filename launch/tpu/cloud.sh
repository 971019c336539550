# shellcheck shell=bash disable=SC2034,SC2154
# Talks to gcloud for launch/tpu_train.sh, which sources this file and sets the options: finds out
# the state and the owner of a slice, creates it and deletes it.
#
# Two rules hold everywhere. An error of gcloud says nothing about the slice: only NOT_FOUND for
# this very slice means that it is missing. And only a slice with the id of this logs folder, or one
# that --adopt has taken over, is used or deleted.

# Prints a command, quoted for a shell.
show() {
  local line
  printf -v line ' %q' "$@"
  printf '+%s\n' "$line"
}

# Waits for some seconds. A signal ends the wait at once, which it would not do with a plain sleep.
# File descriptor 9 is the lock: no child may keep it after the launcher has died.
pause_for() {
  sleep "$1" 9>&- &
  wait "$!" || true
}

# Prints the next wait after one of $1 seconds: twice as long, 15 minutes at most.
longer() { awk -v p="$1" 'BEGIN { p *= 2; if (p > 900) p = 900; print p }'; }

# Runs gcloud for at most $1 seconds; 0 is no limit. Sets `reply` and `complaint` to its output and
# its error messages. Returns its status, or 124 after the limit.
ask() {
  local limit="$1" status=0
  shift
  reply="" complaint=""
  if [[ -n "$dry" ]]; then
    show gcloud "$@"
    return 0
  fi
  timeout --kill-after=10 "$limit" gcloud "$@" >"$scratch/out" 2>"$scratch/err" </dev/null 9>&- &
  wait "$!" || status=$?
  reply="$(<"$scratch/out")" complaint="$(<"$scratch/err")"
  [[ "$status" != 124 ]] || complaint="ERROR: no answer within $limit seconds"
  return "$status"
}

# Runs `gcloud compute tpus` in the zone and project of the slice; $1 is the limit in seconds.
tpu() {
  local limit="$1"
  shift
  ask "$limit" compute tpus "$@" --zone="$zone" ${project:+--project="$project"} --quiet
}

# Sets `problem` to one line about the last call that failed.
read_problem() {
  problem="$(grep -am 1 '^ERROR' <<<"$complaint" || grep -a . <<<"$complaint" | tail -n 1 || true)"
  problem="${problem:-gcloud failed and printed nothing}"
  problem="${problem:0:300}"
}

# Succeeds if the last call failed because $2, of the collection $1, does not exist. The name of the
# collection matters: a project may have the name of the slice.
missing() {
  local pattern="NOT_FOUND: Resource '([^']*/$1/)?$2' was not found"
  [[ "$complaint" =~ $pattern ]]
}

# Looks at the slice once. Sets `state` to the word that gcloud prints, to NONE if there is no such
# slice, or to UNKNOWN; `label` and `owner` to its labels, and `created` to its time of creation.
look() {
  local node='tpu.nodeSpec[0].node.labels'
  state=NONE created="" label="" owner="" problem=""
  if tpu "$timeout" queued-resources describe "$name" \
    --format="value[separator='|'](state.state,createTime,$node.famjax_id,$node.famjax_owner)"; then
    [[ -z "$dry" ]] || return 0
    IFS='|' read -r state created label owner <<<"$reply" || true
    if [[ ! "$state" =~ ^[A-Z][A-Z_]*$ ]]; then
      problem="gcloud printed '$state' as the state of $name"
      state=UNKNOWN
    fi
  elif ! missing queuedResources "$name"; then
    read_problem
    state=UNKNOWN
  fi
}

# Looks at the slice until its state is known, with growing waits. Returns 77 if it is still unknown
# after the last retry.
look_until_known() {
  local tries delay="$wait"
  for ((tries = 0; ; tries++)); do
    look
    [[ "$state" == UNKNOWN ]] || return 0
    if ((tries >= retries)); then
      say "the state of $name is still unknown after $((tries + 1)) looks: $problem"
      return 77
    fi
    say "the state of $name is unknown: $problem"
    [[ "$problem" != *auth* && "$problem" != *AUTH* ]] || say "to sign in again: gcloud auth login"
    say "looking again in $delay s; nothing is created or deleted before that"
    pause_for "$delay"
    delay="$(longer "$delay")"
  done
}

# Reads `id`, which slices of these logs carry, and `adopted`, the creation of a slice that was
# taken over. Both are empty if there are none yet.
read_identity() {
  id="" adopted=""
  [[ ! -r "$identity_file" ]] || { read -r id && read -r adopted; } <"$identity_file" || true
}

# Writes `id` and `adopted`; makes the id if there is none.
write_identity() {
  [[ -n "$id" ]] || id="famjax-$(od -An -N8 -tx1 /dev/urandom | tr -d ' \n')"
  { printf '%s\n' "$id" "$adopted" >"$identity_file.new" &&
    mv -f -- "$identity_file.new" "$identity_file"; } ||
    fail "cannot write $identity_file, which says that a slice is yours"
}

# Succeeds if the slice that `look` saw was made from these logs, or was adopted.
owned() {
  [[ -n "$id" && "$label" == "$id" ]] || [[ -n "$adopted" && "$created/$label" == "$adopted" ]]
}

# Ends the script, unless the slice is owned or --adopt takes it over.
claim() {
  local whose="it carries no famjax_id label"
  ! owned || return 0
  [[ -z "$label" ]] || whose="its owner is ${owner:-unknown}, its famjax_id is $label"
  [[ -n "$adopt" ]] ||
    fail "$name ($state, in $zone) was not made from the logs in $logs: $whose. It is left alone." \
      "To use it, name its logs (--logs=DIR) or take it over (--adopt); or choose another --name"
  say "adopting $name: $whose"
  adopted="$created/$label"
  [[ -z "$locked" ]] || write_identity
}

# Takes the lock of this slice, so that one launcher at a time works on it. The kernel releases the
# lock when the launcher ends, however it ends.
take_lock() {
  local tool
  for tool in flock timeout gcloud; do
    command -v "$tool" >/dev/null || fail "$tool is not installed on this machine"
  done
  { mkdir -p -- "$logs/$name" && exec 9>>"$lock_file"; } || fail "cannot write to $logs/$name"
  if ! flock -n 9; then
    fail "another launcher works on $name: $(<"$lock_file"). Follow it with" \
      "'launch/tpu_train.sh logs$options', or end it first"
  fi
  locked=1
  printf 'process %s on %s, since %s, %s\n' "$$" "${HOSTNAME:-this machine}" "$(date '+%F %T')" \
    "${1:0:300}" >"$lock_file"
  read_identity
  [[ -n "$id" ]] || write_identity
}

# Prints the image of the machines of --type.
runtime_image() {
  case "${image:-$type}" in
    v5litepod-* | v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-[0-9]* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *)
      [[ -n "$image" ]] || fail "--type=$type: no image is known for it; name one: --image=IMAGE"
      echo "$image"
      ;;
  esac
}

# Asks for a new slice. An error may come after the slice was made, so the state decides what has
# happened. Returns 75 if there is no slice, 77 if that is unknown.
request() {
  local tries refused nodes_flag=(--node-id="$name")
  if ((slices > 1)); then nodes_flag=(--node-prefix="$name" --node-count="$slices"); fi
  say "requesting $slices x $type ($runtime) in $zone as $name"
  if ! tpu $((timeout * 5)) queued-resources create "$name" "${nodes_flag[@]}" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot} \
    --labels="famjax_id=${id:-ID},famjax_owner=$me"; then
    read_problem
    refused="$problem"
    say "the request failed: $refused"
    look_until_known || return
    if [[ "$state" == NONE ]]; then
      [[ "$refused" != *INVALID_ARGUMENT* ]] || fail "Google rejected the request: $refused"
      return 75
    fi
    ! owned || say "$name was made all the same"
    return 0
  fi
  [[ -z "$dry" ]] || return 0
  for ((tries = 0; tries < 3; tries++)); do # a new slice may take a moment to be seen
    look_until_known || return
    [[ "$state" == NONE ]] || return 0
    pause_for "$poll"
  done
  say "gcloud accepted the request, but there is no $name"
  return 75
}

# Makes sure that there is an ACTIVE slice. Returns 75 if Google failed to provide it, 77 if its
# state stays unknown.
create() {
  local requested="" last=""
  while :; do
    look_until_known || return
    [[ "$state" == NONE ]] || claim
    case "$state" in
      NONE)
        [[ -z "$requested" ]] || { say "$name is gone again"; return 75; }
        requested=1
        request || return
        [[ -z "$dry" ]] || return 0
        continue
        ;;
      ACTIVE) say "$name is ACTIVE"; return 0 ;;
      FAILED | SUSPENDED)
        [[ -z "$requested" ]] || { say "$name is $state"; return 75; }
        say "$name is $state: deleting it before requesting it again"
        delete || return
        continue
        ;;
      CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | SUSPENDING | DELETING) ;;
      *) [[ "$state" == "$last" ]] || say "$state is a state that this script does not know" ;;
    esac
    [[ "$state" == "$last" ]] || say "$name is $state; looking again every $poll s"
    last="$state"
    pause_for "$poll"
  done
}

# Deletes the slice and waits until it is gone. The caller has claimed it. Returns 75 if it is still
# there after the last retry, 77 if that is unknown.
delete() {
  local tries delay="$wait"
  for ((tries = 0; ; tries++)); do
    if [[ "$state" != DELETING ]] &&
      ! tpu $((timeout * 5)) queued-resources delete "$name" --force; then
      read_problem
      say "deleting $name failed: $problem"
    fi
    [[ -z "$dry" ]] || return 0
    look_until_known || return
    [[ "$state" != NONE ]] || { say "$name is deleted"; return 0; }
    claim # somebody else may have made it anew since
    if [[ "$state" == DELETING ]]; then
      ((tries)) || say "$name is DELETING; looking again every $poll s"
      pause_for "$poll"
      continue
    fi
    ((tries < retries)) || { say "$name is still $state, and may cost money"; return 75; }
    pause_for "$delay"
    delay="$(longer "$delay")"
  done
}
