#!/usr/bin/env bash
# jax 0.10.2: an entry of the persistent compilation cache that was cut short (jax writes it in place,
# so a process that is killed in that moment leaves one) is never mended. Each later start warns, in a
# UserWarning, compiles again, and leaves the damaged entry as it is, because one of that name exists.
# So restarts compile that program again until somebody removes the entry. Where UserWarnings are
# errors, as in many test suites, the start itself fails.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$work/program.py" <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    result = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((64, 64)))
assert abs(float(result[0, 0]) - 53.85) < 0.01, result
print(sum('Error reading persistent compilation cache' in str(w.message) for w in seen))
PYTHON
run() {
  JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$work/cache" \
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 "$work/venv/bin/python" "$work/program.py"
}

[[ $(run) == 0 ]] && [[ $(run) == 0 ]] # written, then read
entry=$(find "$work/cache" -name '*lambda*-cache')
truncate -s 100 "$entry"
[[ $(run) == 1 ]] || { echo 'changed: a cut entry is read without a warning'; exit 1; }
[[ $(stat -c %s "$entry") == 100 ]] || { echo 'changed: the cut entry is replaced'; exit 1; }
[[ $(run) == 1 ]] || { echo 'changed: the second start does not warn'; exit 1; }
echo 'seen with jax 0.10.2: a cut entry is warned of at each start, and stays'
