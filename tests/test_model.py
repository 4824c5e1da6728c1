"""Layers against plain formulas, and the properties that a language model must have."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import small_config

import model
from model import (
    causal_attention,
    cross_entropy,
    flops_per_token,
    logits,
    model_params,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
)
from parallel import AXES, P, count, global_sum, init_params, make_mesh, varying
from train import model_config


def on_one_device(f):
    """f, whose arguments and results are varying as within the model, on a mesh of one device."""

    def body(*args):
        args = jax.tree.map(lambda x: varying(x, AXES), args)
        return jax.tree.map(global_sum, f(*args))

    return jax.jit(jax.shard_map(body, mesh=make_mesh({}), in_specs=P(), out_specs=P()))


def plain_attention(q, k, v, scale):
    T = q.shape[-2]
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k) * scale
    scores = jnp.where(np.tril(np.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum('bkgts,bksh->bkgth', jax.nn.softmax(scores), v)


@pytest.mark.parametrize('block', [4, 8, 16, 64])
def test_blockwise_attention_is_softmax_attention(block):
    keys = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(keys[0], (2, 2, 3, 16, 8))
    k = 3 * jax.random.normal(keys[1], (2, 2, 16, 8))
    v = jax.random.normal(keys[2], (2, 2, 16, 5))
    d_out = jax.random.normal(keys[3], (2, 2, 3, 16, 5))
    got, got_vjp = jax.vjp(lambda *x: causal_attention(*x, 0.3, block), q, k, v)
    want, want_vjp = jax.vjp(lambda *x: plain_attention(*x, 0.3), q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_vjp(d_out), want_vjp(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_attention_block_must_divide():
    x = jnp.ones((1, 1, 1, 12, 4))
    with pytest.raises(ValueError, match='attention_block=8'):
        causal_attention(x, x[:, 0], x[:, 0], 1.0, 8)


def test_attention_memory_grows_linearly():
    def temp_bytes(T):
        q = jax.ShapeDtypeStruct((1, 2, 1, T, 16), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, 2, T, 16), jnp.float32)
        f = jax.grad(lambda q, k, v: causal_attention(q, k, v, 1.0, 64).sum(), argnums=(0, 1, 2))
        return jax.jit(f).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(2048) < 2.2 * temp_bytes(1024)


@pytest.mark.parametrize('z_loss', [0.0, 0.1])
def test_cross_entropy_is_the_plain_formula(z_loss):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (24, 8))
    w = jax.random.normal(keys[1], (40, 8))
    labels = jax.random.randint(keys[2], (24,), 0, 40).at[5].set(-1)

    def plain(x, w):
        log_z = jax.nn.logsumexp(x @ w.T, axis=-1)
        nll = log_z - jnp.take_along_axis(x @ w.T, labels[:, None], 1)[:, 0]
        valid = labels >= 0
        return jnp.sum(jnp.where(valid, nll + z_loss * log_z**2, 0)), jnp.sum(nll * valid)

    def ours(x, w):
        return cross_entropy(x, w, labels, z_loss, 7)  # 7 does not divide 24: 6 is used

    got = on_one_device(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(x, w)
    want = jax.value_and_grad(plain, argnums=(0, 1), has_aux=True)(x, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert not np.any(got[1][0][5])


def test_logits_never_exist_at_once():
    config = small_config()
    config.model.vocab_size, config.seq_len = 4096, 128
    cfg = model_config(config)
    params = init_params(jax.random.key(0), model_params(cfg), make_mesh({}))
    tokens = jnp.zeros((8, 129), jnp.int32)

    def temp_bytes(chunk):
        c = dataclasses.replace(cfg, loss_chunk=chunk)
        grad = jax.grad(lambda p, t: model.loss(p, t, c, jax.random.key(0))[0])
        return (
            on_one_device(grad).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes
        )

    all_logits = 8 * 128 * 4096 * 4
    assert temp_bytes(1024) - temp_bytes(128) > all_logits // 2


def test_rms_norm():
    x = jax.random.normal(jax.random.key(0), (3, 7)) * 5
    gain = jnp.arange(7.0)
    want = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(rms_norm(x, gain, 1e-6), want, rtol=1e-5)


@pytest.mark.parametrize('scaling', ['none', 'linear', 'yarn'])
def test_rope_depends_on_relative_position_only(scaling):
    config = small_config('gqa')
    config.model.update(rope_scaling=scaling, rope_factor=4.0, head_dim=16)
    cfg = model_config(config)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 16))

    def score(t, s):
        at = lambda x, p: rope(x, rope_table(cfg, jnp.array([p])))  # noqa: E731
        return float(jnp.sum(at(q, t) * at(k, s)))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_scaling_keeps_fast_and_slows_slow_pairs():
    config = small_config('gqa')
    config.model.update(head_dim=64, rope_factor=8.0, rope_original_len=256)
    plain = rope_frequencies(model_config(config))
    config.model.rope_scaling = 'linear'
    np.testing.assert_allclose(rope_frequencies(model_config(config)), plain / 8)
    config.model.rope_scaling = 'yarn'
    yarn = rope_frequencies(model_config(config))
    assert yarn[0] == plain[0]
    assert yarn[-1] == pytest.approx(plain[-1] / 8)
    assert np.all(np.diff(yarn) < 0)
    assert model.attention_scale(model_config(config)) == pytest.approx(
        (0.1 * math.log(8) + 1) ** 2 / 8
    )


@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_causality_by_gradient(attention):
    """The gradient of position t's logits reaches the embeddings of 0..t, all and only those."""
    cfg = model_config(small_config(attention))
    params = init_params(jax.random.key(0), model_params(cfg), make_mesh({}))
    ids = jnp.arange(16)[None]  # each token once: its embedding row stands for its position

    def row_gradients(w, t):
        def f(w):
            fixed = jax.tree.map(lambda x: varying(x, AXES), params)
            changed = fixed | {'embed': {'w_VD': w}, 'head': fixed['embed']}
            c = dataclasses.replace(cfg, tie_embeddings=False)
            return jnp.sum(jnp.square(logits(changed, ids, c)[0, t]))

        return jnp.abs(jax.grad(f)(w)).sum(axis=1)

    row_gradients = on_one_device(row_gradients)
    for t in (0, 6, 7, 8, 15):  # around the border of a block of 8
        reached = np.asarray(row_gradients(params['embed']['w_VD'], t)) > 0
        assert reached[: t + 1].all()
        assert not reached[t + 1 :].any()


