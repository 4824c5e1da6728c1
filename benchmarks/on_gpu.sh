#!/usr/bin/env bash
# Runs what needs a real GPU, in at most 9 minutes: the tests that compile for GPUs, then
# benchmarks/on_gpu.py, whose figures end as one JSON object on the last line.
#
#     bash benchmarks/on_gpu.sh            # on one GPU
#     bash benchmarks/on_gpu.sh --small    # small sizes on any machine; no tests
#
# PYTHON names the interpreter. Ends with 1 if the tests or the benchmark failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
failed=0

if [ "${1:-}" = --small ]; then
    JAX_PLATFORMS=cpu timeout 540 "$python" benchmarks/on_gpu.py --rounds=1 --json "$@" || failed=1
    exit "$failed"
fi
timeout 200 "$python" -m pytest -q -n 0 -m gpu || failed=1
fp8=--nofp8  # e4m3 takes compute capability 8.9
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "${capability:-0}" -ge 90 ] && fp8=--fp8
timeout 330 "$python" benchmarks/on_gpu.py "$fp8" --json "$@" || failed=1
exit "$failed"
