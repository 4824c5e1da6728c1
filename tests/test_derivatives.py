"""Every hand-written derivative is that of its own function; walking the modules finds them all.

Run it after any change of a forward or a backward pass. A new custom_vjp needs a line in EXAMPLES.
"""

import ast
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, small_config

import layers.cross_entropy
from layers import delta_attention, float8
from layers.expert_kernels import BLOCK
from layers.moe import inverted
from parallel import Array, Tree

ROOT = pathlib.Path(__file__).parent.parent
CUSTOM = ('custom_vjp', 'custom_jvp')


class Example(NamedTuple):
    """Small inputs of a function whose derivative is written by hand.

    inputs: the number of arguments, the first ones, that it is differentiated by.
    of: the results that are differentiated.
    rounding: the error, relative to the norm, of a backward pass that rounds more than forward.
    """

    args: tuple
    inputs: int
    of: Callable[[Any], Tree] = lambda results: results
    rounding: float = 0.0


def draw(*shape: int, seed: int = 0) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def attention() -> Example:
    """Two blocks of positions, two documents, keys wider than values."""
    cfg = cpu_model(small_config())
    q, k, v = draw(1, 2, 2, 16, 3), draw(1, 2, 16, 3, seed=1), draw(1, 2, 16, 2, seed=2)
    documents = jnp.array([[0] * 5 + [1] * 11])
    return Example((q, k, v, documents, 0.5, cfg), 3)


def ring() -> Example:
    """On a ring of one device: two documents, keys wider than values."""
    cfg = cpu_model(small_config())
    q, travels = draw(1, 2, 2, 16, 3), draw(1, 2, 16, 4, seed=1)
    weights = (draw(4, 3, seed=2), draw(4, 2, seed=3))
    documents = jnp.array([[0] * 5 + [1] * 11])

    def expand(weights: Tree, travels: Array) -> tuple[Array, Array]:
        return travels @ weights[0], travels @ weights[1]

    return Example((q, travels, weights, documents, expand, 0.5, cfg), 3)


def experts() -> Example:
    """An expert without rows, and rows without an expert, whose results mean nothing."""
    w = {'w_gate': draw(3, 3, 2), 'w_up': draw(3, 3, 2, seed=1), 'w_down': draw(3, 2, 3, seed=2)}
    sizes = jnp.array([3, 0, 9])
    w |= {'b_gate': draw(3, 2, seed=3), 'b_up': draw(3, 2, seed=4), 'b_down': draw(3, 3, seed=5)}
    return Example((draw(14 + BLOCK, 3), w, sizes, 'blocks', 0.0), 2, lambda y_XD: y_XD[:12])


def moved_rows() -> Example:
    index = jnp.array([7, 2, 99, 0, 9, 1])  # one is out of range
    return Example((draw(5, 3), index, inverted(index, 10), 2), 1)


def vocabulary() -> Example:
    """Chunks of two tokens; the second result is a metric."""
    labels = jnp.array([3, -1, 0, 6, 2, 2])
    return Example((draw(6, 4), draw(7, 4), labels, 0.1, 2), 2, lambda both: both[0])


def rotation() -> Example:
    """Angles are not learned."""
    angles = draw(5, 2)
    return Example((draw(2, 3, 5, 6), jnp.cos(angles), jnp.sin(angles)), 1)


def deferred() -> Example:
    """The weight's gradient is left in the sink, for the pipeline, whose tests cover it."""
    sink = (jnp.zeros((2, 5, 3)), jnp.zeros((2, 5, 4)))
    return Example((draw(2, 5, 3), draw(3, 4), sink), 1)


def rounded() -> Example:
    """By its input. tests/test_float8.py has the gradient of the weight, which its shard gets."""
    array, scale = float8.round_all(draw(3, 4), float8.E4M3)
    w = float8.Quantized(array, scale.reshape(1, 1), draw(3, 4), None, 'reduce_scatter')
    return Example((draw(2, 5, 3), w), 1, rounding=2**-3)


def gathered() -> Example:
    """On one device: what moves between several, tests/test_parity.py covers."""
    return Example((draw(4, 3), 'fsdp', 0), 1)


def lower() -> Example:
    """The inverse of a triangular matrix of odd size."""
    return Example((jnp.tril(draw(2, 5, 5), -1),), 1, lambda x: jnp.tril(x, -1))


def linear_attention() -> Example:
    """Two blocks of two chunks, a document that begins in the second, and one channel's decays."""
    config = small_config()
    config.model.update(attention='kda', attention_block=4, delta_heads=2, delta_conv=2)
    config.model.update(d_model=3, delta_key_dim=3, delta_value_dim=2)
    cfg = cpu_model(config)
    declared = delta_attention.delta_params(cfg)
    shapes = {name: p.shape for name, p in declared.items()}
    w = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    carry, since = (draw(2, 2, 3, 2, seed=20), draw(2, 1, 3, seed=21)), jnp.arange(8) + 3
    since = jnp.stack((since, jnp.arange(8) - 5 * (jnp.arange(8) >= 5)))
    return Example((w, carry, draw(2, 8, 3), since, cfg, True), 3, lambda results: results[1])


