"""AdamW against a plain loop in numpy; schedules at their corners; the norm of sharded trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from config import OptimizerConfig, optimizer_config
from configs import default
from optimizer import adamw, adamw_slots, clip_by_global_norm, learning_rate
from parallel import P, Param, make_mesh, ones


def optimizer(**changes) -> OptimizerConfig:
    config = default.get_config()
    config.steps = 100
    sizes = {'peak_lr': 1.0, 'final_lr': 0.1, 'warmup_steps': 10, 'decay_steps': 20}
    config.optimizer.update(sizes | changes)
    return optimizer_config(config)


def rate(step: int, **changes) -> float:
    return float(learning_rate(jnp.int32(step), optimizer(**changes)))


def test_cosine_schedule():
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0)
    assert rate(10) == pytest.approx(1.0)
    assert rate(99) == pytest.approx(0.1)
    assert rate(10 + 89 // 2) == pytest.approx(0.55, abs=0.01)
    assert rate(0, warmup_steps=0) == pytest.approx(1.0)


def test_wsd_schedule():
    assert rate(10, lr_schedule='wsd') == rate(79, lr_schedule='wsd') == 1.0
    assert rate(89, lr_schedule='wsd') == pytest.approx(0.55)
    assert rate(99, lr_schedule='wsd') == pytest.approx(0.1)


def test_wsd_of_a_short_run_decays_all_the_way():
    """With more decay_steps than the run has, the rate still reaches its peak."""
    assert rate(10, lr_schedule='wsd', decay_steps=500) == pytest.approx(1.0)
    assert rate(99, lr_schedule='wsd', decay_steps=500) == pytest.approx(0.1)
    halfway = rate(10 + 89 // 2, lr_schedule='wsd', decay_steps=500)
    assert halfway == pytest.approx(0.55, abs=0.01)


def test_adamw_is_the_paper():
    cfg = optimizer()
    declared = {'w': Param((3, 2), P(), ones), 'g': Param((2,), P(), ones, matrix=False)}
    rng = np.random.default_rng(0)
    params = {'w': rng.normal(size=(3, 2)), 'g': rng.normal(size=2)}
    want = dict(params)
    params = jax.tree.map(jnp.float32, params)
    moments = {k: jax.tree.map(jnp.zeros_like, params) for k in adamw_slots(declared)}
    m, v = (dict.fromkeys(want, 0.0) for _ in range(2))
    for t in range(5):
        grads = {k: rng.normal(size=x.shape) for k, x in want.items()}
        lr = 0.5 + t  # whatever the schedule says
        gradient = jax.tree.map(jnp.float32, grads)
        params, moments = adamw(params, gradient, moments, lr, jnp.int32(t), declared, cfg)
        for k, g in grads.items():
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            m_hat, v_hat = m[k] / (1 - 0.9 ** (t + 1)), v[k] / (1 - 0.95 ** (t + 1))
            decay = 0.1 if k == 'w' else 0.0
            want[k] = want[k] - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * want[k])
    for k in want:
        np.testing.assert_allclose(params[k], want[k], rtol=1e-5)


@pytest.mark.parametrize('max_norm', [0.0, 1.0, 1e6])
def test_clipping_takes_the_norm_of_the_whole_model(max_norm):
    """Sharded, partly sharded and replicated leaves each count once."""
    declared = {
        'sharded': Param((8, 4), P('fsdp', 'tp'), ones),
        'partly': Param((8,), P('tp'), ones),
        'replicated': Param((5,), P(), ones),
    }
    keys = iter(jax.random.split(jax.random.key(0), 3))
    grads = {k: jax.random.normal(next(keys), p.shape) for k, p in declared.items()}
    spec = {k: p.spec for k, p in declared.items()}
    f = jax.shard_map(
        lambda g: clip_by_global_norm(g, declared, max_norm),
        mesh=make_mesh({'dp': 2, 'fsdp': 2, 'tp': 2}),
        in_specs=(spec,),
        out_specs=(spec, P()),
    )
    clipped, norm = jax.jit(f)(grads)
    want = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    assert float(norm) == pytest.approx(want, rel=1e-6)
    scale = min(1.0, max_norm / want) if max_norm else 1.0
    for k in grads:
        np.testing.assert_allclose(clipped[k], scale * grads[k], rtol=1e-6)
