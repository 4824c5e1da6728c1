"""Linear attention by the gated delta rule against a loop over tokens, and against other projects.

Its parity on meshes is in test_parity.py, its decoding in test_decoding.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, small_config
from ml_collections import ConfigDict

from config import ModelConfig, of_layer
from layers.attention import ATTENTION, positions
from parallel import Array, Param, Tree, map_params

T = 48
SIZES = {
    'delta_heads': 4, 'delta_key_heads': 2, 'delta_key_dim': 8, 'delta_value_dim': 12,
    'attention_block': 24, 'document_end': 3,
}  # fmt: skip


def delta_config(kind: str, **model) -> ConfigDict:
    """Returns a small config whose layers are all of this kind: two blocks, each of a chunk."""
    config = small_config()
    config.seq_len = T
    config.model.update(block=(f'{kind}+dense',), **(SIZES | model))
    return config


def layer_config(kind: str, **model) -> ModelConfig:
    config = delta_config(kind, **model)
    return of_layer(cpu_model(config), config.model.block[0])


def drawn(declared: Tree) -> Tree:
    """Draws all leaves, gains too; decays as they are initialized, so that some forget at once."""
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def leaf(p: Param) -> Array:
        x = p.init(next(keys), p.shape)
        return (
            x if p.matrix or p.shape[0] <= 4 else x + 0.3 * jax.random.normal(next(keys), p.shape)
        )

    return map_params(leaf, declared)


# ---------------------------------------------------------------------------------------------
# A loop over tokens
# ---------------------------------------------------------------------------------------------


def by_tokens(w: Tree, x_TD: Array, starts: list[int], cfg: ModelConfig) -> Array:
    """Computes a layer token by token as the papers write it, for one row whose documents begin at
    these positions."""
    N, K = cfg.delta_heads, cfg.delta_key_heads or cfg.delta_heads
    project = functools.partial(jnp.einsum, 'td,dnh->tnh', precision='highest')
    product = functools.partial(jnp.matmul, precision='highest')

    def conv(name: str) -> Array:
        h, taps = project(x_TD, w[f'w_{name}']), w[f'conv_{name}']
        rows = []
        for t in range(len(x_TD)):
            first = max(s for s in starts if s <= t)
            seen = range(max(first, t - len(taps) + 1), t + 1)
            rows.append(sum(h[s] * taps[len(taps) - 1 - (t - s)] for s in seen))
        return jax.nn.silu(jnp.stack(rows))

    q, k, v = (conv(name) for name in 'qkv')
    q, k = (x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True) + 1e-6) for x in (q, k))
    q = q / np.sqrt(cfg.delta_key_dim)
    beta = jax.nn.sigmoid(product(x_TD, w['w_beta']))
    if cfg.attention == 'gdn':
        step = jax.nn.softplus(product(x_TD, w['w_step']) + w['step_bias'])[..., None]
        gate = jax.nn.silu(project(x_TD, w['w_gate']))
    else:
        step = project(product(x_TD, w['w_step_down']), w['w_step_up']) + w['step_bias']
        step = jax.nn.softplus(step)
        gate = jax.nn.sigmoid(project(product(x_TD, w['w_gate_down']), w['w_gate_up']))
    kept = jnp.exp(-jnp.exp(w['log_decay'])[:, None] * step)  # [T, N, 1 or key size]
    of_key = np.arange(N) // (N // K)
    out, state = [], None
    for t in range(len(x_TD)):
        if t in starts:
            state = jnp.zeros((N, cfg.delta_key_dim, cfg.delta_value_dim))
        key = k[t, of_key]
        state = state * kept[t][..., None]
        read = jnp.sum(state * key[..., None], axis=1)
        state = state + key[..., None] * (beta[t][:, None] * (v[t] - read))[:, None]
        out.append(jnp.sum(state * q[t, of_key][..., None], axis=1))
    out = jnp.stack(out)
    out = out / jnp.sqrt(jnp.mean(out**2, -1, keepdims=True) + cfg.norm_eps) * w['out_norm'] * gate
    return jnp.einsum('tnh,nhd->td', out, w['w_o'], precision='highest')


def rows_of(cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Returns ids of two rows, inputs, and the positions at which their documents begin."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 64, (2, T)).astype(np.int32)
    ids[1, [0, 6, 7, 24, 39]] = cfg.document_end
    x = rng.standard_normal((2, T, cfg.d_model)).astype(np.float32)
    return ids, x, [[0], [0, 1, 7, 8, 25, 40]]


@pytest.mark.parametrize(
    ('kind', 'model'),
    [
        ('gdn', {}),
        ('kda', {}),
        pytest.param('gdn', {'delta_key_heads': 0, 'delta_conv': 1}, marks=pytest.mark.slow),
        pytest.param('kda', {'attention_block': 48, 'delta_conv': 6}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_are_those_of_a_loop_over_tokens(kind, model):
    """Values, and the gradient of each leaf and of the input, of two rows of several documents."""
    cfg = layer_config(kind, **model)
    params = drawn(ATTENTION[kind].params(cfg))
    ids, x, starts = rows_of(cfg)
    d_out = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def layer(params: Tree, x: Array) -> Array:
        return ATTENTION[kind].forward(params, x, positions(jnp.asarray(ids), cfg), cfg)[0]

    def loop(params: Tree, x: Array) -> Array:
        rows = zip(x, starts, strict=True)
        return jnp.stack([by_tokens(params, row, at, cfg) for row, at in rows])

    got, pull = jax.vjp(on_one_device(layer), params, x)
    want, pull_want = jax.vjp(loop, params, x)
    assert jnp.std(want) > 0.1
    compare((got, *pull(d_out)), (want, *pull_want(d_out)), 1e-5)


def compare(got: Tree, want: Tree, tolerance: float) -> None:
    """Compares each leaf by the relative error of its norm."""
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f'{jax.tree_util.keystr(path)}: {error:.1e}'
