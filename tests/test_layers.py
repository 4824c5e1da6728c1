"""Norms and dropout against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import on_one_device

from layers.dense import dropout, rms_norm


def test_rms_norm():
    x = jax.random.normal(jax.random.key(0), (3, 7)) * 5
    gain = jnp.arange(7.0)
    want = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(rms_norm(x, gain, 1e-6), want, rtol=1e-5)


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
