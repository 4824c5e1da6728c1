"""AdamW, learning-rate schedules and global-norm clipping: pure functions on sharded trees.

Everything here is elementwise on the shards that a device holds, except the one number that
clipping needs. Parameters (the float32 master copy) and moments are sharded alike.
"""

import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from config import OptimizerConfig
from parallel import Array, Tree, global_sum_of_squares, map_params


def learning_rate(step: Array, cfg: OptimizerConfig) -> Array:
    """The rate of update number `step` (from 0): float32 scalar.

    Linear warmup to peak_lr, then 'cosine': half a cosine to final_lr at the last step
    (Loshchilov & Hutter 2017); 'wsd': constant, then linear to final_lr over the last decay_steps
    (warmup-stable-decay, Hu et al. 2024).
    """
    step = step.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    if cfg.schedule == 'cosine':
        span = max(cfg.steps - 1 - cfg.warmup_steps, 1)
        done = jnp.clip((step - cfg.warmup_steps) / span, 0, 1)
        share = 0.5 * (1 + jnp.cos(math.pi * done))
    else:
        share = jnp.clip((cfg.steps - 1 - step) / max(cfg.decay_steps, 1), 0, 1)
    return warmup * (cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * share)


def adamw_init(params: Tree) -> Tree:
    """Zero moments: {'m': tree, 'v': tree}, float32, sharded like the parameters."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, params), out_shardings=shardings)
    return {'m': zeros(), 'v': zeros()}


def clip_by_global_norm(grads: Tree, declared: Tree, max_norm: float) -> tuple[Tree, Array]:
    """Scales the gradient of the whole model to at most max_norm (0: as it is); its norm before.

    Moves one float32 number a device (`global_sum_of_squares`).
    """
    norm = jnp.sqrt(global_sum_of_squares(grads, declared))
    if max_norm == 0:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads), norm


def adamw(
    params: Tree, grads: Tree, moments: Tree, step: Array, declared: Tree, cfg: OptimizerConfig
) -> tuple[Tree, Tree]:
    """One update, step counting from 0 -> (parameters, moments), all float32.

    Decay is decoupled (Loshchilov & Hutter 2019) and for matrices only: gains stay free.
    """
    lr = learning_rate(step, cfg)
    t = (step + 1).astype(jnp.float32)
    m_scale, v_scale = 1 / (1 - cfg.b1**t), 1 / (1 - cfg.b2**t)
    m = jax.tree.map(lambda m, g: cfg.b1 * m + (1 - cfg.b1) * g, moments['m'], grads)
    v = jax.tree.map(lambda v, g: cfg.b2 * v + (1 - cfg.b2) * g * g, moments['v'], grads)

    def update(p, x: Array, m: Array, v: Array) -> Array:
        if not p.trainable:
            return x
        direction = m * m_scale / (jnp.sqrt(v * v_scale) + cfg.eps)
        decay = cfg.weight_decay if p.matrix else 0.0
        return x - lr * (direction + decay * x)

    return map_params(update, declared, params, m, v), {'m': m, 'v': v}


def init_history() -> Tree:
    """What the next step is judged by; scalars, alike on all devices.

    log_norm: float32, the mean logarithm of the gradient norm; counted: int32, the norms in it;
    skipped and in_a_row: int32, the steps skipped so far, and those since the last update.
    """
    counts = {name: jnp.zeros((), jnp.int32) for name in ('counted', 'skipped', 'in_a_row')}
    return {'log_norm': jnp.zeros((), jnp.float32)} | counts


def judge(norm: Array, history: Tree, guard: ConfigDict) -> tuple[Array, Tree]:
    """Whether a step with this gradient norm is to be applied (bool), and the history after it.

    The norm is compared with a geometric mean, which the few large norms of a healthy run move
    little: of all steps at first, then with a weight of 1/guard.history for the newest. Skipped
    steps do not enter it. It judges once it holds guard.history steps.
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
    """The new leaves if the step is to be applied, otherwise the old ones.

    Elementwise, so that the update is still written over the donated state; `lax.cond` would keep
    the old state beside it.
    """
    return jax.tree.map(lambda x, y: jnp.where(apply, x, y), new, old)
