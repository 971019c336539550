#!/usr/bin/env bash
# A run, for tests of launch/tpu_train.sh: notes its arguments, and does what the next line of its
# machine's plan says, $CLOUD/plan.MACHINE; without one it ends well.
#
#   STATUS [FAULT]   ends with a status; 70 prints the traceback of a fault first
#   preempted        the slice is SUSPENDED while it runs
#   waits [SECONDS]  runs for so long, or until there is a file $CLOUD/end
set -euo pipefail
trap 'echo saved; exit 143' TERM
plan="$CLOUD/plan.$MACHINE"
touch "$plan"
read -r what more <"$plan" || true
sed -i 1d "$plan"
# Tests end a run as soon as it is noted, so the plan must be taken by then. One printf is one write,
# which machines that begin at once cannot mix.
printf '%s\0' "$MACHINE" "$@" $'\n' >>"$CLOUD/runs"
echo "run on $MACHINE: ${what:-ends}"
case "${what:-}" in
  70)
    printf '%s\n' 'Traceback (most recent call last):' \
      "  File \"loop.py\", line 7, in ${more:-step}" \
      "    x = 1 / 0" "ZeroDivisionError: at step $RANDOM"
    exit 70
    ;;
  [0-9]*) exit "$what" ;;
  preempted) echo SUSPENDED >"$CLOUD/state"; sleep 120 & wait ;;
  waits)
    if [[ -n "$more" ]]; then sleep "$more" & wait; fi
    while [[ -z "$more" && ! -e "$CLOUD/end" ]]; do sleep 0.05; done
    ;;
esac
