# shellcheck shell=bash disable=SC2034,SC2154
# Runs commands on the machines of a slice for launch/tpu_train.sh, which sources this file.
#
# The status of a command comes in a line of its own at the end of its output. The status of gcloud
# does not do: it is 1 as well when a token has expired, and 255 when a connection breaks.

# Prints the nodes of the slice, one a line.
nodes() {
  local i
  if ((slices == 1)); then
    printf '%s\n' "$name"
  else
    for ((i = 0; i < slices; i++)); do printf '%s-%d\n' "$name" "$i"; done
  fi
}

# Sets `count` to the number of machines of node $1. Returns 75 if the node is missing or gcloud
# fails until the last retry.
count_machines() {
  local tries delay="$wait"
  count=1
  for ((tries = 0; ; tries++)); do
    if tpu "$timeout" tpu-vm describe "$1" --format='value(networkEndpoints[].ipAddress)'; then
      [[ -z "$dry" ]] || return 0
      count="$(tr ';, ' '\n' <<<"$reply" | grep -c . || true)"
      ((count == 0)) || return 0
      problem="gcloud listed no machines"
    else
      ! missing nodes "$1" || { say "there is no node $1"; return 75; }
      read_problem
    fi
    say "the machines of $1 are unknown: $problem"
    ((tries < retries)) || return 75
    pause_for "$delay"
    delay="$(longer "$delay")"
  done
}

# Lists the machines of the slice in `machines`: NODE, worker, and the name of the log,
# SLICE-WORKER.
list_machines() {
  local node i=0 w
  machines=()
  for node in $(nodes); do
    count_machines "$node" || return
    for ((w = 0; w < count; w++)); do machines+=("$node $w $i-$w"); done
    i=$((i + 1))
  done
}

# Makes a folder for the logs of a round: `round`.
new_round() {
  local i=1
  if [[ -n "$dry" ]]; then
    round="$logs/$name/1"
    return
  fi
  mkdir -p -- "$logs/$name"
  while ! mkdir -- "$logs/$name/$i" 2>/dev/null; do
    [[ -d "$logs/$name/$i" ]] || fail "cannot make the folder $logs/$name/$i for logs"
    i=$((i + 1))
  done
  round="$logs/$name/$i"
}

# Runs a command on one machine for at most $2 seconds (0: no limit) and appends its output to the
# machine's log in `round`; the token makes its last line unmistakable. Sets `status`. Returns 1 if
# the connection broke before the status came.
reach() { # machine, limit, command, token
  local node worker log line
  read -r node worker log <<<"$1"
  log="$round/$log.log"
  local -a call=(
    timeout --kill-after=10 "$2" gcloud compute tpus tpu-vm ssh "$node" --worker="$worker"
    --zone="$zone" ${project:+--project="$project"} --quiet ${internal:+--internal-ip}
    --ssh-flag=-oServerAliveInterval=30
    --command="($3); s=\$?; printf '\\n[launch] %s ended with status %d\\n' $4 \$s; exit \$s"
  )
  if [[ "$log" == */0-0.log && -n "$echoed" ]]; then
    "${call[@]}" 2>&1 </dev/null | tee -ap -- "$log" &
  else
    "${call[@]}" >>"$log" 2>&1 </dev/null &
  fi
  wait "$!" || true
  line="$(grep -a "^\[launch\] $4 ended with status [0-9]" "$log" | tail -n 1 || true)"
  status="${line##* }"
  [[ -n "$line" ]]
}

# Ends what a background shell has started, gcloud included, when that shell is told to end.
end_with_children() { trap 'kill $(jobs -p) 2>/dev/null; exit 143' TERM; }

