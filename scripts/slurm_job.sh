#!/usr/bin/env bash
# The job that scripts/slurm.sh submits: runs train.py in all tasks. Five minutes before its time is
# over, it signals the tasks to save and end, and puts itself back into the queue.
#SBATCH --job-name=jaxformer
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -u
requeue=
again=
# To the tasks alone; again.sh is to know that they end by request.
trap 'requeue=1; scancel --signal=TERM "$SLURM_JOB_ID"; kill -TERM "$again"' TERM

PATH="$PWD/${VENV:-.venv}/bin:$PATH" \
  scripts/again.sh srun --kill-on-bad-exit=1 python train.py "$@" &
again=$!
wait $!
code=$?
while kill -0 $! 2>/dev/null; do # a trapped signal ends `wait`, but not the command
  wait $!
  code=$?
done
[[ -z $requeue ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
