#!/usr/bin/env bash
# Trains on a SLURM cluster: one task per GPU, on a file system that all nodes share.
#
#     scripts/slurm.sh start --nodes=4 --ntasks-per-node=8 --gpus-per-task=1 --time=24:00:00 -- \
#         --config=configs/tiny.py --workdir=runs/a --config.mesh.fsdp=32
#     scripts/slurm.sh logs JOB        # follows its output
#     scripts/slurm.sh stop JOB        # the run saves a checkpoint and ends
#
# Options before `--` go to sbatch, those after it to train.py. The job queues itself again when its
# time is over, and restarts by itself after a lost process (scripts/again.sh). VENV is the virtual
# environment that the nodes use, .venv by default.
set -euo pipefail
cd "$(dirname "$0")/.."

start() {
  local options=()
  while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  (($#)) || usage
  local job
  job=$(sbatch --parsable "${options[@]}" scripts/slurm_job.sh "${@:2}")
  job=${job%%;*} # a cluster's name may follow
  echo "job $job; scripts/slurm.sh logs $job shows its output, scripts/slurm.sh stop $job ends it"
}

usage() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

case ${1:-} in
  start) start "${@:2}" ;;
  logs) tail -n 100 -F "slurm-${2:?the number of the job}.log" ;;
  stop) scancel --signal=TERM "${2:?the number of the job}" ;; # to the tasks; the job then ends
  *) usage ;;
esac