# Starts a command on every machine, in the background; what a machine does is `$5 MACHINE ...`.
# Sets `children` to the process of each machine.
start_everywhere() { # what it is, limit, command, token, function
  local machine
  children=()
  for machine in "${machines[@]}"; do
    printf '# %s\n' "$1" >>"$round/${machine##* }.log"
    rm -f -- "$round/${machine##* }.$1"
    (
      end_with_children
      "$5" "$machine" "$2" "$3" "$4" "$1"
    ) 9>&- &
    children+=("$!")
  done
}

# Keeps the status of a command on a machine in a file; 255 if the connection broke.
reach_once() { # machine, limit, command, token, what it is
  local status
  reach "$@" || status=255
  printf '%s\n' "$status" >"$round/${1##* }.$5"
}

# Like reach_once, for a run, which goes on when its connection breaks: connects again, with growing
# waits, until the status is known. Counts the failures in a row in a file.
reach_again() { # machine, limit, command, token, what it is
  local status lost=0 delay="$wait" log="$round/${1##* }.log" before
  while :; do
    before="$(wc -c <"$log")"
    ! reach "$@" || break
    kill -0 "$$" 2>/dev/null || return 0 # the launcher was killed; the run goes on without it
    if tail -c "+$((before + 1))" "$log" | grep -aq '^\[worker\] '; then lost=0 delay="$wait"; fi
    lost=$((lost + 1))
    printf '%s\n' "$lost" >"$round/${1##* }.lost"
    printf '# the connection broke; connecting again in %s s\n' "$delay" >>"$log"
    pause_for "$delay"
    delay="$(longer "$delay")"
  done
  printf '%s\n' "$status" >"$round/${1##* }.$5"
}

# Sets `worst` to the status that matters most, and `ended` to the number of machines that have one.
# 76 is the worker's refusal; 2 and 1 mean the same on all machines; 70 may be an error of a machine
# that has lost another, whose status says more; 143 is a machine that was told to end.
tally() { # what it is
  local machine status rank top=0
  worst=0 ended=0
  for machine in "${machines[@]}"; do
    [[ -s "$round/${machine##* }.$1" ]] || continue
    ended=$((ended + 1))
    status="$(<"$round/${machine##* }.$1")"
    case "$status" in
      0) rank=0 ;;
      143) rank=1 ;;
      70) rank=2 ;;
      1) rank=4 ;;
      2) rank=5 ;;
      76) rank=6 ;;
      *) rank=3 ;;
    esac
    ((rank <= top)) || { top="$rank"; worst="$status"; }
  done
}

# Prints the ssh command of every node, for a dry run.
show_everywhere() {
  local node
  for node in $(nodes); do
    show gcloud compute tpus tpu-vm ssh "$node" --worker=all --zone="$zone" \
      ${project:+--project="$project"} --quiet ${internal:+--internal-ip} --command="$1"
  done
}

# Runs a command on all machines at once and waits. Returns the status that matters most.
everywhere() { # what it is, limit, command
  local child
  if [[ -n "$dry" ]]; then
    show_everywhere "$3"
    return 0
  fi
  start_everywhere "$1" "$2" "$3" "$1-$RANDOM$RANDOM" reach_once
  for child in "${children[@]}"; do wait "$child" || true; done
  tally "$1"
  ((worst == 0)) || say "$1 ended with status $worst; the logs are in $round"
  return "$worst"
}

# Prints a command for the part on the machines, which knows by these variables who asks.
worker() { # arguments
  local line
  printf -v line ' %q' "$@"
  printf 'cd famjax && FAMJAX_LAUNCHER=%q FAMJAX_ATTEMPT=%q FAMJAX_WHO=%q FAMJAX_ADOPT=%q %s%s' \
    "$id" "$attempt" "$me" "$adopt" launch/tpu_worker.sh "$line"
}

# The same, where a machine without the tree has no run: prints a command that says so.
worker_if_there() {
  printf 'if [ -x famjax/launch/tpu_worker.sh ]; then %s; else echo "[worker] idle"; fi' \
    "$(worker "$@")"
}

