"""Every attention kernel against the plain formula; rotary positions."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, set_up, small_config

from config import ModelConfig
from layers import blockwise, kernels, mask
from layers.attention import ATTENTION, attention_sizes, positions, rope_table
from layers.attention_kernels import (
    ATTENTION_KERNELS,
    cudnn_attention,
    splash_attention,
)
from layers.blockwise import causal_attention
from layers.rope import rope
from layers.rope_scaling import (
    attention_scale,
    rope_attention_factor,
    rope_frequencies,
    rope_rules,
)
from parallel import init_params, make_mesh
from train_step import lower_train_step


def in_blocks(block: int) -> ModelConfig:
    return dataclasses.replace(cpu_model(small_config()), attention_block=block)


def plain_attention(q, k, v, documents, scale):
    T = q.shape[-2]
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k) * scale
    visible = np.tril(np.ones((T, T), bool))
    if documents is not None:
        same = documents[:, :, None] == documents[:, None, :]
        visible = (visible & same)[:, None, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    return jnp.einsum('bkgts,bksh->bkgth', jax.nn.softmax(scores), v)


@pytest.mark.parametrize('packed', [False, True], ids=['one_document', 'packed'])
@pytest.mark.parametrize('block', [4, 8, 16, 64])
def test_blockwise_attention_is_softmax_attention(block, packed):
    documents = np.repeat([[0, 1, 2, 3], [0, 1, 1, 2]], 4, axis=1) if packed else None
    keys = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(keys[0], (2, 2, 3, 16, 8))
    k = 3 * jax.random.normal(keys[1], (2, 2, 16, 8))
    v = jax.random.normal(keys[2], (2, 2, 16, 5))
    d_out = jax.random.normal(keys[3], (2, 2, 3, 16, 5))
    cfg = in_blocks(block)
    got, got_vjp = jax.vjp(lambda *x: causal_attention(*x, documents, 0.3, cfg), q, k, v)
    want, want_vjp = jax.vjp(lambda *x: plain_attention(*x, documents, 0.3), q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_vjp(d_out), want_vjp(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


# cuDNN itself needs its GPU: here its arguments go through the plain XLA implementation.
KERNELS = {
    'splash': functools.partial(splash_attention, interpret=True),
    'cudnn': functools.partial(cudnn_attention, implementation='xla'),
}


@pytest.mark.parametrize('packed', [False, True], ids=['one_document', 'packed'])
@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_are_softmax_attention(kernel, packed):
    """Keys wider than values, as in MLA; several queries a key, as in GQA; blocks below, on and
    above the diagonal."""
    T, block = 512, 128
    documents = np.sort(np.random.default_rng(0).integers(0, 4, (1, T))) if packed else None
    keys = jax.random.split(jax.random.key(0), 4)
    q = 3 * jax.random.normal(keys[0], (1, 1, 2, T, 24))
    k = 3 * jax.random.normal(keys[1], (1, 1, T, 24))
    v = jax.random.normal(keys[2], (1, 1, T, 16))
    d_out = jax.random.normal(keys[3], (1, 1, 2, T, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, *arrays):
        out, vjp = jax.vjp(lambda *x: attend(*x, documents, 0.2), *arrays)
        return out, *vjp(d_out)

    got = run(functools.partial(KERNELS[kernel], cfg=in_blocks(block)), q, k, v)
    for a, b in zip(got, run(plain_attention, q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ('kernel', 'platform', 'call'),
    [
        ('splash', 'tpu', 'tpu_custom_call'),
        pytest.param('cudnn', 'cuda', '__cudnn$fmha', marks=pytest.mark.gpu),
    ],
)
def test_kernels_lower_for_their_platform(kernel, platform, call):
    """cuDNN is asked for its version on the way, so that takes its library, if no GPU."""
    if platform == 'cuda':
        pytest.importorskip('jax_cuda12_plugin', reason='needs requirements/gpu.txt')
    attend = {
        'splash': functools.partial(splash_attention, cfg=in_blocks(128)),
        'cudnn': functools.partial(cudnn_attention, cfg=in_blocks(128)),
    }[kernel]
    q = jax.ShapeDtypeStruct((2, 2, 2, 256, 128), jnp.bfloat16)
    kv = [jax.ShapeDtypeStruct((2, 2, 256, size), jnp.bfloat16) for size in (128, 64)]

    def loss(*x: jax.Array) -> jax.Array:
        return attend(*x, None, 0.1).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, *kv)
    assert call in traced.lower(lowering_platforms=(platform,)).as_text()


def test_auto_is_the_kernel_of_the_platform():
    def choose(name, platform, head=128, **changes):
        config = small_config()
        config.model.attention_block = config.seq_len = 128
        config.update({'check_vma': False, 'compute_dtype': 'bfloat16'} | changes)
        return kernels.choose(ATTENTION_KERNELS, name, [(config, head)], platform)

    assert choose('auto', 'tpu') == 'splash'
    assert choose('auto', 'gpu') == 'cudnn'
    assert choose('auto', 'cpu') == 'blockwise'
    assert choose('splash', 'cpu') == 'splash_interpreted'
    assert choose('auto', 'tpu', check_vma=True) == 'blockwise'
    assert choose('auto', 'gpu', compute_dtype='float32') == 'blockwise'
    assert choose('auto', 'gpu', head=192) == 'blockwise'
    assert choose('auto', 'gpu', head=12) == 'blockwise'


def windowed(window: int):
    """Returns a mask of the last positions, in place of `mask.visible`."""
    causal = mask.visible

    def visible(q_position, k_position, q_document, k_document, cfg):
        seen = causal(q_position, k_position, q_document, k_document, cfg)
        return seen & (q_position - k_position < window)

    return visible


def test_an_edit_of_the_mask_is_the_mask_of_blockwise_attention(monkeypatch):
    """Both ways, with blocks of which a query sees nothing."""
    monkeypatch.setattr(mask, 'visible', windowed(3))
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (1, 1, 1, 16, 4)) for key in keys)
    k, v = k[:, 0], v[:, 0]
    distance = np.arange(16)[:, None] - np.arange(16)
    hidden = (distance < 0) | (distance >= 3)

    def plain(q, k, v):
        scores = jnp.where(hidden, -jnp.inf, jnp.einsum('bkgth,bksh->bkgts', q, k))
        return jnp.einsum('bkgts,bksh->bkgth', jax.nn.softmax(scores), v)

    got, got_vjp = jax.vjp(lambda *x: causal_attention(*x, None, 1.0, in_blocks(4)), q, k, v)
    want, want_vjp = jax.vjp(plain, q, k, v)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_vjp(d_out), want_vjp(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def other_documents(q_position, k_position, q_document, k_document, cfg):
    """A mask that forgets the documents."""
    return q_position >= k_position


@pytest.mark.parametrize('other', [windowed(127), other_documents])
@pytest.mark.parametrize(('kernel', 'platform'), [('splash', 'tpu'), ('cudnn', 'gpu')])
def test_kernels_with_a_causal_mask_of_their_own_refuse_another(
    kernel, platform, other, monkeypatch
):
    config = small_config()
    config.model.attention_block = config.seq_len = 128
    config.update({'check_vma': False, 'compute_dtype': 'bfloat16'})
    assert not list(ATTENTION_KERNELS[kernel].rules(config, 128))
    monkeypatch.setattr(mask, 'visible', other)
    errors = list(ATTENTION_KERNELS[kernel].rules(config, 128))
    assert len(errors) == 1
    assert f"attention_kernel='{kernel}'" in errors[0]
    assert "use the kernel 'blockwise'" in errors[0]
    assert kernels.choose(ATTENTION_KERNELS, 'auto', [(config, 128)], platform) == 'blockwise'


def test_attention_block_must_divide():
    x = jnp.ones((1, 1, 1, 12, 4))
    with pytest.raises(ValueError, match='attention_block=8'):
        causal_attention(x, x[:, 0], x[:, 0], None, 1.0, in_blocks(8))


def test_attention_memory_grows_linearly():
    def temp_bytes(T):
        q = jax.ShapeDtypeStruct((1, 2, 1, T, 16), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, 2, T, 16), jnp.float32)
        f = jax.grad(
            lambda q, k, v: causal_attention(q, k, v, None, 1.0, in_blocks(64)).sum(),
            argnums=(0, 1, 2),
        )
        return jax.jit(f).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(2048) < 2.2 * temp_bytes(1024)


@pytest.mark.parametrize('scaling', ['none', 'linear', 'llama3', 'yarn'])
def test_rope_depends_on_relative_position_only(scaling):
    config = small_config('gqa')
    config.model.update(rope_scaling=scaling, rope_factor=4.0, head_dim=16)
    cfg = cpu_model(config)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 16))

    def at(x: jax.Array, position: int) -> jax.Array:
        return rope(x, rope_table(cfg, jnp.array([position])))

    def score(t: int, s: int) -> float:
        return float(jnp.sum(at(q, t) * at(k, s)))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_latents_have_an_eps_of_their_own():
    """Both fields are one in latent attention, which has no other norms; 0 means norm_eps."""
    config, outputs = small_config('mla'), []
    for eps, latent in ((0.5, 0.0), (1e-6, 0.5), (1e-6, 0.0)):
        config.model.update(norm_eps=eps, latent_norm_eps=latent)
        cfg = cpu_model(config)
        params = init_params(jax.random.key(0), ATTENTION['mla'].params(cfg), make_mesh({}))
        x = jax.random.normal(jax.random.key(1), (2, 16, cfg.d_model))
        table = rope_table(cfg, jnp.arange(16))
        f = on_one_device(lambda p, x, t=table, c=cfg: ATTENTION['mla'].forward(p, x, t, c)[0])
        outputs.append(np.asarray(f(params, x)))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[1] - outputs[2]).max() > 1e-3


@pytest.mark.parametrize('kind', ['mla', 'gqa'])
def test_layers_feel_relative_positions_only(kind):
    """A shift of all positions changes nothing, a stretch does."""
    cfg = cpu_model(small_config(kind))
    params = init_params(jax.random.key(0), ATTENTION[kind].params(cfg), make_mesh({}))
    x = jax.random.normal(jax.random.key(1), (2, 16, cfg.d_model))

    def layer(positions: jax.Array) -> np.ndarray:
        f = on_one_device(
            lambda p, x: ATTENTION[kind].forward(p, x, rope_table(cfg, positions), cfg)[0]
        )
        return np.asarray(f(params, x))

    plain = layer(jnp.arange(16))
    np.testing.assert_allclose(layer(jnp.arange(16) + 100), plain, atol=1e-5)
    assert np.abs(layer(3 * jnp.arange(16)) - plain).max() > 1e-3


def test_positions_start_anew_after_the_end_of_a_document():
    config = small_config('gqa')
    config.model.document_end = 9
    cfg = cpu_model(config)
    ids = jnp.array([[1, 2, 9, 9, 3, 4, 9, 5]])
    got = on_one_device(lambda ids: positions(ids, cfg))(ids)
    np.testing.assert_array_equal(got.documents, [[0, 0, 0, 1, 2, 2, 2, 3]])
    want = rope_table(cfg, jnp.array([0, 1, 2, 0, 0, 1, 2, 0]))
    np.testing.assert_array_equal(got.cos[0, 0], want.cos)
    np.testing.assert_array_equal(got.sin[0, 0], want.sin)


def test_rope_scaling_keeps_fast_and_slows_slow_pairs():
    config = small_config('gqa')
    config.model.update(head_dim=64, rope_factor=8.0, rope_original_len=256)
    plain = rope_frequencies(cpu_model(config), 64)
    config.model.rope_scaling = 'linear'
    np.testing.assert_allclose(rope_frequencies(cpu_model(config), 64), plain / 8)
    config.model.rope_scaling = 'yarn'
    yarn = rope_frequencies(cpu_model(config), 64)
    assert yarn[0] == plain[0]
    assert yarn[-1] == pytest.approx(plain[-1] / 8)
    assert np.all(np.diff(yarn) < 0)


GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden' / 'rope.json').read_text())['cases']


def golden_config(name: str):
    """Returns the config that a golden case's fields mean here."""
    case, config = GOLDEN[name], small_config(GOLDEN[name]['attention'])
    sizes = {'mla': {'rope_dim': 64, 'nope_dim': 128}, 'gqa': {'head_dim': case['head']}}
    config.model.update(sizes[case['attention']])
    names = {
        'rope_theta': 'rope_base',
        'rope_type': 'rope_scaling',
        'original_max_position_embeddings': 'rope_original_len',
    }
    for field, value in case['rope'].items():
        config.model[names.get(field, f'rope_{field}')] = value
    return config


