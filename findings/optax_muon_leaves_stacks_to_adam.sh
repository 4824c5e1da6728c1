#!/usr/bin/env bash
# optax 0.2.8: contrib.muon orthogonalizes leaves with exactly two dimensions. Matrices that are stacked
# over layers or experts, [L, I, O], as code that scans over layers holds them, go to Adam with Nesterov
# momentum at Muon's learning rate, without a word: the model trains, and no weight of its layers by Muon.
# muon_weight_dimension_numbers says which dimensions of a leaf are the matrix.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers, muon

one = jax.random.normal(jax.random.key(0), (4, 8))
params = {'one': one, 'stack': jnp.stack([one, one])}


def spread(update):
    """Returns the largest over the smallest singular value of a matrix: near 1 if orthogonalized."""
    values = jnp.linalg.svd(update, compute_uv=False)
    return float(values[0] / values[-1])


def updates(**options):
    optimizer = muon(0.1, **options)
    return optimizer.update(params, optimizer.init(params), params)[0]


plain = updates()
whole = updates(
    muon_weight_dimension_numbers={
        'one': MuonDimensionNumbers(0, 1), 'stack': MuonDimensionNumbers(1, 2)
    }
)
assert spread(plain['one']) < 1.7, spread(plain['one'])
assert jnp.allclose(whole['stack'][0], plain['one'], atol=1e-5)
assert spread(plain['stack'][0]) > 2, f'changed: {spread(plain["stack"][0])}'
print(
    f'seen with optax 0.2.8: singular values spread by {spread(plain["one"]):.2f} alone, '
    f'{spread(plain["stack"][0]):.2f} in a stack'
)
PYTHON