# Copies this tree to every machine.
sync_tree() {
  local tar="$scratch/famjax.tar.gz" node
  if [[ -n "$dry" ]]; then
    say "packing the tree into $tar"
  elif git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' f; do [[ ! -f "$f" ]] || printf '%s\0' "$f"; done |
      tar --null --files-from=- -czf "$tar" || return 75
  else
    tar --exclude=./.venv --exclude=./runs --exclude=./logs -czf "$tar" . || return 75
  fi
  for node in $(nodes); do
    if ! tpu $((timeout * 5)) tpu-vm scp "$tar" "$node:famjax.tar.gz" --worker=all \
      ${internal:+--internal-ip}; then
      read_problem
      say "copying the tree to $node failed: $problem"
      return 75
    fi
  done
  everywhere sync $((timeout * 5)) 'mkdir -p famjax && tar -xzf famjax.tar.gz -C famjax'
}

# Copies --data to every machine and makes the environment there.
setup() {
  local copy=""
  [[ -z "$data" ]] ||
    printf -v copy 'mkdir -p data && gcloud storage rsync --recursive %q data && ' "$data"
  everywhere setup 0 "$copy$(worker setup)"
}

# Ends the run on every machine; it saves first. A machine has FAMJAX_GRACE seconds for that.
stop_run() {
  everywhere stop $((timeout + ${FAMJAX_GRACE:-120})) "$(worker_if_there stop)"
}

# Prints what machine $1 has answered to `alive`. An older tree answers with one word.
last_answer() {
  grep -aE '^(\[worker\] running.*|\[worker\] idle|running|idle)$' "$round/${1##* }.log" |
    tail -n 1 || true
}

# Prints a number for the arguments of a run; it is the same only for the same arguments.
fingerprint() { printf '%s\0' "$@" | cksum | tr ' ' '-'; }

