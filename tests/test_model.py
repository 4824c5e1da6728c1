"""The loss against the plain formula, and the properties that a language model must have."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, initial_params, on_one_device, small_config

import model
import train_step
from config import (
    FIXED,
    ConfigError,
    check_alike,
    differences,
    model_config,
    optimizer_config,
    saved_config,
)
from configs import default
from layers.cross_entropy import cross_entropy
from model import flops_per_token, logits, model_params
from parallel import AXES, count, init_params, make_mesh, varying
from train_step import setup


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
    config.seq_len = 128
    config.model.update(vocab_size=4096, n_layers=1, block=('dense',))
    cfg = cpu_model(config)
    params = initial_params(cfg, make_mesh({}))
    tokens = jnp.zeros((8, 129), jnp.int32)

    def temp_bytes(chunk):
        c = dataclasses.replace(cfg, loss_chunk=chunk)
        grad = jax.grad(lambda p, t: model.loss(p, t, c, jax.random.key(0))[0])
        return (
            on_one_device(grad).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes
        )

    all_logits = 8 * 128 * 4096 * 4
    assert temp_bytes(1024) - temp_bytes(128) > all_logits // 2


@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_causality_by_gradient(attention):
    """The gradient of position t's logits reaches the embeddings of 0..t, all and only those."""
    cfg = cpu_model(small_config(attention))
    params = initial_params(cfg, make_mesh({}))
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


@pytest.mark.parametrize('attention', ['mla', 'gqa'])
def test_a_document_does_not_feel_what_it_is_packed_with(attention):
    """Alone, or between others: the same logits, and gradients that add up."""
    config = small_config(attention)
    config.model.document_end = 0
    cfg = cpu_model(config)
    params = initial_params(cfg, make_mesh({}))
    documents = np.random.default_rng(0).integers(1, 64, (2, 8)).astype(np.int32)
    documents[:, -1] = 0
    packed = documents.reshape(1, 16)
    weights = jax.random.normal(jax.random.key(1), (16, 64))

    def run(ids, weights):
        def f(params):
            out = logits(params, ids, cfg)
            return jnp.sum(out * weights), out

        (_, out), grads = jax.value_and_grad(f, has_aux=True)(
            jax.tree.map(lambda x: varying(x, AXES), params)
        )
        return out, grads

    run = on_one_device(run)
    out, grads = run(packed, weights)
    alone = [run(documents[i : i + 1], weights[8 * i : 8 * i + 8]) for i in range(2)]
    np.testing.assert_allclose(out[0, :8], alone[0][0][0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(out[0, 8:], alone[1][0][0], rtol=2e-5, atol=2e-6)
    total = jax.tree.map(jnp.add, alone[0][1], alone[1][1])
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(total), strict=True):
        assert np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(b)


def test_flops_count_the_compilers():
    """The formula against XLA's count for one block, where its loops run once."""
    config = small_config('gqa', tied=True)
    config.model.update(
        vocab_size=512, d_model=128, d_ff=256, head_dim=16, block=('dense',), n_layers=1,
        loss_chunk=4096, attention_block=64,
    )  # fmt: skip
    cfg = cpu_model(config)
    params = initial_params(cfg, make_mesh({}))
    tokens = jnp.zeros((4, 65), jnp.int32)
    grad = jax.grad(lambda p, t: model.loss(p, t, cfg, jax.random.key(0))[0])
    flops = on_one_device(grad).lower(params, tokens).compile().cost_analysis()['flops']
    assert flops / (4 * 64) == pytest.approx(flops_per_token(cfg, 64), rel=0.15)


def test_initial_values_depend_on_neither_mesh_nor_depth():
    shallow, deep = small_config(), small_config()
    deep.model.n_layers = 8
    a, b = (
        init_params(jax.random.key(0), model_params(cpu_model(c)), make_mesh(m))
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
        cfg = cpu_model(config)
        declared = model_params(cfg)
        params = jax.eval_shape(lambda: init_params(jax.random.key(0), declared, make_mesh({})))
        grad = jax.grad(lambda p, t: model.loss(p, t, cfg, jax.random.key(0))[0])
        tokens = jax.ShapeDtypeStruct((4, 17), jnp.int32)
        return on_one_device(grad).lower(params, tokens).as_text().count('\n')

    assert program_size(8) == program_size(16)


def test_count_is_the_formula():
    cfg = cpu_model(small_config('gqa', tied=False))
    layer = 2 * 32 + 2 * 8 + 4 * 32 * 64 + 3 * 32 * 48
    assert count(model_params(cfg)) == 2 * 64 * 32 + 32 + 4 * layer


def traced_step(remat: str, fsdp: int) -> str:
    config = small_config('gqa')
    config.model.update(remat=remat, n_layers=2)
    config.mesh.update(fsdp=fsdp)
    mesh = make_mesh(config.mesh)
    tokens = jax.ShapeDtypeStruct((1, 16, 17), np.int32)
    step = train_step.make_train_step(setup(config, mesh))
    return str(jax.make_jaxpr(step)(train_step.abstract_state(setup(config, mesh)), tokens))


def test_rematerialization_computes_again_what_it_says():
    matmuls = {r: traced_step(r, 1).count('dot_general[') for r in ('none', 'dots', 'full')}
    assert matmuls['none'] <= matmuls['dots'] < matmuls['full']


def test_no_gathered_weight_is_saved():
    """Weights are gathered as often with remat none as with remat full."""
    gathers = {r: traced_step(r, 2).count(" axis_name=('fsdp',)") for r in ('none', 'full')}
    assert gathers['none'] == gathers['full']


# ---------------------------------------------------------------------------------------------
# Its config
# ---------------------------------------------------------------------------------------------


def test_fields_that_came_later_have_one_default():
    """Where a dataclass has one too, it is that of configs/default.py."""
    config = default.get_config()
    optimizer = optimizer_config(config)
    for made in (model_config(config), optimizer, optimizer.muon):
        for field in dataclasses.fields(made):
            if field.default is not dataclasses.MISSING:
                assert field.default == getattr(made, field.name), field.name


def test_yarn_of_an_older_run_is_another_model():
    config = default.get_config()
    config.model.update(rope_scaling='yarn', rope_factor=4.0)
    saved = json.loads(config.to_json())
    assert saved_config(saved).to_dict() == config.to_dict()
    check_alike(saved, config, FIXED, 'the folder')
    del saved['model']['rope_beta_fast']
    for read in (saved_config, lambda old: check_alike(old, config, FIXED, 'the folder')):
        with pytest.raises(ConfigError, match="rope_scaling='yarn' by an older version"):
            read(saved)
    saved['model']['rope_scaling'] = 'linear'
    assert saved_config(saved).model.rope_beta_fast == 32.0


def test_a_field_that_came_later_is_compared_with_its_default():
    config = default.get_config()
    saved = json.loads(config.to_json())
    del saved['model']['swiglu_limit']
    check_alike(saved, config, FIXED, 'the folder')
    config.model.swiglu_limit = 7.0
    with pytest.raises(ConfigError, match=r'model\.swiglu_limit: 0\.0 there, 7\.0 here'):
        check_alike(saved, config, FIXED, 'the folder')


def test_fields_of_rope_scaling_count_where_it_is_on():
    saved, config = (default.get_config().to_dict() for _ in range(2))
    config['model']['rope_factor'] = 40.0
    assert differences(saved, config) == []
    for fields in (saved, config):
        fields['model']['rope_scaling'] = 'linear'
    assert differences(saved, config) == [('model.rope_factor', 1.0, 40.0)]