def test_flops_count_the_compilers():
    """The formula against XLA's count for one block, where its loops run once."""
    config = small_config('gqa', tied=True)
    config.model.update(
        vocab_size=512, d_model=128, d_ff=256, head_dim=16, block=('dense',), n_layers=1,
        loss_chunk=4096, attention_block=64,
    )  # fmt: skip
    cfg = model_config(config)
    params = init_params(jax.random.key(0), model_params(cfg), make_mesh({}))
    tokens = jnp.zeros((4, 65), jnp.int32)
    grad = jax.grad(lambda p, t: model.loss(p, t, cfg, jax.random.key(0))[0])
    flops = on_one_device(grad).lower(params, tokens).compile().cost_analysis()['flops']
    assert flops / (4 * 64) == pytest.approx(flops_per_token(cfg, 64), rel=0.15)


def test_dropout_keeps_the_mean_and_differs_by_layer_and_key():
    x = jnp.ones((4, 8, 512))
    drop = lambda seed: on_one_device(  # noqa: E731
        lambda x: model.dropout(x, 0.25, jax.random.key(seed))
    )(x)
    a = np.asarray(drop(0))
    assert a.mean() == pytest.approx(1, abs=0.03)
    assert set(np.unique(a)) == {0, np.float32(1 / 0.75)}
    assert not np.array_equal(a, drop(1))
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a[0, 0], a[0, 1])


def test_initial_values_depend_on_neither_mesh_nor_depth():
    shallow, deep = small_config(), small_config()
    deep.model.n_layers = 8
    a, b = (
        init_params(jax.random.key(0), model_params(model_config(c)), make_mesh(m))
        for c, m in ((shallow, {}), (deep, {'fsdp': 4, 'tp': 2}))
    )
    np.testing.assert_array_equal(a['embed']['w_VD'], b['embed']['w_VD'])
    name = ('blocks', '1_dense', 'attention', 'w_k_up')
    for part in name:
        a, b = a[part], b[part]
    np.testing.assert_array_equal(a, b[:2])


def test_compile_does_not_grow_with_depth():
    def program_size(n_layers):
        config = small_config()
        config.model.n_layers = n_layers
        cfg = model_config(config)
        declared = model_params(cfg)
        params = jax.eval_shape(lambda: init_params(jax.random.key(0), declared, make_mesh({})))
        grad = jax.grad(lambda p, t: model.loss(p, t, cfg, jax.random.key(0))[0])
        tokens = jax.ShapeDtypeStruct((4, 17), jnp.int32)
        return on_one_device(grad).lower(params, tokens).as_text().count('\n')

    assert program_size(4) == program_size(16)


def test_count_is_the_formula():
    cfg = model_config(small_config('gqa', tied=False))
    layer = 2 * 32 + 2 * 8 + 4 * 32 * 64 + 3 * 32 * 48
    assert count(model_params(cfg)) == 2 * 64 * 32 + 32 + 4 * layer
