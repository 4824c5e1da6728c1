"""Causal attention over pairs of blocks of queries and keys, by a running softmax, on any platform.

Pairs that the mask hides for all rows alike are not computed. Memory does not grow with T².
`add_keys` and `add_gradients` do one block of keys; context_parallel.py goes on from one device to
the next with the same running sums.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import ATTENTION_OUTPUT, ModelConfig
from layers import mask
from parallel import CP, Array, Tree, zigzag_parts

MASKED = -1e30  # finite, so that a row without a visible key in one block yields no NaN


# A table of pairs has a row for each pair of blocks to compute, int32 [n, 4]: where the block of
# queries and the block of keys lie in their arrays, and their numbers in the sequence, by which
# they are masked. Tables of several devices are filled up with rows of -1, which cost nothing.


def visible_blocks(
    of_q: Sequence[int], of_k: Sequence[int], n: int, block: int, cfg: ModelConfig
) -> np.ndarray:
    """Returns the table of pairs of arrays that hold these parts of a sequence, of n blocks each.

    On and below the diagonal. A block of keys that lies before the windows of all queries of a
    block is left out: the first query, whose window begins first, does not see the last key.
    """
    i, j = (np.add.outer(np.array(parts) * n, np.arange(n)).reshape(-1) for parts in (of_q, of_k))
    apart = i[:, None] - j
    seen = apart >= 0
    if cfg.window:
        seen &= apart * block - (block - 1) < cfg.window
    a, b = np.nonzero(seen)
    return np.stack((a, b, i[a], j[b]), axis=-1).astype(np.int32)


def filled_up(tables: list[np.ndarray]) -> np.ndarray:
    """Joins tables of pairs, each as long as the longest: int32 [tables, pairs, 4]."""
    filled = np.full((len(tables), max(map(len, tables)), 4), -1, np.int32)
    for row, table in zip(filled, tables, strict=True):
        row[: len(table)] = table
    return filled


def block_of_parts(T: int, parts: int, cfg: ModelConfig) -> int:
    """Returns the size of the blocks of T positions that are so many parts of a sequence.

    Raises ValueError if a part is no whole number of blocks.
    """
    block = min(cfg.attention_block, T // parts)
    if not block or T % (block * parts):
        raise ValueError(
            f'{T} positions in {parts} parts are not cut evenly by model.attention_block='
            f'{cfg.attention_block}; use an attention_block that divides each of the parts'
        )
    return block


def pairs_of_blocks(T: int, S: int, cfg: ModelConfig) -> tuple[int, Array | np.ndarray]:
    """Returns the size of the blocks and the table of pairs, for T queries of a sequence of S keys.

    On and below the diagonal, and within the layer's window; where cp cuts the sequence, of the two
    parts that are this device's (`zigzag`).
    """
    devices = S // T
    if devices == 1:
        block = block_of_parts(T, 1, cfg)
        return block, visible_blocks([0], [0], T // block, block, cfg)
    block, every = block_of_parts(T, 2, cfg), range(2 * devices)
    n = T // 2 // block
    tables = filled_up(
        [visible_blocks(zigzag_parts(i, devices), every, n, block, cfg) for i in range(devices)]
    )
    return block, jnp.asarray(tables)[lax.axis_index(CP)]


def _block(x: Array, i: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=-2)


def _put(x: Array, i: Array, value: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, value, i * value.shape[-2], axis=-2)


def _scores(
    q: Array,
    k: Array,
    documents: Array | None,
    i: Array,
    j: Array,
    scale: float,
    cfg: ModelConfig,
) -> Array:
    """Returns masked scores of query block i and key block j of the sequence: float32
    [B, K, G, block, block]."""
    block = q.shape[-2]
    within, of_q, of_k = jnp.arange(block), None, None
    if documents is not None:
        of_q, of_k = (lax.dynamic_slice_in_dim(documents, n * block, block, 1) for n in (i, j))
        of_q, of_k = of_q[:, None, None, :, None], of_k[:, None, None, None, :]
    seen = mask.visible((i * block + within)[:, None], j * block + within, of_q, of_k, cfg)
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores * scale, MASKED)


def _held(q: Array, *x: Tree) -> tuple[Tree, ...]:
    """Returns documents and pairs as they are, but as if they depended on q.

    The derivative of a scan over layers takes out of it what depends on no layer (jax 0.10 and
    0.12), so here the masks of all pairs at once, for each head: as many bytes as all scores.
    """
    return lax.optimization_barrier((q[..., :1, :1], *x))[1:]


def _over_pairs(
    step: Callable[[Tree, Array], Tree],
    carry: Tree,
    pairs: Array,
    documents: Array | None,
    block: int,
    cfg: ModelConfig,
) -> Tree:
    """Scans `step` over the pairs, but for those whose blocks share no document: in any row of the
    batch, the keys' last document comes before the queries' first one."""

    def shared(pair: Array) -> Array:
        if documents is None:
            return True
        first, last = pair[2] * block, pair[3] * block + block - 1
        of_q, of_k = (lax.dynamic_index_in_dim(documents, n, 1) for n in (first, last))
        return jnp.any(of_q <= of_k)

    def always(carry: Tree, pair: Array) -> tuple[Tree, None]:
        return step(carry, pair), None

    def if_shared(carry: Tree, pair: Array) -> tuple[Tree, None]:
        seen = shared(pair) & (pair[0] >= 0) if filled else shared(pair)
        return lax.cond(seen, step, lambda carry, _: carry, carry, pair), None

    filled = cfg.window > 0 and cfg.cp > 1  # devices see unequally many blocks: `filled_up`
    return lax.scan(if_shared if filled or documents is not None else always, carry, pairs)[0]


class Sums(NamedTuple):
    """The running softmax of each query over the keys so far, float32."""

    out: Array  # Σ exp(score - top) v: [B, K, G, T, value head size]
    top: Array  # the largest score: [B, K, G, T, 1]
    total: Array  # Σ exp(score - top)


def no_keys(q: Array, v_dim: int) -> Sums:
    """Returns the running softmax over no keys."""
    zeros = functools.partial(jnp.zeros_like, q, dtype=jnp.float32)
    of_row = (*q.shape[:-1], 1)
    return Sums(
        zeros(shape=(*q.shape[:-1], v_dim)), zeros(shape=of_row) + MASKED, zeros(shape=of_row)
    )


def add_keys(
    sums: Sums, q: Array, k: Array, v: Array, documents: Array | None, pairs: Array, block: int,
    scale: float, cfg: ModelConfig,
) -> Sums:  # fmt: skip
    """Adds the pairs of a table to the running softmax (FlashAttention-2, Dao 2023)."""
    documents, pairs = _held(q, documents, pairs)

    def step(carry: Sums, pair: Array) -> Sums:
        out, top, total = carry
        i, j = pair[0], pair[1]
        q_i, k_j, v_j = _block(q, i, block), _block(k, j, block), _block(v, j, block)
        scores = _scores(q_i, k_j, documents, pair[2], pair[3], scale, cfg)
        old_top = _block(top, i, block)
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
        p = jnp.exp(scores - new_top)
        shrink = jnp.exp(old_top - new_top)
        pv = jnp.einsum(
            'bkgts,bksh->bkgth', p.astype(v.dtype), v_j, preferred_element_type=jnp.float32
        )
        out = _put(out, i, _block(out, i, block) * shrink + pv)
        total = _put(total, i, _block(total, i, block) * shrink + jnp.sum(p, -1, keepdims=True))
        return Sums(out, _put(top, i, new_top), total)

    return _over_pairs(step, sums, pairs, documents, block, cfg)


def softmax_of(sums: Sums, sinks_kG: Array | None, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns attention's output and the log-sum-exp of the scores, named for rematerialization.

    A sink is a score of its head without a value, for every query (Agarwal et al. 2025, "gpt-oss").
    """
    out, logsumexp = sums.out / sums.total, sums.top + jnp.log(sums.total)
    if sinks_kG is not None:
        of_keys, logsumexp = logsumexp, jnp.logaddexp(logsumexp, sinks_kG[:, :, None, None])
        out *= jnp.exp(of_keys - logsumexp)
    out = checkpoint_name(out.astype(dtype), ATTENTION_OUTPUT)
    return out, checkpoint_name(logsumexp, ATTENTION_OUTPUT)


