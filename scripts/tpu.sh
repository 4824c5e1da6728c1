#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, or of several, from a machine with gcloud.
#
#     export TPU_NAME=my-slice ZONE=us-central2-b        # several slices: TPU_NAME='a-0 a-1'
#     scripts/tpu.sh start --config=configs/tpu_v4.py --workdir=gs://BUCKET/runs/a
#     scripts/tpu.sh logs [WORKER]     # follows the output of a host, 0 by default
#     scripts/tpu.sh status            # for each host: running or ended, and its last line
#     scripts/tpu.sh stop              # the run saves a checkpoint and ends
#
# `start` copies the checkout, installs what is missing, and starts the run, which needs this
# terminal no longer and restarts by itself after a lost process (scripts/again.sh). PROJECT
# overrides gcloud's project; REMOTE_ENV sets variables on the hosts: REMOTE_ENV='RESTARTS=3 A=b'.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TPU_NAME:?the name of the TPU, or the names of its slices}" "${ZONE:?the zone of the TPU}"
read -ra slices <<<"$TPU_NAME"
gcloud_flags=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

# on WORKER COMMAND: runs it on that host of the first slice; on all hosts of all slices for `all`.
on() {
  local names=("${slices[@]}") slice
  [[ $1 == all ]] || names=("${slices[0]}")
  local pids=() failed=0
  for slice in "${names[@]}"; do
    gcloud compute tpus tpu-vm ssh "$slice" "${gcloud_flags[@]}" --worker="$1" --command="$2" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
  return "$failed"
}

setup() {
  local archive slice
  archive=$(mktemp -d)/jaxformer.tgz
  git ls-files -z --cached --others --exclude-standard | tar --null -T - -czf "$archive"
  for slice in "${slices[@]}"; do
    gcloud compute tpus tpu-vm scp "$archive" "$slice:" "${gcloud_flags[@]}" --worker=all
  done
  rm -r "$(dirname "$archive")"
  on all 'set -e
mkdir -p jaxformer && tar xzf jaxformer.tgz -C jaxformer && cd jaxformer
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install -q -U "jax[tpu]" -r requirements.txt'
}

# Succeeds if a run's process, which has its own session and so outlives terminals, is there.
running='cd jaxformer 2>/dev/null && [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null'

start() {
  if on all "! ($running)"; then :; else
    echo "a run is under way on $TPU_NAME, or a host does not answer; stop it first" >&2
    exit 1
  fi
  setup
  on all "set -e
cd jaxformer
setsid env ${REMOTE_ENV:-} scripts/again.sh .venv/bin/python train.py --coordinator=auto \
$(printf '%q ' "$@") >>run.log 2>&1 </dev/null &
echo \$! >run.pid"
  echo "started on $TPU_NAME; scripts/tpu.sh logs shows its output, scripts/tpu.sh stop ends it"
}

case ${1:-} in
  start) start "${@:2}" ;;
  logs) on "${2:-0}" 'tail -n 100 -F jaxformer/run.log' ;;
  status) on all "if ($running); then echo \"\$(hostname): running\"; else
echo \"\$(hostname): ended\"; fi; tail -n 1 jaxformer/run.log" ;;
  stop) on all "if ($running); then kill -TERM \"\$(cat jaxformer/run.pid)\"; fi
while ($running); do sleep 1; done; tail -n 2 jaxformer/run.log" ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
