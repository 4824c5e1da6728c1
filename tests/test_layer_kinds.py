"""Kinds of layers that model.block names: each against plain NumPy, the edge of a window, what a
window saves, and the rules.

Their parity is in test_parity.py, their decoding in test_decoding.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, small_config
from ml_collections import ConfigDict

from config import ConfigError, ModelConfig, first_kind, layer_kind, of_layer
from layers import kernels
from layers.attention import ATTENTION, attention_sizes, positions, rope_table
from layers.attention_kernels import (
    ATTENTION_KERNELS,
    cudnn_attention,
    splash_attention,
)
from layers.blockwise import causal_attention, pairs_of_blocks
from layers.context_parallel import ring_pairs
from layers.mask import cache_size, cached_positions
from model import (
    attention_of,
    flops_per_token,
    keys_seen,
    layer,
    layer_params,
    model_for,
    model_params,
    position_tables,
)
from parallel import Param, Tree, map_params
from runtime.config_checks import validate

# ---------------------------------------------------------------------------------------------
# Against NumPy
# ---------------------------------------------------------------------------------------------

T, EPS = 16, 1e-6


def kind_config(kind: str, **model) -> ConfigDict:
    """Returns a small config whose layers are all of this kind."""
    config = small_config(layer_kind(kind).attention or 'mla')
    config.model.update(block=(kind,), n_heads=4, n_kv_heads=2, qk_norm=False)
    config.model.update(model)
    return config


def drawn(declared: Tree) -> Tree:
    """Draws all leaves, gains, biases and sinks too."""
    rng = np.random.default_rng(0)

    def leaf(p: Param) -> np.ndarray:
        inputs = np.prod(p.shape[: p.inputs or 1]) if p.matrix else 4
        return (rng.standard_normal(p.shape) / np.sqrt(inputs)).astype(np.float32)

    return map_params(leaf, declared)


def norm(x: np.ndarray, gain: np.ndarray, axes: tuple[int, ...] = (-1,)) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + EPS) * gain


def rotated(x_BTNH: np.ndarray, rotary: int, base: float) -> np.ndarray:
    """Rotates the last numbers of heads, as complex ones."""
    if not rotary:
        return x_BTNH
    half, first = rotary // 2, x_BTNH.shape[-1] - rotary
    turn = np.exp(1j * np.arange(T)[:, None] * base ** (-np.arange(half) / half))
    pairs = x_BTNH[..., first : first + half] + 1j * x_BTNH[..., first + half :]
    pairs = pairs * turn[:, None]
    return np.concatenate((x_BTNH[..., :first], pairs.real, pairs.imag), axis=-1)


def numpy_layer(w: Tree, x: np.ndarray, cfg: ModelConfig, window: int, rotary: int) -> np.ndarray:
    """Computes a layer's attention query by query, in float64. x: [B, T, D]."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in w.items()}
    project = functools.partial(np.einsum, 'btd,dnh->btnh')
    if cfg.attention == 'gqa':
        q, k, v = (project(x, w[f'w_{c}']) + w.get(f'b_{c}', 0) for c in 'qkv')
        if cfg.qk_norm:
            axes = (-1,) if cfg.qk_norm_over == 'head' else (-2, -1)
            q, k = norm(q, w['q_norm'], axes), norm(k, w['k_norm'], axes)
        q, k = rotated(q, rotary, cfg.rope_base), rotated(k, rotary, cfg.rope_base)
    else:
        latent = x @ w['w_kv_down']
        latent, shared = latent[..., : cfg.kv_rank], latent[..., cfg.kv_rank :]
        latent = norm(latent, w['kv_norm'])
        if cfg.q_rank:
            q = project(norm(x @ w['w_q_down'], w['q_norm']), w['w_q_up'])
        else:
            q = project(x, w['w_q'])
        q = rotated(q, rotary, cfg.rope_base)
        shared = rotated(shared[:, :, None], rotary, cfg.rope_base)
        k = project(latent, w['w_k_up'])
        k = np.concatenate((k, np.broadcast_to(shared, (*k.shape[:3], shared.shape[-1]))), -1)
        v = project(latent, w['w_v_up'])
    groups, out = q.shape[2] // k.shape[2], np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = range(max(0, t - window + 1) if window else 0, t + 1)
        p = np.exp([q[b, t, n] @ k[b, s, n // groups] / np.sqrt(q.shape[-1]) for s in seen])
        total = p.sum() + (np.exp(w['sinks'][n]) if 'sinks' in w else 0)
        out[b, t, n] = (
            sum(p_s * v[b, s, n // groups] for p_s, s in zip(p, seen, strict=True)) / total
        )
    if 'w_gate' in w:
        out /= 1 + np.exp(-project(x, w['w_gate']))
    return np.einsum('btnh,nhd->btd', out, w['w_o']) + w.get('b_o', 0)


EVERYTHING = {'window': 5, 'attention_sinks': True, 'attention_gate': True}
OF_GQA = {'qk_norm': True, 'qk_norm_over': 'heads', 'attention_bias': 'qkvo', 'rotary_dim': 4}


@pytest.mark.parametrize(
    ('kind', 'model', 'rotary'),
    [
        ('gqa+dense', {}, 8),
        ('gqa_nope+dense', {}, 0),
        ('gqa_window+dense', {'window': 5}, 8),
        ('gqa+dense', {'attention_sinks': True}, 8),
        ('gqa+dense', {'attention_gate': True}, 8),
        ('gqa+dense', {'attention_bias': 'qkv'}, 8),
        ('gqa+dense', {'rotary_dim': 4}, 4),
        ('gqa+dense', {'qk_norm': True, 'qk_norm_over': 'heads'}, 8),
        ('gqa+dense', {'qk_norm': True, 'qk_norm_over': 'heads', 'n_kv_heads': 1}, 8),
        ('gqa_window+dense', EVERYTHING | OF_GQA, 4),
        ('gqa_window_nope+dense', EVERYTHING | OF_GQA, 0),
        ('mla+dense', {}, 4),
        ('mla_nope+dense', {}, 0),
        ('mla_window+dense', EVERYTHING, 4),
        ('mla_window_nope+dense', EVERYTHING | {'q_rank': 0}, 0),
    ],
    ids=str,
)
def test_layers_are_those_of_plain_numpy(kind, model, rotary):
    config = kind_config(kind, **model)
    validate(config, 1)
    cfg = of_layer(cpu_model(config), kind)
    assert attention_sizes(cfg).rotary == rotary
    attention = ATTENTION[cfg.attention]
    params = drawn(attention.params(cfg))
    x = np.random.default_rng(1).standard_normal((2, T, cfg.d_model)).astype(np.float32)

    def forward(params: Tree, x: jax.Array) -> jax.Array:
        return attention.forward(params, x, positions(jnp.zeros((2, T), jnp.int32), cfg), cfg)[0]

    got = np.asarray(on_one_device(forward)(params, x))
    want = numpy_layer(params, x.astype(np.float64), cfg, cfg.window, rotary)
    assert np.abs(want).mean() > 0.03
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize('norms', ['before', 'after'])
def test_norms_stand_before_or_after_each_part(norms):
    """The layer written out, with both parts taken from the model."""
    cfg = cpu_model(kind_config('gqa+dense', norms=norms))
    kind, params = 'gqa+dense', drawn(layer_params(cfg, 'gqa+dense'))
    x = np.random.default_rng(2).standard_normal((2, T, cfg.d_model)).astype(np.float32)

    def run(params: Tree, x: jax.Array) -> jax.Array:
        tables = position_tables(jnp.zeros((2, T), jnp.int32), cfg)
        attend = attention_of(cfg, kind, tables)
        return layer(params, x, attend, jax.random.key(0), cfg, kind)[0]

    got = np.asarray(on_one_device(run)(params, x))
    w, x = jax.tree.map(lambda x: x.astype(np.float64), (params, x))

    def feed_forward(h: np.ndarray) -> np.ndarray:
        gate, up = h @ w['ffn']['w_gate'], h @ w['ffn']['w_up']
        return gate / (1 + np.exp(-gate)) * up @ w['ffn']['w_down']

    attend = functools.partial(numpy_layer, w['attention'], cfg=cfg, window=0, rotary=8)
    for f, gain in ((attend, w['attention_norm']), (feed_forward, w['ffn_norm'])):
        x = x + (f(norm(x, gain)) if norms == 'before' else norm(f(x), gain))
    np.testing.assert_allclose(got, x, rtol=2e-4, atol=2e-4 * np.abs(x).max())


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


def layer_of(block: int, window: int) -> ModelConfig:
    config = small_config('gqa')
    return dataclasses.replace(cpu_model(config), attention_block=block, window=window)


def plain_attention(q, k, v, sinks, documents, window, scale):
    """Softmax over all keys and the sink, at whose column nothing is added."""
    T = q.shape[-2]
    distance = np.arange(T)[:, None] - np.arange(T)
    seen = (distance >= 0) & (distance < window)
    if documents is not None:
        seen = (seen & (documents[:, :, None] == documents[:, None, :]))[:, None, None]
    scores = jnp.where(seen, jnp.einsum('bkgth,bksh->bkgts', q, k) * scale, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks[None, :, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate((scores, column), axis=-1)
    p = jax.nn.softmax(scores)[..., :T]
    return jnp.einsum('bkgts,bksh->bkgth', p, v)


def compare(attend, T: int, window: int, sinks: bool, packed: bool) -> None:
    """Compares output and all gradients, those of the sinks too."""
    documents = np.sort(np.random.default_rng(0).integers(0, 3, (1, T))) if packed else None
    keys = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(keys[0], (1, 2, 2, T, 24))
    k = 3 * jax.random.normal(keys[1], (1, 2, T, 24))
    v = jax.random.normal(keys[2], (1, 2, T, 16))
    d_out = jax.random.normal(keys[3], (1, 2, 2, T, 16))
    of_sinks = jnp.array([[1.0, -2.0], [3.0, 0.5]]) if sinks else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *arrays):
        out, vjp = jax.vjp(f, *arrays)
        return out, *vjp(d_out)

    arrays = (q, k, v, of_sinks) if sinks else (q, k, v)
    got = run(lambda q, k, v, s=None: attend(q, k, v, documents, 0.2, sinks_kG=s), *arrays)
    want = run(lambda q, k, v, s=None: plain_attention(q, k, v, s, documents, window, 0.2), *arrays)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize('packed', [False, True], ids=['one_document', 'packed'])
@pytest.mark.parametrize(
    ('block', 'window'),
    [
        (4, 6),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(4, 1), (8, 9), (2, 32)]),
    ],
)
def test_blockwise_has_windows_and_sinks(block, window, packed):
    attend = functools.partial(causal_attention, cfg=layer_of(block, window))
    compare(attend, 32, window, True, packed)


@pytest.mark.parametrize(
    ('kernel', 'window', 'sinks', 'packed'),
    [
        pytest.param('splash', 100, True, False, marks=pytest.mark.slow),
        ('splash', 257, True, True),
        ('cudnn', 100, False, False),
        pytest.param('cudnn', 257, False, True, marks=pytest.mark.slow),
    ],
)
def test_kernels_have_windows_and_sinks(kernel, window, sinks, packed):
    """cuDNN itself needs its GPU: here its arguments go through the plain XLA implementation."""
    attend = {
        'splash': functools.partial(splash_attention, interpret=True),
        'cudnn': functools.partial(cudnn_attention, implementation='xla'),
    }[kernel]
    compare(functools.partial(attend, cfg=layer_of(128, window)), 512, window, sinks, packed)


def test_kernels_refuse_what_they_cannot():
    config = kind_config('gqa_window+dense', window=127, attention_sinks=True)
    config.model.attention_block = config.seq_len = 128
    config.update({'check_vma': False, 'compute_dtype': 'bfloat16'})
    assert not list(ATTENTION_KERNELS['splash'].rules(config, 128))
    (error,) = ATTENTION_KERNELS['cudnn'].rules(config, 128)
    assert "'cudnn' has no sinks" in error
    choose = functools.partial(kernels.choose, ATTENTION_KERNELS, 'auto', [(config, 128)])
    assert (choose('tpu'), choose('gpu')) == ('splash', 'blockwise')
    config.model.attention_sinks = False
    assert choose('gpu') == 'cudnn'


# ---------------------------------------------------------------------------------------------
# Windows: their edge, and what they save
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['mla_window+dense', 'gqa_window_nope+dense'])
def test_the_edge_of_a_window_is_exact(kind):
    """A token at distance window - 1 changes a query's output, one at distance window not one
    bit."""
    cfg = of_layer(cpu_model(kind_config(kind, window=5, attention_block=4)), kind)
    params, x = drawn(ATTENTION[cfg.attention].params(cfg)), np.ones((1, T, cfg.d_model), 'f')

    def forward(x: jax.Array) -> jax.Array:
        table = positions(jnp.zeros((1, T), jnp.int32), cfg)
        return ATTENTION[cfg.attention].forward(params, x, table, cfg)[0]

    run, other = on_one_device(forward), x.copy()
    other[0, 3, ::2] += 1
    same = (np.asarray(run(x)) == np.asarray(run(other))).all(axis=-1)[0]
    assert same.tolist() == [not 3 <= t < 3 + 5 for t in range(T)]


def seen_pairs(T: int, block: int, window: int) -> set[tuple[int, int]]:
    """Pairs of blocks that hold a visible pair of positions, found one by one."""
    t = np.arange(T)
    seen = (t[:, None] >= t) & (t[:, None] - t < window)
    return {(int(i) // block, int(j) // block) for i, j in np.argwhere(seen)}


@pytest.mark.parametrize(('block', 'window'), [(4, 1), (4, 5), (4, 6), (2, 7), (8, 64)])
def test_only_blocks_within_a_window_are_computed(block, window):
    _, pairs = pairs_of_blocks(64, 64, layer_of(block, window))
    assert {(i, j) for _, _, i, j in pairs.tolist()} == seen_pairs(64, block, window)


@pytest.mark.parametrize('window', [1, 2, 5, 9, 40])
@pytest.mark.parametrize('cp', [1, 2, 4])
def test_rings_compute_only_blocks_within_a_window(cp, window):
    _, own, others = ring_pairs(64 // cp, cp, layer_of(2, window))
    pairs = [*own.reshape(-1, 4).tolist(), *others.reshape(-1, 4).tolist()]
    real = [(i, j) for here, _, i, j in pairs if here >= 0]
    assert len(real) == len(set(real))
    assert set(real) == seen_pairs(64, 2, window)


def test_the_work_of_a_window_grows_with_it_not_with_the_sequence():
    of_window, of_all = layer_of(64, 128), layer_of(64, 0)
    lengths = [len(pairs_of_blocks(T, T, of_window)[1]) for T in (1024, 2048, 4096)]
    assert lengths[2] - lengths[1] == 2 * (lengths[1] - lengths[0]) == 32 * 3
    assert lengths[2] < len(pairs_of_blocks(4096, 4096, of_all)[1]) / 10


@pytest.mark.parametrize('window', [0, 1, 5, 16, 99])
def test_keys_seen_are_those_of_the_mask(window):
    """But for half a key a query, as half of T² leaves out half of the diagonal."""
    cfg = layer_of(4, window)
    t = np.arange(T)
    distance = t[:, None] - t
    pairs = np.sum((distance >= 0) & (distance < (window or T)))
    seen = min(window or T, T)
    assert keys_seen(cfg, T) == pytest.approx(pairs / T - seen / (2 * T))


def test_flops_count_each_layer_by_its_kind():
    config = kind_config('gqa+dense', block=('gqa_window+dense', 'mla_nope+dense'), n_layers=2)
    config.model.window = 4
    cfg = cpu_model(config)
    by_length = flops_per_token(cfg, 200) - flops_per_token(cfg, 100)
    of_window, of_mla = (of_layer(cfg, kind) for kind in cfg.block)
    heads = attention_sizes(of_mla)
    assert heads.key == cfg.nope_dim
    grown = 4 * (heads.key + heads.value) * 50 + 4 * 16 * (4**2 / 200 - 4**2 / 400)
    assert keys_seen(of_window, 100) == 4 - 16 / 200
    assert by_length == pytest.approx(6 * grown)


def test_a_window_layer_caches_its_window():
    cfg = layer_of(4, 5)
    assert (cache_size(32, cfg), cache_size(3, cfg), cache_size(32, layer_of(4, 0))) == (5, 3, 32)
    held = np.asarray(cached_positions(jnp.array([0, 3, 5, 6, 12]), 5))
    assert held[1].tolist() == [0, 1, 2, -2, -1]
    assert held[2].tolist() == [0, 1, 2, 3, 4]
    assert held[3].tolist() == [5, 1, 2, 3, 4]
    assert held[4].tolist() == [10, 11, 7, 8, 9]
    assert (held[0] < 0).all()


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


def test_entries_of_a_block_name_both_parts():
    assert layer_kind('moe') == ('', False, False, 'moe')
    assert layer_kind('mla_nope+moe') == ('mla', False, True, 'moe')
    assert layer_kind('gqa_window+dense') == ('gqa', True, False, 'dense')
    assert layer_kind('gqa_window_nope+moe') == ('gqa', True, True, 'moe')
    assert first_kind(('dense', 'moe')) == 'dense'
    assert first_kind(('gqa_window+moe', 'dense')) == 'gqa_window+dense'


def test_short_names_mean_the_models_attention():
    """The same shapes by either name; without a rotary part they are smaller."""
    short, long = (cpu_model(kind_config('mla+dense', block=(b,))) for b in ('dense', 'mla+dense'))
    a, b = (model_params(cfg)['blocks'] for cfg in (short, long))
    assert jax.tree.leaves(a['0_dense']) != []
    assert [p.shape for p in jax.tree.leaves(a)] == [p.shape for p in jax.tree.leaves(b)]
    nope = model_params(cpu_model(kind_config('mla_nope+dense')))['blocks']['0_mla_nope+dense']
    assert nope['attention']['w_kv_down'].shape == (4, 32, 16)
    assert nope['attention']['w_q_up'].shape == (4, 16, 4, 4)


def test_layers_before_the_blocks_have_the_attention_of_the_first():
    config = kind_config('gqa_nope+moe', first_dense=1, n_layers=3, attention='mla')
    params = model_params(cpu_model(config))
    assert list(params['first']) == ['0_gqa_nope+dense']
    assert 'w_k' in params['first']['0_gqa_nope+dense']['attention']


def test_layers_without_a_rotary_part_feel_no_position():
    for kind in ('mla_nope+dense', 'gqa_nope+dense'):
        cfg = of_layer(cpu_model(kind_config(kind)), kind)
        table = rope_table(cfg, jnp.arange(T))
        assert table.cos.shape == (T, 0)


@pytest.mark.parametrize(
    ('kind', 'model', 'message'),
    [
        ('gqa_nope_window+dense', {}, "unknown kind 'gqa_nope_window.dense'"),
        ('mqa+dense', {}, "unknown kind 'mqa.dense'"),
        ('+dense', {}, "unknown kind '.dense'"),
        ('gqa+sparse', {}, "unknown kind 'gqa.sparse'"),
        ('gqa_window+dense', {}, 'layers with a window, and model.window=0'),
        ('gqa+dense', {'window': 4}, 'model.window=4 is for layers that end in _window'),
        ('mla+dense', {'attention_bias': 'qkv'}, "use 'none', or 'gqa' in every layer"),
        ('mla+dense', {'rotary_dim': 4}, "model.rotary_dim=4 is for 'gqa'"),
        ('mla+dense', {'qk_norm_over': 'heads'}, "model.qk_norm_over='heads' is for 'gqa'"),
        ('gqa+dense', {'latent_norm_eps': 0.1}, "model.latent_norm_eps=0.1 is for 'mla'"),
        ('gqa+dense', {'expert_bias': True}, "model.expert_bias=True is for 'moe'"),
        ('gqa+dense', {'qk_norm_over': 'heads'}, 'model.qk_norm=False; use True'),
        ('gqa+dense', {'rotary_dim': 10}, 'model.rotary_dim=10 is above model.head_dim=8'),
        ('gqa+dense', {'rotary_dim': 3}, 'model.rotary_dim=3 is odd'),
        ('gqa+dense', {'norms': 'between'}, "model.norms='between' is unknown"),
        ('gqa+dense', {'attention_bias': 'q'}, "model.attention_bias='q' is unknown"),
        ('gqa+dense', {'window': -1}, 'model.window=-1 is out of range'),
    ],
    ids=str,
)
def test_rules(kind, model, message):
    with pytest.raises(ConfigError, match=message):
        validate(kind_config('gqa+dense', block=(kind,), **model), 8)


def test_the_setup_of_a_kind_has_the_kernel_of_all_its_layers():
    """cuDNN takes gqa's heads of 64 on any GPU, and not mla's of 192."""
    config = kind_config('gqa+dense', head_dim=64, nope_dim=128, rope_dim=64)
    config.update({'check_vma': False, 'compute_dtype': 'bfloat16'})
    for block, kernel in (
        (('gqa+dense', 'gqa_nope+dense'), 'cudnn'),
        (('gqa+dense', 'mla+dense'), 'blockwise'),
    ):
        config.model.block = block
        assert model_for(config, 'gpu').attention_kernel == kernel
