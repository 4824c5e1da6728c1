#!/usr/bin/env bash
# jax 0.10.2 and 0.12.0.1: jax.checkpoint passes the values that its policy saves through
# lax.reduce_precision with the exponent and mantissa bits of their type. reduce_precision takes the
# highest exponent for infinities and NaN, as formats of IEEE's kind do. float8_e4m3fn has numbers
# there, 256 to 448: a saved one becomes infinite, hence NaN, in the gradient's program alone; and one
# below the least normal number, 2^-6, becomes zero. The values do not change without a policy that
# saves them, nor without differentiation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$work/program.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


def h(x):
    q = checkpoint_name(x.astype(jnp.float8_e4m3fn), 'q')
    return q.astype(jnp.float32) ** 2


def value(policy, x):
    f = jax.checkpoint(h, policy=policy)
    return float(jax.jit(jax.value_and_grad(lambda x: jnp.sum(f(x))))(x)[0])


saving = jax.checkpoint_policies.save_only_these_names('q')
x = jnp.array([200.0, 240.0, 256.0, 448.0])
want = float(np.sum(np.asarray(h(x))))
print(f'{want} without jax.checkpoint')
for policy in (None, saving):
    print(f'{value(policy, x)} with policy {"none" if policy is None else "save_only_these_names"}')
assert value(None, x) == want
assert value(saving, x[:2]) == float(np.sum(np.asarray(h(x[:2])))), 'up to 240 nothing changes'
assert np.isnan(value(saving, x)), 'changed: numbers above 240 are saved as they are'
small = jnp.array([2.0**-7])
kept = [value(policy, small) for policy in (None, saving)]
print(f'of 2^-7: {kept[0]} without a policy, {kept[1]} saved')
assert kept == [2.0**-14, 0.0], 'changed: subnormal numbers are saved as they are'
PYTHON
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/program.py"
echo 'seen with jax 0.10.2: numbers of float8_e4m3fn above 240 come back as NaN, below 2^-6 as zero'