# Finds out what runs on the machines before anything is changed there. Sets `attempt` if the run
# with these arguments is alive on all of them, so that it can be taken up. Returns 0 then, or if
# the machines are free; 75 if a machine cannot be reached, 76 if they belong to another run.
find_run() { # arguments
  local machine line what launcher run sum since who dir alive=0 first="" mixed="" other=""
  attempt=""
  [[ -z "$dry" ]] || return 0
  echoed="" everywhere alive "$timeout" "$(worker_if_there alive)" || return 75
  for machine in "${machines[@]}"; do
    line="$(last_answer "$machine")"
    IFS=$'\x1f' read -r what launcher run sum since who dir <<<"$line" || true
    [[ "$what" == *running* ]] || continue
    alive=$((alive + 1))
    refusal="a run is alive on $name: ${dir:-its directory is unknown}, started by ${who:-unknown}"
    refusal+=" at ${since:-an unknown time}"
    if [[ "$launcher" != "$id" && -z "$adopt" ]]; then
      refusal+=". It belongs to another launcher; take it over with --adopt, or use another slice"
      return 76
    fi
    [[ "$sum" == "$(fingerprint "$@")" ]] || other=1
    [[ "${first:=$run}" == "$run" ]] || mixed=1
  done
  if ((alive == 0)); then return 0; fi
  if [[ -n "$other" ]]; then
    refusal+=", with other arguments. Take it up with those arguments, or end it first with"
    refusal+=" 'launch/tpu_train.sh stop$options'"
    return 76
  fi
  if [[ -z "$mixed" ]] && ((alive == ${#machines[@]})); then
    attempt="$first"
    say "${refusal/a run is/taking up the run that is}"
  else
    say "$refusal; it is not on all machines, so it is ended before the next one begins"
    stop_run || return 75
  fi
}

# Watches a run until every machine has a status. Returns 75 if the slice is gone; a slice whose
# state is unknown is not.
watch_run() {
  local stopped="" absent=0 gap="$poll"
  while :; do
    tally run
    ((ended < ${#machines[@]})) || return 0
    if ((worst != 0)); then
      [[ -n "$stopped" ]] ||
        say "a machine ended with status $worst: ending the run on all; the logs are in $round"
      stopped=1
      # A machine whose run has only just begun may miss the first call.
      (end_with_children; stop_quietly) 9>&- &
      wait "$!" || true
    fi
    look
    case "$state" in
      NONE) absent=$((absent + 1)) ;;
      SUSPENDED | FAILED) absent=2 ;;
      ACTIVE) absent=0; owned || absent=2 ;;
      UNKNOWN)
        [[ "$gap" != "$poll" ]] || say "the state of $name is unknown: $problem; watching on"
        ;;
    esac
    if ((absent >= 2)); then
      say "$name is ${state/NONE/deleted}: this round is over"
      return 75
    fi
    [[ "$state" != ACTIVE ]] || give_up_lost
    if [[ "$state" == UNKNOWN ]]; then gap="$(longer "$gap")"; else gap="$poll"; fi
    wait_for_status "$gap"
  done
}

# Waits until one more machine has a status, for at most $1 seconds.
wait_for_status() {
  local before="$ended" until
  until="$(awk -v a="$SECONDS" -v b="$1" 'BEGIN { print int(a + b) }')"
  while :; do
    pause_for "$(awk -v a="$1" -v b="$poll" 'BEGIN { print a < b ? a : b }')"
    tally run
    ((ended == before && SECONDS < until)) || return 0
  done
}

# Ends the run on every machine, without a word.
stop_quietly() { echoed="" stop_run >/dev/null 2>&1 || true; }

# Gives a machine the status 255 if it could not be reached for too long, though the slice is
# ACTIVE.
give_up_lost() {
  local k lost
  for k in "${!machines[@]}"; do
    lost="$round/${machines[k]##* }.lost"
    [[ -s "$lost" && ! -s "${lost%.lost}.run" ]] || continue
    (($(<"$lost") > retries)) || continue
    say "machine ${machines[k]##* } could not be reached $(<"$lost") times in a row"
    kill "${children[k]}" 2>/dev/null || true
    echo 255 >"${lost%.lost}.run"
  done
}

# Runs famjax train on every machine, or takes up the run `attempt`. When one machine fails, the run
# is ended on all, so that none waits for it for ever. Returns the status that matters most.
run() { # arguments
  local child gone=0
  [[ -n "$attempt" ]] || attempt="$(date -u +%Y%m%d%H%M%S)-$$-$RANDOM"
  if [[ -n "$dry" ]]; then
    show_everywhere "$(worker run "$@")"
    return 0
  fi
  rm -f -- "$round"/*.lost
  phase="while the run was going on"
  start_everywhere run 0 "$(worker run "$@")" "$attempt" reach_again
  watch_run || gone=$?
  if ((gone)); then kill "${children[@]}" 2>/dev/null || true; fi
  for child in "${children[@]}"; do wait "$child" || true; done
  ((gone == 0)) || return "$gone"
  tally run
  if ((worst == 76)); then
    refusal="$(grep -ah '^\[worker\] refused' "$round"/*.log | tail -n 1 || true)"
    refusal="$name is in use: ${refusal#*refused: }"
  fi
  ((worst == 0)) || say "the run ended with status $worst; the logs are in $round"
  return "$worst"
}

# Prints the frames and the kind of the last traceback of a run that ended with 70, without numbers
# that change from run to run.
last_traceback() {
  local file
  for file in "$round"/*.run; do
    [[ "$(<"$file")" == 70 ]] || continue
    awk '/^Traceback \(most recent call last\)/ { frames = ""; kind = "" }
      /^ +File ".*", line [0-9]+, in / { frames = frames $0 "\n" }
      /^[A-Za-z_][A-Za-z_0-9.]*(:|$)/ && frames != "" && kind == "" { kind = $1 }
      END { printf "%s%s", frames, kind }' "${file%.run}.log"
    return
  done
}
