"""Attention where cp cuts the sequence: keys and values travel, queries stay.

Each device of cp has two parts of the sequence (`parallel.zigzag`). By model.cp_style:

    gather   what keys and values are made of comes from all devices at once
    ring     it goes from device to device, while each computes with what it has
             (Liu et al. 2023, "Ring Attention with Blockwise Transformers", arXiv:2310.01889)

What travels is given as it is before it is expanded to heads: for latent attention the latent and
the rotary key. Documents need not travel, as all devices of cp read whole rows of tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import QKV, ModelConfig
from layers.attention_kernels import (
    add_gradients,
    add_keys,
    attention,
    no_keys,
    output_gradients,
    softmax_of,
)
from layers.rope_scaling import attention_scale
from parallel import CP, Array, Tree, gather_zigzag, pass_on

STYLES = ('ring', 'gather')
# (weights, travels) -> keys and values, [B, K, S, H] each, of the positions that travel.
Expand = Callable[[Tree, Tree], tuple[Array, Array]]


def attention_over_cp(
    q_BkGTH: Array,
    travels: Tree,
    weights: Tree,
    expand: Expand,
    documents_BS: Array | None,
    cfg: ModelConfig,
) -> Array:
    """Computes attention of this device's queries over the whole sequence: [B, K, G, T, value head
    size], with T positions a device of cp.

    `travels` are arrays of this device's positions, [..., T, size]; `documents_BS` those of all.
    """
    if lax.axis_size(CP) > 1 and cfg.cp_style == 'ring':
        q_BkGTH, travels = checkpoint_name((q_BkGTH, travels), QKV)
        scale = attention_scale(cfg, q_BkGTH.shape[-1])
        return ring_attention(q_BkGTH, travels, weights, documents_BS, expand, scale, cfg)
    travels = jax.tree.map(lambda x: gather_zigzag(x, CP, -2), travels)
    return attention(q_BkGTH, *expand(weights, travels), documents_BS, cfg)


def ring_pairs(T: int, devices: int, cfg: ModelConfig) -> tuple[int, np.ndarray]:
    """Returns the size of the blocks, and tables of pairs: int32 [steps, devices, pairs, 4].

    In step s, device i has the keys of device i - s. Of its two parts and theirs, two pairs of
    parts are visible, whichever s and i; its own add the blocks on the diagonal, whose places are
    left out in the other steps.
    """
    block = min(cfg.attention_block, T // 2)
    n = T // 2 // block
    tables = np.full((devices, devices, 2 * n * n + n, 4), -1, np.int32)
    tables[..., :2] = 0
    for s in range(devices):
        for i in range(devices):
            of_q, of_k = ([(0, d), (1, 2 * devices - 1 - d)] for d in (i, (i - s) % devices))
            rows = [
                (q_here * n + a, k_here * n + b, q_part * n + a, k_part * n + b)
                for q_here, q_part in of_q
                for a in range(n)
                for k_here, k_part in of_k
                for b in range(n)
                if k_part * n + b <= q_part * n + a
            ]
            tables[s, i, : len(rows)] = rows
    return block, tables


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ring_attention(
    q_BkGTH: Array,
    travels: Tree,
    weights: Tree,
    documents_BS: Array | None,
    expand: Expand,
    scale: float,
    cfg: ModelConfig,
) -> Array:
    """Computes `attention_over_cp` around the ring, with the running softmax of blockwise.

    Forward: n - 1 collective permutes of what travels, each while a device computes with what it
    has. Backward: as many again, and n + 1 of its gradients, in float32, the first of zeros: they
    go around with the positions that they belong to, and so end at home.
    """
    return _ring_forward(q_BkGTH, travels, weights, documents_BS, expand, scale, cfg)[0]


def _tables(q: Array, cfg: ModelConfig) -> tuple[int, Array]:
    """Returns the size of the blocks, and this device's table of each step."""
    block, tables = ring_pairs(q.shape[-2], lax.axis_size(CP), cfg)
    return block, jnp.asarray(tables)[:, lax.axis_index(CP)]


def _next(x: Tree) -> Tree:
    return jax.tree.map(lambda x: pass_on(x, CP), x)


def _ring_forward(q, travels, weights, documents, expand: Expand, scale: float, cfg: ModelConfig):
    block, tables = _tables(q, cfg)

    def add(sums: Tree, here: Tree, pairs: Array) -> Tree:
        keys, values = expand(weights, here)
        return add_keys(sums, q, keys, values, documents, pairs, block, scale, cfg, True)

    def step(carry: tuple, pairs: Array):
        sums, here = carry
        following = _next(here)
        return (add(sums, here, pairs), following), None

    v_dim = jax.eval_shape(expand, weights, travels)[1].shape[-1]
    (sums, here), _ = lax.scan(step, (no_keys(q, v_dim), travels), tables[:-1])
    out, logsumexp = softmax_of(add(sums, here, tables[-1]), q.dtype)
    return out, (q, travels, weights, documents, out, logsumexp)


def _ring_backward(expand: Expand, scale: float, cfg: ModelConfig, saved: tuple, d_out: Array):
    q, travels, weights, documents, out, logsumexp = saved
    block, tables = _tables(q, cfg)
    of_output = output_gradients(out, logsumexp, d_out)

    def add(grads: tuple, here: Tree, pairs: Array) -> tuple:
        dq, d_weights, d_here = grads
        (keys, values), pull = jax.vjp(expand, weights, here)
        start = (dq, *(jnp.zeros_like(x, dtype=jnp.float32) for x in (keys, values)))
        dq, dk, dv = add_gradients(
            start, q, keys, values, documents, of_output, pairs, block, scale, cfg, True
        )
        new = pull((dk.astype(keys.dtype), dv.astype(values.dtype)))
        return dq, *jax.tree.map(jnp.add, (d_weights, d_here), new)

    def step(carry: tuple, pairs: Array):
        (dq, d_weights, d_here), here = carry
        following, arrived = _next(here), _next(d_here)
        return (add((dq, d_weights, arrived), here, pairs), following), None

    start = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), (q, weights, travels))
    ((dq, d_weights, d_here), here), _ = lax.scan(step, (start, travels), tables[:-1])
    dq, d_weights, d_here = add((dq, d_weights, _next(d_here)), here, tables[-1])
    d_travels = _next(d_here)
    like = functools.partial(jax.tree.map, lambda d, x: d.astype(x.dtype))
    return dq.astype(q.dtype), like(d_travels, travels), like(d_weights, weights), None


ring_attention.defvjp(_ring_forward, _ring_backward)
