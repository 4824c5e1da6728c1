#!/usr/bin/env bash
# jax 0.10.2: the derivative of a lax.scan over layers computes what depends on no layer before the
# scan, and stacks it. Inside an inner scan over blocks of attention, whose backward pass is a
# custom_vjp and keeps no scores, that is the mask of every pair of blocks, broadcast over heads: a
# byte for each score that blockwise attention was written not to store. It is so under
# jax.checkpoint too, and for causal masks, which no input has made. An optimization_barrier that
# ties the table of pairs to the queries keeps the masks in the loop. (jax 0.12.0.1 does the same.)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$work/program.py" <<'PYTHON'
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

HEADS, T, BLOCK, LAYERS = 8, 2048, 256, 4
PAIRS = np.array([(i, j) for i in range(T // BLOCK) for j in range(i + 1)])


def blocks_of(x, i):
    return lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sums(x, apart):
    return forward(x, apart)[0]


def forward(x, apart):
    """Adds exp of masked scores, block by block: no array of scores exceeds HEADS x BLOCK²."""
    pairs = jnp.asarray(PAIRS)
    if apart:
        pairs = lax.optimization_barrier((x[:, :1, :1], pairs))[1]

    def step(total, pair):
        i, j = pair
        rows = i * BLOCK + jnp.arange(BLOCK)[:, None]
        seen = rows >= j * BLOCK + jnp.arange(BLOCK)
        scores = jnp.einsum('nth,nsh->nts', blocks_of(x, i), blocks_of(x, j))
        return total + jnp.sum(jnp.where(seen, jnp.exp(scores), 0.0)), None

    total = lax.scan(step, jnp.float32(0), pairs)[0]
    return total, (x, total)


def backward(apart, saved, d):
    x, total = saved
    return (x * d / total,)


sums.defvjp(forward, backward)


def loss(weights, apart):
    def layer(x, w):
        x = jnp.sin(x * w)
        return x + sums(x, apart), None

    x = jnp.ones((HEADS, T, 16)) * 0.01
    return jnp.sum(lax.scan(jax.checkpoint(layer), x, weights)[0])


def temporaries(apart):
    step = jax.jit(jax.grad(functools.partial(loss, apart=apart)))
    compiled = step.lower(jnp.ones(LAYERS)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

masks = len(PAIRS) * HEADS * BLOCK**2  # bytes
hoisted, within = temporaries(apart=False), temporaries(apart=True)
print(f'{hoisted / 1e6:.1f} MB of temporaries, {within / 1e6:.1f} with a barrier')
assert 0.9 * masks < hoisted - within < 1.1 * masks, 'changed: the masks are not stacked'
PYTHON
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/program.py"
echo 'seen with jax 0.10.2: the masks of all pairs of blocks, for each head, before the scan'
