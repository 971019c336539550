#!/usr/bin/env bash
# A run, for tests of launch/tpu_train.sh: notes its arguments, and does what the next line of its
# machine's plan says, $CLOUD/plan.MACHINE; without one it ends well.
set -euo pipefail
{ printf '%s\0' "$MACHINE" "$@"; printf '\n'; } >>"$CLOUD/runs"
trap 'echo saved; exit 143' TERM
plan="$CLOUD/plan.$MACHINE"
touch "$plan"
what="$(head -n 1 "$plan")"
sed -i 1d "$plan"
echo "run on $MACHINE: ${what:-ends}"
case "$what" in
  [0-9]*) exit "$what" ;;
  preempted) echo SUSPENDED >"$CLOUD/state"; sleep 120 & wait ;;
  waits) sleep 120 & wait ;;
esac
