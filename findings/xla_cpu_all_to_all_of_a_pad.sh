#!/usr/bin/env bash
# jax 0.10.2, CPU: an all-to-all of which the compiler knows one part to be a constant, such as the zeros of
# jnp.pad, does not compile if another part has another layout, such as that of a transposed array. XLA
# splits the all-to-all into one operand per device and simplifies them one by one; then its own check of
# layouts refuses them. A lax.optimization_barrier before the all-to-all avoids it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ('a',))
x = jnp.arange(48.0).reshape(1, 6, 8)  # one matrix for two devices: the second part is padding


def exchange(x, barrier):
    x = jnp.pad(x.swapaxes(1, 2), ((0, 1), (0, 0), (0, 0)))
    x = lax.optimization_barrier(x) if barrier else x
    return lax.all_to_all(x, 'a', split_axis=0, concat_axis=1, tiled=True)


def run(barrier):
    body = jax.shard_map(
        lambda x: exchange(x, barrier), mesh=mesh, in_specs=P(None, None, 'a'), out_specs=P('a')
    )
    return jax.jit(body)(x)


whole = run(barrier=True)
assert jnp.array_equal(whole[0], x[0].T) and not whole[1].any()
try:
    run(barrier=False)
except jax.errors.JaxRuntimeError as error:
    message = str(error).splitlines()[0]
    assert 'all-to-all has operands with different shapes' in message, message
    print(f'seen with jax {jax.__version__}, CPU: {message}')
else:
    raise SystemExit('changed: it compiles')
PYTHON
