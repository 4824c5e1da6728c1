"""An attention, a feed-forward, a kernel and an optimizer from outside the packages: one line of a
table each, and rules, training on a mesh and plans follow."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from common import (
    TOLERANCE,
    assert_replicas_identical,
    assert_trees_close,
    batch_at,
    on_mesh,
    set_up,
    small_config,
)
from ml_collections import ConfigDict

from config import ConfigError, OptimizerConfig
from layers.attention import ATTENTION, Attention, Positions, Sizes
from layers.attention_kernels import ATTENTION_KERNELS
from layers.blockwise import causal_attention
from layers.dense import FeedForward, linear, weight
from layers.kernels import Kernel
from machine.chips import CHIPS
from model import FEED_FORWARD
from optimizer import OPTIMIZERS, Optimizer, zeros_like
from parallel import FSDP, TP, Array, P, Tree, all_gather, map_params, reduce_scatter, unshard
from planning.roofline import estimate
from runtime.config_checks import validate
from train_step import init_state, make_train_step, put_batch

# ---------------------------------------------------------------------------------------------
# Attention: each position takes the mean of all values up to it
# ---------------------------------------------------------------------------------------------


def mean_params(cfg) -> Tree:
    D = cfg.d_model
    return {'w_v': weight((D, D), P(FSDP, TP), D**-0.5), 'w_o': weight((D, D), P(TP, FSDP), 0.1)}


def mean(params: Tree, x_BtD: Array, table: Positions, cfg) -> tuple[Array, Tree]:
    w = unshard(params, mean_params(cfg), x_BtD.dtype)
    v_BTf = linear(all_gather(x_BtD, TP, 1), w['w_v'])
    counts_T = 1.0 + jnp.arange(v_BTf.shape[1], dtype=v_BTf.dtype)
    mean_BTf = jnp.cumsum(v_BTf, axis=1) / counts_T[:, None]
    return reduce_scatter(linear(mean_BTf, w['w_o']), TP, 1), {}


def mean_sizes(m) -> Sizes:
    return Sizes(
        key=2, value=2, rotary=2, kv_heads=1, cache=0, gathered=m.d_model, latents=0,
        inputs=(m.d_model,),
    )  # fmt: skip


def mean_rules(config: ConfigDict) -> Iterator[str]:
    if config.data.isolate_documents:
        yield "model.attention='mean' runs through documents; use data.isolate_documents=False"


# ---------------------------------------------------------------------------------------------
# Feed-forward: a single matrix; optimizer: the sign of the momentum
# ---------------------------------------------------------------------------------------------


def square_params(cfg) -> Tree:
    D = cfg.d_model
    return {
        'w_up': weight((D, D), P(FSDP, TP), D**-0.5),
        'w_down': weight((D, D), P(TP, FSDP), 0.1),
    }


def square(params: Tree, x_BtD: Array, cfg) -> tuple[Array, dict[str, Array]]:
    w = unshard(params, square_params(cfg), x_BtD.dtype)
    y_BTf = jnp.square(linear(all_gather(x_BtD, TP, 1), w['w_up']))
    return reduce_scatter(linear(y_BTf, w['w_down']), TP, 1), {}


def sign_slots(declared: Tree) -> dict[str, Tree]:
    return {'momentum': zeros_like(declared)}


def sign(params, grads, slots, lr, updates, declared, cfg: OptimizerConfig) -> tuple[Tree, Tree]:
    momentum = jax.tree.map(lambda m, g: cfg.b1 * m + (1 - cfg.b1) * g, slots['momentum'], grads)
    params = map_params(
        lambda p, x, m: x - lr * jnp.sign(m) if p.trainable else x, declared, params, momentum
    )
    return params, {'momentum': momentum}


@pytest.fixture
def toys(monkeypatch):
    """Adds a line to each table."""
    kind = Attention(mean_params, mean, None, mean_sizes, mean_rules)
    monkeypatch.setitem(ATTENTION, 'mean', kind)
    kind = FeedForward(square_params, square, False, lambda m: m.d_model, lambda _: iter(()))
    monkeypatch.setitem(FEED_FORWARD, 'square', kind)
    monkeypatch.setitem(OPTIMIZERS, 'sign', Optimizer(sign_slots, sign, lambda _: iter(())))
    monkeypatch.setitem(ATTENTION_KERNELS, 'mine', Kernel(causal_attention, ('cpu',), scores=True))


def toy_config() -> ConfigDict:
    config = small_config()
    config.model.update(attention='mean', block=('square', 'dense'))
    config.optimizer.name = 'sign'
    return config


def two_steps(config: ConfigDict) -> tuple[Tree, list[float]]:
    validate(config, 8)
    s = set_up(config)
    state, step, losses = init_state(s), make_train_step(s), []
    for i in range(2):
        state, metrics = step(state, put_batch(batch_at, i, s))
        losses.append(float(metrics['loss']))
    return state, losses


def test_toys_train_on_a_mesh_as_on_one_device(toys):
    want, want_losses = two_steps(toy_config())
    got, losses = two_steps(on_mesh(toy_config(), (2, 2, 2)))
    assert losses == pytest.approx(want_losses, rel=TOLERANCE)
    assert want_losses[0] != want_losses[1]
    assert set(got['moments']) == {'momentum'}
    assert_trees_close(got['moments'], want['moments'], 10 * TOLERANCE)
    assert_replicas_identical(got)


def test_an_optimizer_without_slots_is_averaged_too(toys, monkeypatch):
    """It returns the slots that it was given; a skipped step leaves the average alone."""

    def descend(params, grads, slots, lr, updates, declared, cfg):
        return jax.tree.map(lambda x, g: x - lr * g, params, grads), slots

    bare = Optimizer(lambda _: {}, descend, lambda _: iter(()))
    monkeypatch.setitem(OPTIMIZERS, 'descend', bare)
    config = toy_config()
    config.optimizer.update(name='descend', ema=0.5)
    config.guard.update(history=1, spike_factor=1.001)
    s = set_up(config)
    state, step, skipped = init_state(s), make_train_step(s), []
    for i in range(5):
        before = jax.device_get(state['moments']['ema'])
        state, metrics = step(state, put_batch(batch_at, i, s))
        after, skips = jax.device_get(state['moments']['ema']), int(metrics['skips_in_a_row'])
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
        assert any(jax.tree.leaves(moved)) is (skips == 0)
        skipped.append(skips > 0)
    assert 0 < sum(skipped) < 5


def test_toys_are_planned_and_refused_by_their_own_rules(toys):
    config = toy_config()
    adamw = config.copy_and_resolve_references()
    adamw.optimizer.name = 'adamw'
    plan, of_adamw = (estimate(c, CHIPS['v5p']) for c in (config, adamw))
    assert plan.memory.moments == of_adamw.memory.moments / 2
    assert plan.useful > 0
    config.data.isolate_documents = True
    with pytest.raises(ConfigError, match=r'use data\.isolate_documents=False'):
        validate(config, 8)
    config.data.isolate_documents, config.mesh.cp = False, 2
    with pytest.raises(
        ConfigError, match=r"'mean' takes whole sequences, and mesh\.cp=2; use a cp of 1"
    ):
        validate(config, 8)


def test_a_kernel_of_ones_own_is_chosen_by_name(toys):
    config = small_config()
    config.model.attention_kernel = 'mine'
    validate(config, 8)
    assert set_up(config).model.attention_kernel == 'mine'
    del ATTENTION_KERNELS['mine']
    with pytest.raises(ConfigError, match="attention_kernel='mine' is unknown"):
        validate(config, 8)
