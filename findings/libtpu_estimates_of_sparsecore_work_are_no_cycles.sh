#!/usr/bin/env bash
# libtpu 0.0.50.1 with jax 0.12.0.1, v5p: a lookup in a table of 100,352 rows runs on the SparseCore, beside
# the TensorCore. In the program's text it is an asynchronous call, whose estimated_cycles are 2**63 - 1, a
# mark for "none": a sum of all estimates of the program is a hundred years. And the called computation ends
# in a line with more than a brace, its execution thread, so that a reader that waits for a lone brace loses
# its last instruction and runs on into the next computation.
set -euo pipefail
python=$(command -v python3.13 || command -v python3.12 || true)
python=${PYTHON:-$python}
[ -n "$python" ] || { echo 'name a Python of 3.12 or newer: PYTHON=... bash findings/...'; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 "$work/venv/bin/python" - <<'PYTHON'
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

described = topologies.get_topology_desc(
    platform='tpu', topology_name='v5p:2x2x1', chips_per_host_bounds=(2, 2, 1)
)
there = SingleDeviceSharding(described.devices[0])
table = jax.ShapeDtypeStruct((100_352, 512), jnp.float32, sharding=there)
ids = jax.ShapeDtypeStruct((8192,), jnp.int32, sharding=there)
text = jax.jit(lambda w, i: w[i]).lower(table, ids).compile().as_text()
call = re.search(r'call-start\(', text)
mark = f'"estimated_cycles":"{2**63 - 1}"' in text
ends = re.findall(r'^\}, execution_thread="(\w+)"$', text, re.M)
print(
    f'seen with libtpu {version("libtpu")}, jax {jax.__version__}: asynchronous call: {bool(call)}; '
    f'cycles 2**63 - 1: {mark}; computations end with the threads {sorted(set(ends))}'
)
if not (call and mark and ends):
    raise SystemExit('changed: lookups are written otherwise')
PYTHON
