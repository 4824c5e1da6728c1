"""The update: clipping by the global norm, optimizers, the learning rate, and steps to skip.

Pure functions on sharded trees, elementwise on the shards that a device holds but for the one
number that clipping needs. Parameters (the float32 master copy) and slots are sharded alike.

To add an optimizer, write its functions and add a line to OPTIMIZERS.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from config import OptimizerConfig
from parallel import Array, Tree, global_sum_of_squares, map_params, zeros


class Optimizer(NamedTuple):
    """One optimizer.

    slots(declared) declares the arrays that it keeps beside the parameters, {name: tree of Param}:
    layout, checkpoints and plans follow from that. A slot starts as its `Param.init` says.
    update(params, grads, slots, lr, updates, declared, cfg) returns the new parameters and slots,
    all float32; lr is the rate of this step, updates the number of those before it, which does not
    count steps that were skipped. rules(config) yields what cannot run.
    """

    slots: Callable[[Tree], dict[str, Tree]]
    update: Callable[[Tree, Tree, Tree, Array, Array, Tree, OptimizerConfig], tuple[Tree, Tree]]
    rules: Callable[[ConfigDict], Iterator[str]]


def zeros_like(declared: Tree) -> Tree:
    """Declares a slot of each parameter's shape and layout that starts at zero."""
    return map_params(lambda p: dataclasses.replace(p, init=zeros), declared)


# ---------------------------------------------------------------------------------------------
# Learning rate and clipping
# ---------------------------------------------------------------------------------------------


def learning_rate(step: Array, cfg: OptimizerConfig) -> Array:
    """Returns the rate of step number `step` (from 0, with skipped ones): float32 scalar.

    Linear warmup to peak_lr, then 'cosine': half a cosine to final_lr at the last step
    (Loshchilov & Hutter 2017); 'wsd': constant, then linear to final_lr over the last decay_steps
    (warmup-stable-decay, Hu et al. 2024).
    """
    step = step.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    if cfg.lr_schedule == 'cosine':
        span = max(cfg.steps - 1 - cfg.warmup_steps, 1)
        done = jnp.clip((step - cfg.warmup_steps) / span, 0, 1)
        share = 0.5 * (1 + jnp.cos(math.pi * done))
    else:
        share = jnp.clip((cfg.steps - 1 - step) / max(cfg.decay_steps, 1), 0, 1)
    return warmup * (cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * share)


def clip_by_global_norm(grads: Tree, declared: Tree, max_norm: float) -> tuple[Tree, Array]:
    """Scales the gradient of the whole model to at most max_norm (0: as it is).

    Also returns its norm before. Moves one float32 number per device (`global_sum_of_squares`).
    """
    norm = jnp.sqrt(global_sum_of_squares(grads, declared))
    if max_norm == 0:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads), norm


# ---------------------------------------------------------------------------------------------
# AdamW
# ---------------------------------------------------------------------------------------------


def adamw_slots(declared: Tree) -> dict[str, Tree]:
    """Declares both moments."""
    return {'m': zeros_like(declared), 'v': zeros_like(declared)}


def adamw(
    params: Tree,
    grads: Tree,
    slots: Tree,
    lr: Array,
    updates: Array,
    declared: Tree,
    cfg: OptimizerConfig,
) -> tuple[Tree, Tree]:
    """Makes one update of AdamW.

    Decay is decoupled (Loshchilov & Hutter 2019) and for matrices only: gains stay free. The bias
    correction counts updates, as the moments hold no more gradients than that.
    """
    t = (updates + 1).astype(jnp.float32)
    m_scale, v_scale = 1 / (1 - cfg.b1**t), 1 / (1 - cfg.b2**t)
    m = jax.tree.map(lambda m, g: cfg.b1 * m + (1 - cfg.b1) * g, slots['m'], grads)
    v = jax.tree.map(lambda v, g: cfg.b2 * v + (1 - cfg.b2) * g * g, slots['v'], grads)

    def update(p, x: Array, m: Array, v: Array) -> Array:
        if not p.trainable:
            return x
        direction = m * m_scale / (jnp.sqrt(v * v_scale) + cfg.eps)
        decay = cfg.weight_decay if p.matrix else 0.0
        return x - lr * (direction + decay * x)

    return map_params(update, declared, params, m, v), {'m': m, 'v': v}


def adamw_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for constants out of range."""
    for name in ('b1', 'b2'):
        if config.optimizer[name] >= 1:
            yield (f'optimizer.{name}={config.optimizer[name]} never forgets; use a value below 1')


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Optimizer] = {'adamw': Optimizer(adamw_slots, adamw, adamw_rules)}

# ---------------------------------------------------------------------------------------------
# Skipped steps
# ---------------------------------------------------------------------------------------------

# A step whose gradient norm is not finite, or far above its recent history, leaves parameters,
# slots and expert biases as they were; the step number, and with it data and learning rate, goes
# on. The norm is one number that all devices hold, so they decide alike.


def init_history() -> Tree:
    """Returns an empty history of gradient norms: scalars, alike on all devices.

    log_norm: float32, the mean logarithm of the gradient norm; counted: int32, the norms in it;
    skipped and in_a_row: int32, the steps skipped so far, and those since the last update.
    """
    counts = {name: jnp.zeros((), jnp.int32) for name in ('counted', 'skipped', 'in_a_row')}
    return {'log_norm': jnp.zeros((), jnp.float32)} | counts


def count_updates(step: Array, history: Tree) -> Array:
    """Returns the number of updates before this step: all steps but those that were skipped."""
    return step - history['skipped']


def judge(norm: Array, history: Tree, guard: ConfigDict) -> tuple[Array, Tree]:
    """Decides whether to apply a step with this gradient norm (bool), and updates the history.

    Compares the norm with a geometric mean, which the few large norms of a healthy run move little:
    of all steps at first, then with a weight of 1/guard.history for the newest. Skipped steps do
    not enter it. Before it holds guard.history steps, no norm is too large.
    """
    log_norm, counted = history['log_norm'], history['counted']
    apply = jnp.array(True)
    if guard.nonfinite:
        apply &= jnp.isfinite(norm)
    if guard.spike_factor:
        spike = norm > guard.spike_factor * jnp.exp(log_norm)
        apply &= ~(spike & (counted >= guard.history))
    counts = apply & jnp.isfinite(norm) & (norm > 0)
    weight = 1 / jnp.minimum(counted + 1, guard.history).astype(jnp.float32)
    moved = log_norm + weight * (jnp.log(norm) - log_norm)
    after = {
        'log_norm': jnp.where(counts, moved, log_norm),
        'counted': counted + counts,
        'skipped': history['skipped'] + ~apply,
        'in_a_row': jnp.where(apply, 0, history['in_a_row'] + 1),
    }
    return apply, after


def select(apply: Array, new: Tree, old: Tree) -> Tree:
    """Returns the new leaves if the step is to be applied, otherwise the old ones.

    Elementwise, so that the update is still written over the donated state; `lax.cond` would keep
    the old state beside it.
    """
    return jax.tree.map(lambda x, y: jnp.where(apply, x, y), new, old)
