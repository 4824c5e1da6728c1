"""Linear attention by the gated delta rule against a loop over tokens, and against other projects.

Its parity on meshes is in test_parity.py, its decoding in test_decoding.py.
"""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, small_config
from ml_collections import ConfigDict

from config import ConfigError, ModelConfig, of_layer
from layers.attention import ATTENTION, positions
from layers.delta_attention import before_parts
from layers.delta_rule import delta_rule, inverse
from model import flops_per_token
from parallel import CP, Array, P, Param, Tree, make_mesh, map_params, zigzag
from runtime.config_checks import validate

T = 32
SIZES = {
    'delta_heads': 4, 'delta_key_heads': 2, 'delta_key_dim': 8, 'delta_value_dim': 12,
    'attention_block': 16, 'document_end': 3,
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
    """Draws all leaves, gains too."""
    keys = iter(jax.random.split(jax.random.key(0), 99))

    def leaf(p: Param) -> Array:
        x = p.init(next(keys), p.shape)
        return x + 0.3 * jax.random.normal(next(keys), p.shape) if not p.matrix else x

    return map_params(leaf, declared)


def run_layer(cfg: ModelConfig, ids: np.ndarray) -> Callable[[Tree, Array], Array]:
    """Returns (parameters, input) -> output of a layer on one device, for these tokens."""

    def layer(params: Tree, x: Array) -> Array:
        table = positions(jnp.asarray(ids), cfg)
        return ATTENTION[cfg.attention].forward(params, x, table, cfg)[0]

    return on_one_device(layer)


# ---------------------------------------------------------------------------------------------
# A loop over tokens
# ---------------------------------------------------------------------------------------------


def by_tokens(w: Tree, x_TD: Array, starts: list[int], cfg: ModelConfig) -> Array:
    """Computes a layer token by token as the papers write it, for one row whose documents begin at
    these positions."""
    N, K = cfg.delta_heads, cfg.delta_key_heads or cfg.delta_heads
    project = functools.partial(jnp.einsum, 'td,dnh->tnh', precision='highest')
    product = functools.partial(jnp.matmul, precision='highest')

    firsts = np.array([max(s for s in starts if s <= t) for t in range(len(x_TD))])

    def conv(name: str) -> Array:
        h, taps = project(x_TD, w[f'w_{name}']), w[f'conv_{name}']
        out = 0.0
        for back, weight in enumerate(taps[::-1]):
            t = np.arange(len(h)) - back
            out += jnp.where((t >= firsts)[:, None, None], h[np.maximum(t, 0)] * weight, 0)
        return jax.nn.silu(out)

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
    q, k = (jnp.repeat(x, N // K, axis=1) for x in (q, k))

    def token(state: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, beta, kept, first = at
        state = jnp.where(first, 0, state * kept[..., None])
        read = jnp.sum(state * k[..., None], axis=1)
        state = state + k[..., None] * (beta[:, None] * (v - read))[:, None]
        return state, jnp.sum(state * q[..., None], axis=1)

    zeros = jnp.zeros((N, cfg.delta_key_dim, cfg.delta_value_dim))
    first = firsts == np.arange(len(x_TD))
    _, out = jax.lax.scan(token, zeros, (q, k, v, beta, kept, first))
    out = out / jnp.sqrt(jnp.mean(out**2, -1, keepdims=True) + cfg.norm_eps) * w['out_norm'] * gate
    return jnp.einsum('tnh,nhd->td', out, w['w_o'], precision='highest')


def rows_of(cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Returns ids of two rows, inputs, and the positions at which their documents begin."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 64, (2, T)).astype(np.int32)
    ids[1, [0, 6, 7, 16, 25]] = cfg.document_end
    x = rng.standard_normal((2, T, cfg.d_model)).astype(np.float32)
    return ids, x, [[0], [0, 1, 7, 8, 17, 26]]


@pytest.mark.parametrize(
    ('kind', 'model'),
    [
        ('gdn', {}),
        ('kda', {}),
        pytest.param('gdn', {'delta_key_heads': 0, 'delta_conv': 1}, marks=pytest.mark.slow),
        pytest.param('kda', {'attention_block': 32, 'delta_conv': 6}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_are_those_of_a_loop_over_tokens(kind, model):
    """Values, and the gradient of each leaf and of the input, of two rows of several documents."""
    cfg = layer_config(kind, **model)
    params = drawn(ATTENTION[kind].params(cfg))
    ids, x, starts = rows_of(cfg)
    d_out = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loop(params: Tree, x: Array) -> Array:
        rows = zip(x, starts, strict=True)
        return jnp.stack([by_tokens(params, row, at, cfg) for row, at in rows])

    got, want = (with_gradients(f, params, x, d_out) for f in (run_layer(cfg, ids), loop))
    assert jnp.std(want[0]) > 0.1
    compare(got, want, 1e-5)


def with_gradients(f: Callable, params: Tree, x: Array, d_out: Array) -> tuple[Array, Tree, Array]:
    """Returns f(parameters, input) and both gradients."""

    @jax.jit
    def run(params: Tree, x: Array, d_out: Array) -> tuple[Array, Tree, Array]:
        out, pull = jax.vjp(f, params, x)
        return out, *pull(d_out)

    return run(params, x, d_out)


def compare(got: Tree, want: Tree, tolerance: float) -> None:
    """Compares each leaf by the relative error of its norm."""
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, a), b in zip(leaves, jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f'{jax.tree_util.keystr(path)}: {error:.1e}'


# ---------------------------------------------------------------------------------------------
# Other projects
# ---------------------------------------------------------------------------------------------

GOLDEN = pathlib.Path(__file__).with_name('golden') / 'delta.npz'


def of_qwen(w: dict[str, np.ndarray], K: int, N: int, H: int) -> Tree:
    """Returns the leaves of Qwen3-Next's layer, whose rows are grouped by heads of keys."""
    D, G = w['out_proj.weight'].shape[0], N // K
    rows = w['in_proj_qkvz.weight'].reshape(K, -1, D)
    q, k, v, gate = np.split(rows, np.cumsum([H, H, G * H]), axis=1)
    beta, step = np.split(w['in_proj_ba.weight'].reshape(K, 2 * G, D), 2, axis=1)
    heads = {'w_q': q, 'w_k': k, 'w_v': v.reshape(N, H, D), 'w_gate': gate.reshape(N, H, D)}
    return convolutions(w['conv1d.weight'], K, H) | {
        **{name: x.transpose(2, 0, 1) for name, x in heads.items()},
        'w_beta': beta.reshape(N, D).T,
        'w_step': step.reshape(N, D).T,
        'log_decay': w['A_log'],
        'step_bias': w['dt_bias'],
        'out_norm': w['norm.weight'],
        'w_o': w['out_proj.weight'].T.reshape(N, H, D),
    }


def of_kimi(w: dict[str, np.ndarray], K: int, N: int, H: int) -> Tree:
    """Returns the leaves of Kimi Linear's layer."""
    D = w['o_proj.weight'].shape[0]
    heads = {
        'w_q': 'q_proj', 'w_k': 'k_proj', 'w_v': 'v_proj', 'w_step_up': 'forget_gate.f_b_proj',
        'w_gate_up': 'g_b_proj',
    }  # fmt: skip
    whole = {
        'w_beta': 'b_proj', 'w_step_down': 'forget_gate.f_a_proj', 'w_gate_down': 'g_a_proj',
    }  # fmt: skip
    return convolutions(w['conv1d.weight'], N, H) | {
        **{a: w[f'{b}.weight'].T.reshape(-1, N, H) for a, b in heads.items()},
        **{a: w[f'{b}.weight'].T for a, b in whole.items()},
        'log_decay': w['forget_gate.A_log'].reshape(N),
        'step_bias': w['forget_gate.dt_bias'].reshape(N, H),
        'out_norm': w['o_norm.weight'],
        'w_o': w['o_proj.weight'].T.reshape(N, H, D),
    }


def convolutions(w: np.ndarray, K: int, H: int) -> Tree:
    parts = np.split(w[:, 0], [K * H, 2 * K * H])
    return {
        f'conv_{c}': x.reshape(-1, H, 4).transpose(2, 0, 1)
        for c, x in zip('qkv', parts, strict=True)
    }


@pytest.mark.parametrize(('kind', 'leaves'), [('gdn', of_qwen), ('kda', of_kimi)])
def test_layers_are_those_of_transformers(kind, leaves):
    """Outputs and all gradients of tests/golden/make_delta.py, by chunks of 6 and of 24 tokens."""
    golden = np.load(GOLDEN)
    found = {n.removeprefix(f'{kind}.'): golden[n] for n in golden if n.startswith(kind)}
    heads = (2 if kind == 'gdn' else 4, 4, 4)
    w, d = (
        leaves({n[2:]: x for n, x in found.items() if n.startswith(p)}, *heads)
        for p in ('w.', 'd.')
    )
    for block in (6, 24):
        cfg = layer_config(
            kind, d_model=8, delta_key_heads=heads[0], delta_key_dim=4, delta_value_dim=4,
            attention_block=block, norm_eps=1e-5,
        )  # fmt: skip
        ids = np.full((1, 24), 9, np.int32)
        got = with_gradients(run_layer(cfg, ids), w, found['x'], found['d_out'])
        compare(got, (found['out'], d, found['d_x']), 1e-5)


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['gdn', 'kda'])
def test_documents_are_as_if_alone(kind):
    """Packed as alone to float32's accuracy, since chunks cut them elsewhere; and no bit of one
    depends on another."""
    cfg = layer_config(kind)
    params = drawn(ATTENTION[kind].params(cfg))
    ids, x, starts = rows_of(cfg)
    packed = np.asarray(run_layer(cfg, ids)(params, x))
    spans = list(zip(starts[1], [*starts[1][1:], T], strict=True))
    alone, ids_alone = np.zeros((len(spans), *x.shape[1:]), np.float32), np.full((len(spans), T), 9)
    for row, (first, end) in zip(alone, spans, strict=True):
        row[: end - first] = x[1, first:end]
    got = np.asarray(run_layer(cfg, ids_alone)(params, alone))
    for row, (first, end) in zip(got, spans, strict=True):
        assert np.abs(row[: end - first] - packed[1, first:end]).max() < 1e-5 * np.abs(packed).max()
    for first, end in spans:
        other = x.copy()
        other[1, first:end] *= -3
        after = np.asarray(run_layer(cfg, ids)(params, other))
        changed = (after != packed).any(axis=-1)
        assert changed[1, first:end].all()
        assert not changed[0].any()
        assert not np.delete(changed[1], range(first, end)).any()


# ---------------------------------------------------------------------------------------------
# Numbers that are hard
# ---------------------------------------------------------------------------------------------


def test_the_inverse_is_exact_where_keys_repeat():
    """All keys alike, β = 1, no decay: powers of the matrix would reach 10^17."""
    a = np.tril(np.ones((64, 64), np.float32), -1)
    want = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(inverse(jnp.asarray(a)), want)


@pytest.mark.parametrize('width', [1, 8])
def test_any_decay_is_finite(width):
    """From none to all of the state in a token, in turns, for values and gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, 2, 64, 8)) / 3 for key in keys)
    g = jnp.where(jnp.arange(64)[:, None] % 3 == 0, -1e4, -1e-9 * jnp.ones((1, 2, 64, width)))
    since, state = jnp.arange(64)[None] + 5, jnp.ones((1, 2, 8, 8))

    def run(q: Array, k: Array, v: Array, g: Array) -> Array:
        beta = jnp.full((1, 2, 64), 0.7)
        return jnp.sum(delta_rule(q, k, v, g, beta, since, state, jnp.float32)[1] ** 2)

    total, grads = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3)))(q, k, v, g)
    assert total > 1
    assert all(jnp.isfinite(x).all() and jnp.abs(x).max() > 0 for x in grads[:3])
    assert jnp.isfinite(grads[3]).all()


# ---------------------------------------------------------------------------------------------
# Costs, and rules
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['gdn', 'kda'])
def test_work_does_not_grow_with_the_sequence_and_memory_hardly(kind):
    """What backward holds of a position beside its input and output: a state a block."""
    temps, work = [], []
    for T in (1024, 4096):
        config = delta_config(kind, attention_block=256, document_end=-1)
        config.seq_len = T
        cfg = cpu_model(config)
        work.append(flops_per_token(cfg, T))
        own = of_layer(cfg, f'{kind}+dense')
        params = map_params(
            lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), ATTENTION[kind].params(own)
        )
        x = jax.ShapeDtypeStruct((1, T, own.d_model), np.float32)
        layer = run_layer(own, np.zeros((1, T), np.int32))

        def step(params: Tree, x: Array, d: Array, layer=layer) -> Tree:
            out, pull = jax.vjp(layer, params, x)
            return out, pull(d)

        compiled = jax.jit(step).lower(params, x, x).compile()
        temps.append(compiled.memory_analysis().temp_size_in_bytes)
    assert work[0] == work[1]
    state = 4 * 4 * 8 * 12 / 256
    assert (temps[1] - temps[0]) / 3072 < 1.3 * (4 * 4 * own.d_model + state)


@pytest.mark.parametrize(
    ('kind', 'model', 'message'),
    [
        ('gdn_nope', {}, "has gdn_nope, and 'gdn' compares no keys"),
        ('kda_window', {'window': 4}, "has kda_window, and 'kda' compares no keys"),
        ('gdn', {'delta_key_heads': 3}, 'model.delta_heads=4 is not divisible by'),
        ('gdn', {'attention_sinks': True}, 'model.attention_sinks=True is for attention that'),
        ('gdn', {'attention_kernel': 'latent'}, "model.attention_kernel='latent' compares keys"),
        ('gqa', {}, "model.delta_key_heads=2 is for 'gdn' or 'kda', which no layer of"),
        ('kda', {'delta_conv': 0}, 'model.delta_conv=0 is out of range'),
    ],
    ids=str,
)
def test_rules(kind, model, message):
    with pytest.raises(ConfigError, match=message):
        validate(delta_config(kind, **model), 8)


@pytest.mark.parametrize('n', [0, 3, 5])
def test_parts_get_the_positions_before_them(n):
    """No position, and those of up to three parts of two positions, over cp = 4."""
    x = np.arange(1.0, 17, dtype=np.float32)

    def before(x_S: Array) -> Array:
        parts = zigzag(x_S, CP, 0).reshape(2, 1, 2, 1)
        return before_parts(parts, n)[..., 0]

    whole = jax.shard_map(
        before, mesh=make_mesh({CP: 4}), in_specs=P(), out_specs=P(CP), check_vma=False
    )
    padded = np.concatenate((np.zeros(n, np.float32), x))
    order = [part for i in range(4) for part in (i, 7 - i)]  # of devices
    want = np.stack([padded[2 * part : 2 * part + n] for part in order])[:, None]
    np.testing.assert_array_equal(jax.jit(whole)(x), want)


def test_tp_cuts_heads_of_states():
    config = delta_config('gdn')
    config.model.vocab_size, config.mesh.tp = 64, 4
    with pytest.raises(ConfigError, match=r'model.delta_key_heads=2 is not divisible by mesh.tp=4'):
        validate(config, 8)
