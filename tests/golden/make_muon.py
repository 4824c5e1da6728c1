"""Writes muon.json: a few steps of Muon by torch.optim and by optax.contrib.

    pip install torch optax && python tests/golden/make_muon.py

Weights and gradients are those of a tall, a wide and a square matrix, [inputs, outputs]; torch
gets them turned, as its layers keep [outputs, inputs], and its results are turned back. Each case
holds the options of the optimizer and the weights after the last step; optax's with Nesterov also
those after the first.

torch runs Newton-Schulz in bfloat16. It gets there by one call, Tensor.bfloat16, so that the cases
of dtype float32 replace that call by one that copies: the rest of its code runs as it is.
"""

import contextlib
import importlib.metadata
import itertools
import json
import pathlib
import platform
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from optax.contrib._muon import scale_by_shape
from torch.optim._muon import _adjust_lr

SHAPES = {'tall': (16, 12), 'wide': (12, 16), 'square': (12, 12)}  # [inputs, outputs]
STEP_SIZES = (1.0, 0.3, 2.0, 0.1, 1.0)  # of the gradients, step by step
RATE, MOMENTUM = 0.05, 0.95
# For the scales alone, [inputs, outputs].
SCALED = [(16, 16), (64, 16), (16, 64), (4096, 14_336), (14_336, 4096), (4096, 1024)]

Matrices = dict[str, np.ndarray]


def draw() -> tuple[Matrices, list[Matrices]]:
    """Returns initial weights, and the gradients of each step, in three decimals."""
    rng = np.random.default_rng(0)

    def matrices(size: float) -> Matrices:
        return {
            name: np.round(size * rng.standard_normal(shape), 3).astype(np.float32)
            for name, shape in SHAPES.items()
        }

    return matrices(0.3), [matrices(size) for size in STEP_SIZES]


def by_torch(weights: Matrices, grads: list[Matrices], dtype: str, **options) -> Matrices:
    """Returns the weights after all steps of torch.optim.Muon."""
    params = {name: torch.nn.Parameter(torch.tensor(x.T)) for name, x in weights.items()}
    optimizer = torch.optim.Muon(params.values(), lr=RATE, momentum=MOMENTUM, **options)
    to_float32 = unittest.mock.patch.object(torch.Tensor, 'bfloat16', torch.Tensor.clone)
    with to_float32 if dtype == 'float32' else contextlib.nullcontext():
        for step in grads:
            for name, g in step.items():
                params[name].grad = torch.tensor(g.T)
            optimizer.step()
    return {name: p.detach().numpy().T for name, p in params.items()}


def by_optax(weights: Matrices, grads: list[Matrices], **options) -> list[Matrices]:
    """Returns the weights after each step of optax.contrib.muon, in float32."""
    optimizer = optax.contrib.muon(RATE, beta=MOMENTUM, **options)
    params = jax.tree.map(jnp.asarray, weights)
    state, after = optimizer.init(params), []
    for step in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, step), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


def torch_cases(weights: Matrices, grads: list[Matrices]) -> list[dict]:
    """Returns all cases of float32, and two of bfloat16."""
    cases = []
    for dtype, nesterov, adjust_lr_fn, decay in itertools.product(
        ('float32', 'bfloat16'), (True, False), ('original', 'match_rms_adamw'), (0.1, 0.0)
    ):
        if dtype == 'bfloat16' and (adjust_lr_fn != 'original' or not decay):
            continue
        options = {'nesterov': nesterov, 'adjust_lr_fn': adjust_lr_fn, 'weight_decay': decay}
        last = by_torch(weights, grads, dtype, **options)
        cases.append({'dtype': dtype, **options, 'last': rounded(last)})
    return cases


def optax_cases(weights: Matrices, grads: list[Matrices]) -> list[dict]:
    """Returns cases with and without Nesterov, both scales, and weight decay."""
    cases = []
    for nesterov, consistent_rms, decay in itertools.product(
        (True, False), (None, 0.2), (0.1, 0.0)
    ):
        options = {'nesterov': nesterov, 'consistent_rms': consistent_rms, 'weight_decay': decay}
        after = by_optax(weights, grads, **options)
        first = {'first': rounded(after[0])} if nesterov and decay else {}
        cases.append({**options, **first, 'last': rounded(after[-1])})
    return cases


def scales() -> list[dict]:
    """Returns the factors on the orthogonal matrix of each shape, 'spectral' and 'rms'."""
    found = []
    for inputs, outputs in SCALED:
        of_torch = [_adjust_lr(1.0, f, (outputs, inputs)) for f in (None, 'match_rms_adamw')]
        of_optax = []
        for rms in (None, 0.2):
            by_shape = scale_by_shape(optax.contrib.MuonDimensionNumbers(0, 1), rms)
            update = by_shape.update(jnp.ones((inputs, outputs)), optax.EmptyState())[0]
            of_optax.append(float(update[0, 0]))
        found.append({'inputs': inputs, 'outputs': outputs, 'torch': of_torch, 'optax': of_optax})
    return found


def rounded(matrices: Matrices) -> dict[str, list]:
    """Returns the numbers in seven decimals."""
    return {
        name: [[round(float(v), 7) for v in row] for row in np.asarray(x)]
        for name, x in matrices.items()
    }


if __name__ == '__main__':
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'optax', 'jax')}
    weights, grads = draw()
    golden = {
        'versions': versions | {'python': platform.python_version()},
        'rate': RATE,
        'momentum': MOMENTUM,
        'weights': rounded(weights),
        'grads': [rounded(step) for step in grads],
        'torch': torch_cases(weights, grads),
        'optax': optax_cases(weights, grads),
        'scales': scales(),
    }
    path = pathlib.Path(__file__).with_name('muon.json')
    path.write_text(json.dumps(golden, separators=(',', ':')) + '\n')
