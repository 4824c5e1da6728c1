#!/usr/bin/env bash
# Runs a command, and again after exit code 75 (the process hung or lost another one) or above 128
# (it was killed), up to RESTARTS times. SIGTERM is passed on to the command, and ends the restarts.
#
#     RESTARTS=10 RESTART_SECONDS=10 scripts/again.sh python train.py --config=...
set -u
stopping=
child=
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

for ((i = 0; ; i++)); do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends `wait`, but not the command
    wait "$child"
    code=$?
  done
  ((code == 75 || code > 128)) || exit "$code"
  [[ -z $stopping ]] || exit "$code"
  ((i < ${RESTARTS:-10})) || exit "$code"
  echo "$(date): ended with code $code; again in ${RESTART_SECONDS:-10} s"
  child=
  sleep "${RESTART_SECONDS:-10}" &
  wait $!
  [[ -z $stopping ]] || exit "$code"
done
