"""Norms, SwiGLU and dropout against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, on_one_device, small_config

from layers.dense import dense_params, dropout, gated, rms_norm, swiglu
from parallel import init_params, make_mesh


def test_rms_norm():
    x = jax.random.normal(jax.random.key(0), (3, 7)) * 5
    gain = jnp.arange(7.0)
    want = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(rms_norm(x, gain, 1e-6), want, rtol=1e-5)


@pytest.mark.parametrize('limit', [0.0, 0.6])
def test_swiglu(limit):
    config = small_config()
    config.model.swiglu_limit = limit
    cfg = cpu_model(config)
    params = init_params(jax.random.key(0), dense_params(cfg), make_mesh({}))
    x = jax.random.normal(jax.random.key(1), (2, 3, cfg.d_model))
    gate, up = (np.float64(x) @ np.float64(params[name]) for name in ('w_gate', 'w_up'))
    assert 0.05 < np.mean(gate > 0.6) < 0.95
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
    h = gate / (1 + np.exp(-(1.702 if limit else 1) * gate)) * up
    got = on_one_device(lambda p, x: swiglu(p, x, cfg)[0])(params, x)
    np.testing.assert_allclose(got, h @ np.float64(params['w_down']), rtol=1e-4, atol=1e-5)


def test_a_clipped_factor_has_its_slope_up_to_the_limit():
    """As torch.clamp has it: the slope is 1 at the limit and 0 beyond."""
    up = jnp.array([-1.5, -1.0, 0.5, 1.0, 1.5])
    gate = jnp.full_like(up, 0.3)
    slopes = jax.grad(lambda up: gated(gate, up, 1.0).sum())(up)
    active = 0.3 / (1 + np.exp(-1.702 * 0.3))
    np.testing.assert_allclose(slopes, active * np.array([0, 1, 1, 1, 0]), rtol=1e-6)
    slopes = jax.grad(lambda x: gated(x, gate, 1.0).sum())(jnp.array([1.0, 1.0, 1.5, 1.5, -9.0]))
    assert (np.asarray(slopes) != 0).tolist() == [True, True, False, False, True]


def test_limits_are_numbers_in_the_program():
    """Arrays of them would be made before a scan over layers, and kept by it."""
    x = jnp.ones((4, 8), jnp.bfloat16)
    assert 'broadcast_in_dim' not in str(jax.make_jaxpr(lambda x: gated(x, x, 7.0))(x))


def test_dropout_keeps_the_mean_and_differs_by_layer_and_key():
    x = jnp.ones((4, 8, 512))

    def drop(seed: int) -> jax.Array:
        return on_one_device(lambda x: dropout(x, 0.25, jax.random.key(seed)))(x)

    a = np.asarray(drop(0))
    assert a.mean() == pytest.approx(1, abs=0.03)
    assert set(np.unique(a)) == {0, np.float32(1 / 0.75)}
    assert not np.array_equal(a, drop(1))
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a[0, 0], a[0, 1])
