"""AdamW, learning-rate schedules and global-norm clipping: pure functions on sharded trees.

Everything here is elementwise on the shards that a device holds, except the one number that
clipping needs. Parameters (the float32 master copy) and moments are sharded alike.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from parallel import Array, Tree, global_sum_of_squares, map_params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Choices of one run; configs/default.py explains each field. `steps` is the run's length."""

    steps: int
    schedule: str
    peak_lr: float
    final_lr: float
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


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
