"""Causal attention for one device's heads: blockwise on any platform, and the kernels that ship in
jax, splash attention on TPU and cuDNN's on GPU. ATTENTION_KERNELS lists them.

All take (q_BkGTH, k_BkSH, v_BkSH, documents_BT or None, scale, cfg, sinks_kG or None), with the
config of the layer (`config.of_layer`), and return [B, K, G, T, value head size]. What a query sees
stands once, in `visible`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, QKV, ModelConfig
from layers.kernels import Kernel
from layers.rope_scaling import attention_scale
from parallel import CP, Array, P, Tree, local_slice, zigzag, zigzag_order, zigzag_parts

# ---------------------------------------------------------------------------------------------
# The mask
# ---------------------------------------------------------------------------------------------


def visible(
    q_position: Array,
    k_position: Array,
    q_document: Array | None,
    k_document: Array | None,
    cfg: ModelConfig | ConfigDict,
) -> Array:
    """Returns whether queries see keys: the one mask of training, prefill and decoding.

    Positions count from the start of a row; documents are numbers, or None where all is one. Shapes
    are broadcast. In a layer with a window a query sees so many positions, its own and those right
    before it. An edit here changes all three alike; a query must see itself and nothing later.
    Kernels with a mask of their own are then refused, and 'auto' takes blockwise
    (`own_mask_errors`). Blockwise skips what is later than a query or before its window.
    """
    seen = q_position >= k_position
    if cfg.window:
        seen &= q_position - k_position < cfg.window
    return seen if q_document is None else seen & (q_document == k_document)


def cached_visible(positions_B: Array, starts_B: Array, S: int, cfg: ModelConfig) -> Array:
    """Returns which entries of a cache of S the query at each row's position sees: bool [B, S].

    Its document began at the position `starts`. Its own entry is not in the cache yet.
    """
    k_BS = cached_positions(positions_B, S)
    before_BS = (k_BS < starts_B[:, None]).astype(jnp.int32)  # 1: another document
    seen_BS = visible(positions_B[:, None], k_BS, 0, before_BS, cfg)
    return seen_BS & (k_BS >= 0)


def cached_positions(lengths_B: Array, S: int) -> Array:
    """Returns the positions in a cache of S entries, after so many positions: int32 [B, S].

    Position p is entry p modulo S, so the cache holds the last S positions. Entries that hold none
    yet have negative numbers.
    """
    last_B1 = lengths_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(S)) % S


def cache_size(context: int, cfg: ModelConfig) -> int:
    """Counts the positions that a layer's cache holds, of a context of so many."""
    return min(cfg.window, context) if cfg.window else context


def own_mask_errors(kernel: str, config: ConfigDict) -> Iterator[str]:
    """Yields an error if `visible` is not the mask that the kernel computes by itself: causal, and
    within the layer's window.

    Looks at the first query and the last one, which sees keys at all distances.
    """
    q, k = np.array([[0], [config.seq_len - 1]]), np.arange(config.seq_len)
    for documents in ((None, None), (0, k % 2)):
        own = (q >= k) & (True if documents[0] is None else documents[1] == 0)
        own &= q - k < (config.model.window or config.seq_len)
        if not np.array_equal(visible(q, k, *documents, config.model), own):
            yield (
                f'model.attention_kernel={kernel!r} computes a causal mask of its own, and '
                f"attention_kernels.visible another one; use the kernel 'blockwise'"
            )
            return


# ---------------------------------------------------------------------------------------------
# Blockwise, on any platform
# ---------------------------------------------------------------------------------------------

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
    seen = visible((i * block + within)[:, None], j * block + within, of_q, of_k, cfg)
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


# ---------------------------------------------------------------------------------------------
# Splash attention, on TPU
# ---------------------------------------------------------------------------------------------

SPLASH_LANES = 128  # the sides of its blocks are multiples of this


