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
from layers.attention_kernels import attention
from layers.blockwise import (
    add_gradients,
    add_keys,
    block_of_parts,
    filled_up,
    no_keys,
    output_gradients,
    sink_gradients,
    softmax_of,
    visible_blocks,
)
from layers.rope_scaling import attention_scale
from parallel import CP, Array, Tree, gather_zigzag, pass_on, zigzag_parts

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
    sinks_kG: Array | None = None,
) -> Array:
    """Computes attention of this device's queries over the whole sequence: [B, K, G, T, value head
    size], with T positions a device of cp.

    `travels` are arrays of this device's positions, [..., T, size]; `documents_BS` those of all;
    `sinks_kG` a score of each head without a value.
    """
    if lax.axis_size(CP) > 1 and cfg.cp_style == 'ring':
        q_BkGTH, travels = checkpoint_name((q_BkGTH, travels), QKV)
        scale = attention_scale(cfg, q_BkGTH.shape[-1])
        return ring_attention(q_BkGTH, travels, weights, documents_BS, expand, scale, cfg, sinks_kG)
    travels = jax.tree.map(lambda x: gather_zigzag(x, CP, -2), travels)
    return attention(q_BkGTH, *expand(weights, travels), documents_BS, cfg, sinks_kG)


def ring_pairs(T: int, devices: int, cfg: ModelConfig) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns the size of the blocks, and tables of pairs: of a device's own keys, int32
    [devices, pairs, 4], and of those that arrive, int32 [steps, devices, pairs, 4].

    In step s, device i has the keys of device i - s. Of its two parts and theirs, two pairs of
    parts are visible, whichever s and i; its own have the blocks on the diagonal beside. A window
    leaves those near the diagonal, in the first and the last step or a few more; then rows of -1
    fill the tables up, which cost nothing.
    """
    block = block_of_parts(T, 2, cfg)

    def table(i: int, source: int) -> np.ndarray:
        of_q, of_k = (zigzag_parts(d, devices) for d in (i, source))
        return visible_blocks(of_q, of_k, T // 2 // block, block, cfg)

    every = range(devices)
    own = [table(i, i) for i in every]
    others = np.array([])
    if devices > 1:
        others = filled_up([table(i, (i - s) % devices) for s in every[1:] for i in every])
        others = others.reshape(devices - 1, devices, *others.shape[1:])
    return block, filled_up(own), others


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
    sinks_kG: Array | None = None,
) -> Array:
    """Computes `attention_over_cp` around the ring, with the running softmax of blockwise.

    Forward: n - 1 times what travels goes on, each time while a device computes with what it has.
    Backward: as often again, and n times its gradients, in float32: they go around with the
    positions that they belong to, and so end at home.
    """
    return _ring_forward(q_BkGTH, travels, weights, documents_BS, expand, scale, cfg, sinks_kG)[0]


def _tables(q: Array, cfg: ModelConfig) -> tuple[int, Array, Array]:
    """Returns the size of the blocks, and this device's tables: own, and one a step."""
    block, own, others = ring_pairs(q.shape[-2], lax.axis_size(CP), cfg)
    i = lax.axis_index(CP)
    return block, jnp.asarray(own)[i], jnp.asarray(others)[:, i] if len(others) else None


def _next(x: Tree, cfg: ModelConfig) -> Tree:
    return jax.tree.map(lambda x: pass_on(x, CP, cfg.ragged), x)


def _ring_forward(
    q, travels, weights, documents, expand: Expand, scale: float, cfg: ModelConfig, sinks
):
    block, own, others = _tables(q, cfg)

    def add(sums: Tree, here: Tree, pairs: Array) -> Tree:
        return add_keys(sums, q, *expand(weights, here), documents, pairs, block, scale, cfg)

    def step(carry: tuple, pairs: Array):
        sums, here = carry
        following = _next(here, cfg)
        return (add(sums, here, pairs), following), None

    v_dim = jax.eval_shape(expand, weights, travels)[1].shape[-1]
    sums = no_keys(q, v_dim)
    if others is None:
        sums = add(sums, travels, own)
    else:
        arriving = _next(travels, cfg)
        (sums, here), _ = lax.scan(step, (add(sums, travels, own), arriving), others[:-1])
        sums = add(sums, here, others[-1])
    out, logsumexp = softmax_of(sums, sinks, q.dtype)
    return out, (q, travels, weights, documents, sinks, out, logsumexp)


def _ring_backward(expand: Expand, scale: float, cfg: ModelConfig, saved: tuple, d_out: Array):
    q, travels, weights, documents, sinks, out, logsumexp = saved
    block, own, others = _tables(q, cfg)
    of_output = output_gradients(out, logsumexp, d_out)

    def add(grads: tuple, here: Tree, pairs: Array) -> tuple:
        dq, d_weights, d_here = grads
        (keys, values), pull = jax.vjp(expand, weights, here)
        start = (dq, *(jnp.zeros_like(x, dtype=jnp.float32) for x in (keys, values)))
        dq, dk, dv = add_gradients(
            start, q, keys, values, documents, of_output, pairs, block, scale, cfg
        )
        new = pull((dk.astype(keys.dtype), dv.astype(values.dtype)))
        return dq, *jax.tree.map(jnp.add, (d_weights, d_here), new)

    def step(carry: tuple, pairs: Array):
        (dq, d_weights, d_before), here = carry
        following, d_here = _next(here, cfg), _next(d_before, cfg)
        return (add((dq, d_weights, d_here), here, pairs), following), None

    grads = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), (q, weights, travels))
    if others is None:
        dq, d_weights, d_travels = add(grads, travels, own)
    else:
        arriving = _next(travels, cfg)
        (grads, here), _ = lax.scan(step, (add(grads, travels, own), arriving), others[:-1])
        dq, d_weights, d_before = grads
        dq, d_weights, d_here = add((dq, d_weights, _next(d_before, cfg)), here, others[-1])
        d_travels = _next(d_here, cfg)
    like = functools.partial(jax.tree.map, lambda d, x: d.astype(x.dtype))
    d_sinks = sink_gradients(sinks, of_output)
    return dq.astype(q.dtype), like(d_travels, travels), like(d_weights, weights), None, d_sinks


ring_attention.defvjp(_ring_forward, _ring_backward)