def add_gradients(
    grads: tuple[Array, Array, Array], q: Array, k: Array, v: Array, documents: Array | None,
    saved: tuple[Array, Array, Array], pairs: Array, block: int, scale: float, cfg: ModelConfig,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Adds the gradients of the pairs of a table to those of q, k and v, float32.

    Recomputes the scores from `saved`: the gradient of the output, the log-sum-exp, and the sum of
    output · gradient of each query.
    """
    d_out, logsumexp, delta = saved
    f32 = {'preferred_element_type': jnp.float32}

    def step(carry: tuple, pair: Array) -> tuple:
        dq, dk, dv = carry
        i, j = pair[0], pair[1]
        q_i, k_j, v_j = _block(q, i, block), _block(k, j, block), _block(v, j, block)
        do_i = _block(d_out, i, block)
        scores = _scores(q_i, k_j, documents, pair[2], pair[3], scale, cfg)
        p = jnp.exp(scores - _block(logsumexp, i, block))
        dp = jnp.einsum('bkgth,bksh->bkgts', do_i, v_j, **f32)
        ds = (p * (dp - _block(delta, i, block)) * scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dq_i = jnp.einsum('bkgts,bksh->bkgth', ds, k_j, **f32)
        dk_j = jnp.einsum('bkgts,bkgth->bksh', ds, q_i, **f32)
        dv_j = jnp.einsum('bkgts,bkgth->bksh', p, do_i, **f32)
        dq = _put(dq, i, _block(dq, i, block) + dq_i)
        dk = _put(dk, j, _block(dk, j, block) + dk_j)
        dv = _put(dv, j, _block(dv, j, block) + dv_j)
        return dq, dk, dv

    return _over_pairs(step, grads, pairs, documents, block, cfg)


def output_gradients(out: Array, logsumexp: Array, d_out: Array) -> tuple[Array, Array, Array]:
    """Returns what `add_gradients` takes as `saved`."""
    delta = jnp.einsum('...h,...h->...', out, d_out, preferred_element_type=jnp.float32)
    return d_out, logsumexp, delta[..., None]


def sink_gradients(sinks_kG: Array | None, saved: tuple[Array, Array, Array]) -> Array | None:
    """Returns the gradients of sinks from the same: each query's share in one weighs no value."""
    if sinks_kG is None:
        return None
    _, logsumexp, delta = saved
    shares = jnp.exp(sinks_kG[:, :, None, None] - logsumexp)
    return -jnp.sum(shares * delta, axis=(0, 3, 4))


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BS: Array | None,
    scale: float,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
) -> Array:
    """Computes softmax(scale · q kᵀ + mask) v: [B, K, G, T, value head size].

    A query sees the keys that are `visible`; `sinks_kG`, float32, join the softmax's denominator.
    Blockwise with a running maximum and sum: one scan over the pairs of blocks on and below the
    diagonal, so the program does not grow with T, blocks above the diagonal, before the window or
    without a common document cost nothing, and no score array exceeds B·N·block². The backward pass
    recomputes the scores from the saved log-sum-exp. Scores and softmax are float32 whatever the
    inputs are. Queries may be those of this device of cp alone.
    """
    return _attention_forward(q_BkGTH, k_BkSH, v_BkSH, documents_BS, scale, cfg, sinks_kG)[0]


def _attention_forward(q, k, v, documents, scale: float, cfg: ModelConfig, sinks):
    block, pairs = pairs_of_blocks(q.shape[-2], k.shape[-2], cfg)
    sums = add_keys(no_keys(q, v.shape[-1]), q, k, v, documents, pairs, block, scale, cfg)
    out, logsumexp = softmax_of(sums, sinks, q.dtype)
    return out, (q, k, v, documents, sinks, out, logsumexp)


def _attention_backward(scale: float, cfg: ModelConfig, saved: tuple, d_out: Array):
    q, k, v, documents, sinks, out, logsumexp = saved
    block, pairs = pairs_of_blocks(q.shape[-2], k.shape[-2], cfg)
    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    of_output = output_gradients(out, logsumexp, d_out)
    dq, dk, dv = add_gradients(start, q, k, v, documents, of_output, pairs, block, scale, cfg)
    d_sinks = sink_gradients(sinks, of_output)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, d_sinks


causal_attention.defvjp(_attention_forward, _attention_backward)