def splash_blocks(T: int, S: int, cfg: ModelConfig) -> tuple[int, int]:
    """Returns the sizes of blocks of queries, and of keys in the backward pass.

    It leaves a gradient of all queries for each block of keys: large ones make fewer of these, and
    compute some blocks in vain.
    """
    size = min(cfg.attention_block, T if T == S else T // 2)
    return size, 2 * size if S % (2 * size) == 0 else size


def splash_partials(T: int, S: int, cfg: ModelConfig) -> int:
    """Returns how many gradients of all queries the backward pass has before it adds them."""
    return S // splash_blocks(T, S, cfg)[1]


def splash_attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BS: Array | None,
    scale: float,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Computes `causal_attention` by a Pallas kernel for TPU (jax's splash attention).

    Skips the blocks above the diagonal and before the window. Backward is one kernel of five
    matmuls, which leaves partial gradients of the queries to be added up (`splash_blocks`). Heads
    of 64 fill half of a matrix unit's 128 lanes, so MLA's values of 64 cost as much as 128 would;
    queries and keys may be wider than values. Output and log-sum-exp, which backward needs, are
    named ATTENTION_OUTPUT for rematerialization. Where cp cuts the sequence, the mask is that of
    its zigzag, of which each device takes its rows.
    """
    # Importing Pallas takes a second, which runs without it need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, K, G, T, H = q_BkGTH.shape
    S = k_BkSH.shape[2]
    devices = S // T  # of cp
    size, keys = splash_blocks(T, S, cfg)
    if cfg.window:
        mask = masks.LocalMask((S, S), (cfg.window - 1, 0), offset=0, shard_count=devices)
    else:
        mask = masks.CausalMask((S, S), shard_count=devices)
    mask.q_sequence = zigzag_order(S, devices)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (K * G)),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=keys,
            block_kv_dkv_compute=size,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    if devices > 1:
        kernel = _own_queries(kernel, devices)
    q_BnTH = (q_BkGTH * scale).astype(q_BkGTH.dtype).reshape(B, K * G, T, H)
    segments = None
    if documents_BS is not None:
        own_BT = zigzag(documents_BS, CP, 1) if devices > 1 else documents_BS
        segments = splash.SegmentIds(own_BT, documents_BS)
    sinks_n = None if sinks_kG is None else sinks_kG.reshape(-1)
    attend = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    out_BnTH = attend(q_BnTH, k_BkSH, v_BkSH, segments, sinks_n)
    return out_BnTH.reshape(B, K, G, T, v_BkSH.shape[-1])


def _own_queries(kernel: Tree, devices: int) -> Tree:
    """Takes this device's rows of a splash kernel's mask for the queries of all devices of cp."""
    sharding = NamedSharding(AbstractMesh((devices,), (CP,)), P(None, CP))
    specs = kernel.manual_sharding_spec(sharding)

    def own(spec: P, x: Array) -> Array:
        for dim, axis in enumerate(spec):
            x = local_slice(x, axis, dim) if axis else x
        return x

    return jax.tree.map(own, specs, kernel, is_leaf=lambda x: isinstance(x, P))


def splash_rules(config: ConfigDict, _: int) -> Iterator[str]:
    """Yields errors for blocks and masks that splash attention does not take."""
    cp = config.mesh.cp
    if cp > 1 and config.cp_style == 'ring':
        yield (
            f"model.attention_kernel='splash' gives no sums that a ring could go on with, and "
            f"cp_style='ring' with mesh.cp={cp}; use cp_style='gather', or the kernel 'blockwise'"
        )
    block = min(config.model.attention_block, config.seq_len // (2 * cp if cp > 1 else 1))
    if block % SPLASH_LANES:
        yield (
            f'model.attention_block={config.model.attention_block} with seq_len={config.seq_len} '
            f'makes blocks of {block}, and splash takes multiples of {SPLASH_LANES}; use a '
            f'multiple of it that divides seq_len'
        )
    yield from own_mask_errors('splash', config)


# ---------------------------------------------------------------------------------------------
# cuDNN, on GPU
# ---------------------------------------------------------------------------------------------

CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'  # its primitive
CUDNN_HEAD = 128  # the largest head size that it takes on every GPU; on Hopper and later 256


def cudnn_attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BT: Array | None,
    scale: float,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
    implementation: str = 'cudnn',
) -> Array:
    """Computes `causal_attention` by cuDNN, in bfloat16 (`jax.nn.dot_product_attention`).

    Chooses blocks itself. Takes one head size only: values narrower than keys are padded with
    zeros, which for MLA costs the matmuls with values as much as those with keys. Documents become
    a mask of [B, 1, T, T], which cuDNN reads as a bias: B·T² numbers more, where blockwise and
    splash hold none. jax names no result of it, so what backward needs is kept by its primitive.
    Takes no sinks (`cudnn_rules`).
    """
    del sinks_kG
    B, K, G, T, H = q_BkGTH.shape
    v_dim, mask = v_BkSH.shape[-1], None
    v_BkSH = jnp.pad(v_BkSH, ((0, 0), (0, 0), (0, 0), (0, H - v_dim)))
    if documents_BT is not None:
        mask = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
    out_BTnH = jax.nn.dot_product_attention(
        q_BkGTH.reshape(B, K * G, T, H).swapaxes(1, 2),
        k_BkSH.swapaxes(1, 2),
        v_BkSH.swapaxes(1, 2),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=(cfg.window - 1, 0) if cfg.window else None,
        implementation=implementation,
    )
    return out_BTnH.swapaxes(1, 2)[..., :v_dim].reshape(B, K, G, T, v_dim)


def cudnn_rules(config: ConfigDict, head: int) -> Iterator[str]:
    """Yields errors for types, head sizes and masks that cuDNN does not take."""
    if config.mesh.cp > 1:
        yield (
            f"model.attention_kernel='cudnn' masks from the first query on, and mesh.cp="
            f"{config.mesh.cp} gives a device later ones; use the kernel 'blockwise'"
        )
    yield from own_mask_errors('cudnn', config)
    if config.model.attention_sinks:
        yield (
            "model.attention_kernel='cudnn' has no sinks, and model.attention_sinks=True; use the "
            "kernel 'blockwise'"
        )
    if config.compute_dtype != 'bfloat16':
        yield (
            f"model.attention_kernel='cudnn' does not take compute_dtype={config.compute_dtype!r}; "
            f"use 'bfloat16', or the kernel 'blockwise'"
        )
    if head % 8 or head > 2 * CUDNN_HEAD:
        yield (
            f"model.attention_kernel='cudnn' does not take heads of {head} for queries and keys; "
            f'use a multiple of 8 up to {CUDNN_HEAD} ({2 * CUDNN_HEAD} on Hopper and later), or '
            f"the kernel 'blockwise'"
        )
    if ATTENTION_OUTPUT in config.model.remat_offload:
        yield (
            f"model.remat_offload={config.model.remat_offload} has 'attention', and cuDNN's can be "
            f'kept but not offloaded; name it in model.remat_keep, or use '
            f"model.attention_kernel='blockwise'"
        )


def cudnn_chosen(_: ConfigDict, head: int) -> bool:
    """Returns whether every GPU's cuDNN takes heads of this size."""
    return head <= CUDNN_HEAD


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

ATTENTION_KERNELS: dict[str, Kernel] = {
    'splash': Kernel(
        splash_attention, ('tpu',), checked=False, rules=splash_rules,
        elsewhere='splash_interpreted', partials=splash_partials,
    ),
    'splash_interpreted': Kernel(  # exact and slow, for tests
        functools.partial(splash_attention, interpret=True), (), checked=False, rules=splash_rules,
        partials=splash_partials,
    ),
    'cudnn': Kernel(
        cudnn_attention, ('gpu',), checked=False, rules=cudnn_rules, chosen=cudnn_chosen,
        keeps=CUDNN_FORWARD,
    ),
    'blockwise': Kernel(causal_attention, scores=True),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# For the layers
# ---------------------------------------------------------------------------------------------


def attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BT: Array | None,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
) -> Array:
    """Computes `causal_attention` by the kernel that the config names."""
    q_BkGTH, k_BkSH, v_BkSH = checkpoint_name((q_BkGTH, k_BkSH, v_BkSH), QKV)
    scale = attention_scale(cfg, q_BkGTH.shape[-1])
    compute = ATTENTION_KERNELS[cfg.attention_kernel].compute
    return compute(q_BkGTH, k_BkSH, v_BkSH, documents_BT, scale, cfg, sinks_kG)


def cached_attention(
    q_BkGH: Array,
    cache: tuple[Array, Array],
    own: tuple[Array, Array],
    visible_BS: Array,
    scale: float,
    sinks_kG: Array | None = None,
) -> Array:
    """Computes the attention of one query per row: [B, K, G, value head size].

    It sees the cached entries that are visible (`cached_visible`), and its own. `cache` is
    (k_BkSH, v_BkSH), whose other entries may be anything finite; `own` is (k_BkH, v_BkH) of the
    query's position. All S positions are computed, so the time does not depend on how many are
    visible. Scores and softmax are float32.
    """
    (k_BkSH, v_BkSH), (own_k_BkH, own_v_BkH) = cache, own
    f32 = {'preferred_element_type': jnp.float32}
    scores_BkGS = jnp.einsum('bkgh,bksh->bkgs', q_BkGH, k_BkSH, **f32) * scale
    scores_BkGS = jnp.where(visible_BS[:, None, None], scores_BkGS, MASKED)
    own_BkG1 = (jnp.einsum('bkgh,bkh->bkg', q_BkGH, own_k_BkH, **f32) * scale)[..., None]
    top_BkG1 = jnp.maximum(jnp.max(scores_BkGS, axis=-1, keepdims=True), own_BkG1)
    if sinks_kG is not None:
        top_BkG1 = jnp.maximum(top_BkG1, sinks_kG[..., None])
    p_BkGS, own_p_BkG1 = jnp.exp(scores_BkGS - top_BkG1), jnp.exp(own_BkG1 - top_BkG1)
    out_BkGH = jnp.einsum('bkgs,bksh->bkgh', p_BkGS.astype(v_BkSH.dtype), v_BkSH, **f32)
    out_BkGH += own_p_BkG1 * own_v_BkH[:, :, None]
    total_BkG1 = jnp.sum(p_BkGS, axis=-1, keepdims=True) + own_p_BkG1
    if sinks_kG is not None:
        total_BkG1 += jnp.exp(sinks_kG[..., None] - top_BkG1)
    return (out_BkGH / total_BkG1).astype(q_BkGH.dtype)