@pytest.mark.parametrize('name', GOLDEN)
def test_scaled_rotations_are_those_of_released_models(name):
    """By the code of transformers: tests/golden/make_rope.py."""
    assert not list(rope_rules(golden_config(name)))
    case, cfg = GOLDEN[name], cpu_model(golden_config(name))
    sizes = attention_sizes(cfg)
    np.testing.assert_allclose(rope_frequencies(cfg, sizes.rotary), case['frequencies'], rtol=2e-6)
    assert rope_attention_factor(cfg) == pytest.approx(case['attention_factor'])
    assert attention_scale(cfg, sizes.key) == pytest.approx(case['scale'])


def test_yarn_of_all_of_a_head_is_a_factor_on_its_scores():
    """So both ways of sharpening are one where all of a head rotates."""
    config = small_config('gqa')
    config.model.update(rope_scaling='yarn', rope_factor=8.0)
    cfgs = [cpu_model(config)]
    config.model.rope_mscale_all_dim = 1.0
    cfgs.append(cpu_model(config))
    x_TH = jax.random.normal(jax.random.key(0), (4, 8))

    def scores(cfg: ModelConfig) -> jax.Array:
        rotated_TH = rope(x_TH, rope_table(cfg, jnp.arange(4)))
        return rotated_TH @ rotated_TH.T * attention_scale(cfg, 8)

    assert [rope_attention_factor(cfg) > 1 for cfg in cfgs] == [True, False]
    np.testing.assert_allclose(*map(scores, cfgs), rtol=1e-5, atol=1e-5)


def test_scaled_rotations_have_rules():
    config = golden_config('llama_3_1')
    config.model.rope_low_freq_factor = 4.0
    (low,) = rope_rules(config)
    assert low.startswith('model.rope_low_freq_factor=4.0 and model.rope_high_freq_factor=4.0')
    config = golden_config('qwen')
    config.model.update(rope_beta_slow=33.0, rope_base=1.0)
    slow, base = rope_rules(config)
    assert slow.startswith('model.rope_beta_slow=33.0 and model.rope_beta_fast=32.0')
    assert base.startswith('model.rope_base=1.0')
    config.model.rope_scaling = 'linear'
    assert not list(rope_rules(config))


def test_masks_are_computed_where_they_are_used(monkeypatch):
    """Not those of all 136 pairs of blocks before the scan over layers, as its derivative would."""
    masks = r'pred\[136,'
    config = small_config('gqa')
    config.seq_len, config.model.attention_block = 256, 16
    assert not re.search(masks, lower_train_step(set_up(config)).compile().as_text())
    monkeypatch.setattr(blockwise, '_held', lambda _, *x: x)
    jax.clear_caches()
    assert re.search(masks, lower_train_step(set_up(config)).compile().as_text())
