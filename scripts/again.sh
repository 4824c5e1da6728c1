#!/usr/bin/env bash
# Runs a command, and again after exit code 75 (the process hung or lost another one) or above 128
# (it was killed, or aborted by jax, with 134, since another one was lost), up to RESTARTS times.
# SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU end the restarts, and the command: it gets a
# SIGTERM. A command that one of them has killed was to end, and is not repeated either; but for srun,
# which ends the other tasks with SIGTERM when one has ended with 75, and returns the highest code.
#
#     RESTARTS=10 RESTART_SECONDS=10 scripts/again.sh python train.py --config=...
set -u
stopping=
child=
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' \
  TERM INT HUP USR1 USR2 XCPU

# ended_by_request CODE: succeeds for the codes of the signals above.
ended_by_request() {
  local name
  for name in TERM INT HUP USR1 USR2 XCPU; do
    (($1 != 128 + $(kill -l "$name"))) || return 0
  done
  return 1
}

for ((i = 0; ; i++)); do
  "$@" &
  child=$!
  # A signal that came in between found no child to pass it on to.
  [[ -z $stopping ]] || kill -TERM "$child" 2>/dev/null
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a trapped signal ends `wait`, but not the command
    wait "$child"
    code=$?
  done
  ((code == 75 || code > 128)) || exit "$code"
  [[ -z $stopping ]] || exit "$code"
  [[ $1 == srun ]] || ! ended_by_request "$code" || exit "$code"
  ((i < ${RESTARTS:-10})) || exit "$code"
  echo "$(date): ended with code $code; again in ${RESTART_SECONDS:-10} s"
  child=
  sleep "${RESTART_SECONDS:-10}" &
  wait $!
  [[ -z $stopping ]] || exit "$code"
done