EXAMPLES: dict[str, Callable[[], Example]] = {
    'layers.delta_attention.stream': linear_attention,
    'layers.delta_rule.inverse': lower,
    'layers.rope._rotate': rotation,
    'layers.blockwise.causal_attention': attention,
    'layers.context_parallel.ring_attention': ring,
    'layers.dense._deferred_matmul': deferred,
    'layers.dense._matmul': lambda: Example((draw(2, 5, 3), draw(3, 2, 4)), 2),
    'layers.dense.clipped': lambda: Example((3 * draw(4, 5), -1.0, 2.0), 1),
    'layers.dense.gated': lambda: Example((3 * draw(4, 5), draw(4, 5, seed=1), 0.0), 2),
    'layers.dense.rms_norm': lambda: Example((draw(2, 3, 5), draw(5, seed=1), 0.1), 2),
    'layers.expert_kernels.grouped_swiglu': experts,
    'layers.float8.matmul': rounded,
    'layers.moe.combine': lambda: Example((draw(4, 3, 5), draw(4, 3, seed=1)), 2),
    'layers.moe.permute': moved_rows,
    'layers.cross_entropy.cross_entropy': vocabulary,
    'parallel.gather_to_exchange': gathered,
}
# Kernels, which autodiff does not pass through: their own tests compare them with the formula.
KERNELS = ['layers.latent_kernel.latent_attention']


def sources() -> list[pathlib.Path]:
    """Lists the files of the project's modules: those on top, and those of its packages."""
    folders = [ROOT, *(file.parent for file in ROOT.glob('*/__init__.py'))]
    return [file for folder in folders for file in sorted(folder.glob('*.py'))]


def uses(file: pathlib.Path) -> int:
    """Counts the places of a file that name custom_vjp or custom_jvp."""
    found = 0
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
        names.append(getattr(node, 'attr', getattr(node, 'id', None)))
        found += sum(name in CUSTOM for name in names)
    return found


def hand_written() -> dict[str, Callable]:
    """Finds the functions with a derivative of their own: {'layers.dense.gated': gated, ...}."""
    found, kinds = {}, tuple(getattr(jax, name) for name in CUSTOM)
    for file in sources():
        if not (expected := uses(file)):
            continue
        name = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
        here = {
            f'{name}.{attribute}': f
            for attribute, f in vars(importlib.import_module(name)).items()
            if isinstance(f, kinds) and f.__module__ == name
        }
        assert len(here) == expected, (
            f'{file.name} makes a derivative of its own in {expected} places, and {list(here)} are '
            f'found: give each a name of the module, so that this test finds it'
        )
        found |= here
    return found


def without_derivatives(monkeypatch, functions: dict[str, Callable]) -> None:
    """Replaces the functions by the plain ones that they were made of, in all modules."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, '__dict__', {}).items()):
            if any(value is f for f in functions.values()):
                monkeypatch.setattr(module, name, value.__wrapped__)
    # jax has no derivative of the largest over devices; on one device that is the number itself
    monkeypatch.setattr(layers.cross_entropy, 'pmax', lambda x, axis: x)


def test_every_hand_written_derivative_has_an_example():
    assert sorted(hand_written()) == sorted([*EXAMPLES, *KERNELS])


@pytest.mark.parametrize('name', EXAMPLES)
def test_derivative_is_that_of_the_function(name, monkeypatch):
    """Compares with forward-mode autodiff, which loops of unknown length have too."""
    functions, example = hand_written(), EXAMPLES[name]()
    inputs, rest = example.args[: example.inputs], example.args[example.inputs :]
    others = [x for x in rest if isinstance(jax.tree.leaves(x)[0], jax.Array)]
    constants = rest[len(others) :]

    def of_inputs(f: Callable) -> Callable:
        """Returns f of its inputs, on one device."""
        run = on_one_device(lambda *arrays: example.of(f(*arrays, *constants)))
        return lambda *inputs: run(*inputs, *others)

    result, pull = jax.vjp(of_inputs(functions[name]), *inputs)
    cotangent = draw(*result.shape, seed=9)
    got = pull(cotangent)

    without_derivatives(monkeypatch, functions)
    plain = of_inputs(functions[name].__wrapped__)
    np.testing.assert_allclose(result, plain(*inputs), rtol=1e-6, atol=1e-6)

    def along(*inputs: Tree) -> Array:
        return jnp.vdot(cotangent, plain(*inputs))

    want = jax.jit(jax.jacfwd(along, argnums=tuple(range(len(inputs)))))(*inputs)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(y) > 0.1
        if example.rounding:
            assert np.linalg.norm(x - y) < example.rounding * np.linalg.norm(y)
        else:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
