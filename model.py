"""The model: for each layer its parameters and, under them, its pure function; then the loss.

Dimensions, as suffixes of array names and in einsums. Inside shard_map they are one device's:
    B batch    T position (query)    S position (key)    D model    V vocabulary
    N query heads    K key/value heads    G query heads a key/value head (N = K·G)    H head size
    R latent rank    F feed-forward    L layers    M microbatches
The residual stream is sharded over positions: x_BTD is [B, T/tp, D].
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parallel import (
    BATCH,
    FSDP,
    TP,
    Array,
    Deferred,
    P,
    Param,
    Tree,
    all_gather,
    count,
    local_slice,
    normal,
    ones,
    pmax,
    psum,
    reduce_scatter,
    stacked,
    unshard,
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model; configs/default.py explains each field."""

    vocab_size: int
    d_model: int
    n_layers: int
    block: tuple[str, ...]
    d_ff: int
    attention: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qk_norm: bool
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope_base: float
    rope_scaling: str
    rope_factor: float
    rope_original_len: int
    attention_block: int
    tie_embeddings: bool
    norm_eps: float
    dropout: float
    z_loss: float
    loss_chunk: int
    remat: str
    compute_dtype: str

    @property
    def n_blocks(self) -> int:
        return self.n_layers // len(self.block)

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim if self.attention == 'mla' else self.head_dim


def gain(size: int) -> Param:
    return Param((size,), P(None), ones, matrix=False)


def weight(shape: tuple[int, ...], spec: P, std: float) -> Param:
    """The weight of a `linear`."""
    return Param(shape, spec, normal(std), linear=True)


# ---------------------------------------------------------------------------------------------
# Normalisation, rotary embedding, dropout
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / rms(x) · gain over the last dimension, in float32 (Zhang & Sennrich 2019).

    Saves its input and a number a row; autodiff would save three arrays of the input's size.
    """
    return _rms_norm_forward(x, gain, eps)[0]


def _rms_norm_forward(x: Array, gain: Array, eps: float):
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain).astype(x.dtype), (x, scale, gain)


def _rms_norm_backward(eps: float, saved: tuple, dy: Array):
    x, scale, gain = saved
    normed, dy = x.astype(jnp.float32) * scale, dy.astype(jnp.float32)
    d_normed = dy * gain
    dx = scale * (d_normed - normed * jnp.mean(d_normed * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * normed, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def rope_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians a position for each pair of rotary dimensions: float64 [rotary_dim / 2].

    'linear' divides all by the factor (position interpolation, Chen et al. 2023). 'yarn' leaves
    those that turn more than 32 times within the original context, divides those that turn less
    than once, and blends linearly between (Peng et al. 2023, section 3.2).
    """
    half = cfg.rotary_dim // 2
    freqs = cfg.rope_base ** (-np.arange(half) / half)
    if cfg.rope_scaling == 'none':
        return freqs
    if cfg.rope_scaling == 'linear':
        return freqs / cfg.rope_factor
    turns = cfg.rope_original_len * freqs / (2 * np.pi)
    kept = np.clip((turns - 1) / (32 - 1), 0, 1)
    return freqs * kept + freqs / cfg.rope_factor * (1 - kept)


def attention_scale(cfg: ModelConfig) -> float:
    """1/√H; YaRN sharpens it by (0.1·ln(factor) + 1)² (Peng et al. 2023, section 3.4)."""
    head_dim = cfg.nope_dim + cfg.rope_dim if cfg.attention == 'mla' else cfg.head_dim
    sharpen = 0.1 * math.log(cfg.rope_factor) + 1 if cfg.rope_scaling == 'yarn' else 1.0
    return sharpen**2 / math.sqrt(head_dim)


def rope_table(cfg: ModelConfig, positions_T: Array) -> tuple[Array, Array]:
    """cos and sin of the rotation angles: float32 [T, rotary_dim / 2] each."""
    angles = positions_T[:, None].astype(jnp.float32) * rope_frequencies(cfg).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: Array, table: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2) of [..., T, H] by their position's angles (Su et al. 2021)."""
    cos, sin = table
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


@jax.custom_vjp
def _matmul(x_BTI: Array, w_IO: Array) -> Array:
    """x w. Its weight gradient is written so that the narrower operand is the one transposed:
    XLA:CPU would else copy the wide one, a third of a SwiGLU's time."""
    return jnp.einsum('bti,io->bto', x_BTI, w_IO)


def _matmul_forward(x_BTI: Array, w_IO: Array):
    return _matmul(x_BTI, w_IO), (x_BTI, w_IO)


def _matmul_backward(saved: tuple[Array, Array], d_BTO: Array):
    x_BTI, w_IO = saved
    rows = (((0, 1), (0, 1)), ((), ()))
    if w_IO.shape[0] <= w_IO.shape[1]:
        dw_IO = lax.dot_general(x_BTI, d_BTO, rows)
    else:
        dw_IO = lax.dot_general(d_BTO, x_BTI, rows).T
    return jnp.einsum('bto,io->bti', d_BTO, w_IO), dw_IO


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def _deferred_matmul(x_BTI: Array, w_IO: Array, sink: tuple[Array, Array]) -> Array:
    """x w, where backward leaves what the weight gradient takes in the sink (see `Deferred`)."""
    return _matmul(x_BTI, w_IO)


def _deferred_backward(saved: tuple[Array, Array], d_BTO: Array):
    x_BTI, w_IO = saved
    return jnp.einsum('bto,io->bti', d_BTO, w_IO), None, (x_BTI, d_BTO)


_deferred_matmul.defvjp(lambda x, w, _: (_matmul(x, w), (x, w)), _deferred_backward)


def linear(x_BTI: Array, w: Array | Deferred) -> Array:
    """x w: [B, T, I] -> [B, T, O]. A weight of more dimensions counts as [I, O]."""
    if not isinstance(w, Deferred):
        return _matmul(x_BTI, w.reshape(x_BTI.shape[-1], -1))
    w_IO = w.array.reshape(x_BTI.shape[-1], -1)
    if w.sink is not None:
        return _deferred_matmul(x_BTI, w_IO, w.sink)
    out_BTO = _matmul(x_BTI, w_IO)
    w.seen.sink = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x_BTI, out_BTO))
    return out_BTO


def linear_weight_gradient(p: Param, shard: Array, x_BTI: Array, d_BTO: Array) -> Array:
    """The gradient of a layer's weight from the input and output gradient of its `linear`, with
    the reduce-scatter over fsdp that is the transpose of `unshard`; shaped like the shard."""

    def f(shard: Array) -> Array:
        return linear(x_BTI, unshard({'w': shard}, {'w': p}, x_BTI.dtype)['w'])

    return jax.vjp(f, shard)[1](d_BTO)[0]


def to_heads(x_BTI: Array, w_INH: Array | Deferred) -> Array:
    """A projection to heads: [B, T, I], [I, N, H] -> [B, N, T, H]."""
    x_BTO = linear(x_BTI, w_INH)
    return x_BTO.reshape(*x_BTI.shape[:2], *w_INH.shape[1:]).swapaxes(1, 2)


def from_heads(x_BNTH: Array, w_NHD: Array | Deferred) -> Array:
    """The output projection: [B, N, T, H], [N, H, D] -> [B, T, D]."""
    B, N, T, H = x_BNTH.shape
    return linear(x_BNTH.swapaxes(1, 2).reshape(B, T, N * H), w_NHD)


def dropout(x_BTD: Array, rate: float, key: Array) -> Array:
    """Inverted dropout. Every token draws from a key of its own row and position in the global
    microbatch, so that the mask is the same on every mesh; this costs a hash a token more."""
    if rate == 0.0:
        return x_BTD
    B, T, D = x_BTD.shape
    rows_B = lax.axis_index(BATCH) * B + jnp.arange(B)
    positions_T = lax.axis_index(TP) * T + jnp.arange(T)

    def keep(row: Array, position: Array) -> Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.bernoulli(token_key, 1.0 - rate, (D,))

    keep_BTD = jax.vmap(lambda row: jax.vmap(lambda t: keep(row, t))(positions_T))(rows_B)
    return jnp.where(keep_BTD, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------

_MASKED = -1e30  # finite, so that a row without a visible key in one block yields no NaN


def _lower_triangle(T: int, block: int) -> tuple[int, np.ndarray]:
    """The pairs (query block, key block) on and below the diagonal: int32 [n(n+1)/2, 2]."""
    block = min(block, T)
    if T % block:
        raise ValueError(
            f'seq_len={T} is not a multiple of model.attention_block={block}; '
            f'use an attention_block that divides it'
        )
    n = T // block
    return block, np.array([(i, j) for i in range(n) for j in range(i + 1)], np.int32)


def _block(x: Array, i: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=-2)


def _put(x: Array, i: Array, value: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, value, i * value.shape[-2], axis=-2)


def _scores(q: Array, k: Array, i: Array, j: Array, scale: float) -> Array:
    """Masked scores of one pair of blocks, float32 [B, K, G, block, block]."""
    positions = jnp.arange(q.shape[-2])
    visible = (i * q.shape[-2] + positions)[:, None] >= j * k.shape[-2] + positions
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible, scores * scale, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def causal_attention(
    q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, scale: float, block: int
) -> Array:
    """softmax(scale · q kᵀ + causal mask) v -> [B, K, G, T, value head size].

    Blockwise with a running maximum and sum (FlashAttention-2, Dao 2023): one scan over the pairs
    of blocks on and below the diagonal, so the program does not grow with T, blocks above the
    diagonal cost nothing, and no score array exceeds B·N·block². The backward pass recomputes the
    scores from the saved log-sum-exp. Scores and softmax are float32 whatever the inputs are.
    """
    return _attention_forward(q_BKGTH, k_BKSH, v_BKSH, scale, block)[0]


def _attention_forward(q: Array, k: Array, v: Array, scale: float, block: int):
    block, pairs = _lower_triangle(q.shape[-2], block)

    def step(carry: tuple, pair: Array):
        out, top, total = carry
        i, j = pair
        scores = _scores(_block(q, i, block), _block(k, j, block), i, j, scale)
        old_top = _block(top, i, block)
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
        p = jnp.exp(scores - new_top)
        shrink = jnp.exp(old_top - new_top)
        pv = jnp.einsum(
            'bkgts,bksh->bkgth',
            p.astype(v.dtype),
            _block(v, j, block),
            preferred_element_type=jnp.float32,
        )
        out = _put(out, i, _block(out, i, block) * shrink + pv)
        total = _put(total, i, _block(total, i, block) * shrink + jnp.sum(p, -1, keepdims=True))
        return (out, _put(top, i, new_top), total), None

    rows = q.shape[:-1]
    zeros = functools.partial(jnp.zeros_like, q, dtype=jnp.float32)
    start = (zeros(shape=(*rows, v.shape[-1])), zeros(shape=(*rows, 1)) + _MASKED)
    (out, top, total), _ = lax.scan(step, (*start, zeros(shape=(*rows, 1))), pairs)
    out = (out / total).astype(q.dtype)
    return out, (q, k, v, out, top + jnp.log(total))


def _attention_backward(scale: float, block: int, saved: tuple, d_out: Array):
    q, k, v, out, logsumexp = saved
    block, pairs = _lower_triangle(q.shape[-2], block)
    f32 = {'preferred_element_type': jnp.float32}
    delta = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)

    def step(carry: tuple, pair: Array):
        dq, dk, dv = carry
        i, j = pair
        q_i, k_j, v_j = _block(q, i, block), _block(k, j, block), _block(v, j, block)
        do_i = _block(d_out, i, block)
        p = jnp.exp(_scores(q_i, k_j, i, j, scale) - _block(logsumexp, i, block))
        dp = jnp.einsum('bkgth,bksh->bkgts', do_i, v_j, **f32)
        ds = (p * (dp - _block(delta, i, block)) * scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dq_i = jnp.einsum('bkgts,bksh->bkgth', ds, k_j, **f32)
        dk_j = jnp.einsum('bkgts,bkgth->bksh', ds, q_i, **f32)
        dv_j = jnp.einsum('bkgts,bkgth->bksh', p, do_i, **f32)
        dq = _put(dq, i, _block(dq, i, block) + dq_i)
        dk = _put(dk, j, _block(dk, j, block) + dk_j)
        dv = _put(dv, j, _block(dv, j, block) + dv_j)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = lax.scan(step, start, pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


causal_attention.defvjp(_attention_forward, _attention_backward)


def mla_params(cfg: ModelConfig) -> Tree:
    D, N, R, Rq = cfg.d_model, cfg.n_heads, cfg.kv_rank, cfg.q_rank
    Hn, Hr, Hv = cfg.nope_dim, cfg.rope_dim, cfg.v_dim
    if Rq:
        query = {
            'w_q_down': weight((D, Rq), P(FSDP, None), D**-0.5),
            'q_norm': gain(Rq),
            'w_q_up': weight((Rq, N, Hn + Hr), P(FSDP, TP, None), Rq**-0.5),
        }
    else:
        query = {'w_q': weight((D, N, Hn + Hr), P(FSDP, TP, None), D**-0.5)}
    return query | {
        'w_kv_down': weight((D, R + Hr), P(FSDP, None), D**-0.5),
        'kv_norm': gain(R),
        'w_k_up': weight((R, N, Hn), P(FSDP, TP, None), R**-0.5),
        'w_v_up': weight((R, N, Hv), P(FSDP, TP, None), R**-0.5),
        'w_o': weight((N, Hv, D), P(TP, None, FSDP), (2 * cfg.n_layers * N * Hv) ** -0.5),
    }


def mla(params: Tree, x_BTD: Array, table: tuple[Array, Array], cfg: ModelConfig) -> Array:
    """Multi-head latent attention (DeepSeek-V2, section 2.1; q_rank = 0 leaves the query whole).

    Keys and values rise from one latent of R numbers a token; position enters through H_rope
    further ones, a single key shared by all heads. Latents are made on the local positions and
    only then gathered over tp: R + H_rope (+ q_rank) numbers a token travel instead of D.
    x_BTD: [B, T/tp, D] -> the same.
    """
    w = unshard(params, mla_params(cfg), x_BTD.dtype)
    kv_BTR = linear(x_BTD, w['w_kv_down'])
    latent_BTR, k_rope_BTH = jnp.split(kv_BTR, [cfg.kv_rank], axis=-1)
    latent_BTR = rms_norm(latent_BTR, w['kv_norm'], cfg.norm_eps)
    if cfg.q_rank:
        q_BTR = linear(x_BTD, w['w_q_down'])
        q_BTR = rms_norm(q_BTR, w['q_norm'], cfg.norm_eps)
        w_q = w['w_q_up']
    else:
        q_BTR, w_q = x_BTD, w['w_q']
    sizes = np.cumsum([cfg.kv_rank, cfg.rope_dim])
    all_BTR = all_gather(jnp.concatenate((latent_BTR, k_rope_BTH, q_BTR), -1), TP, 1)
    # B T/tp R -> B T R
    latent_BSR, k_rope_BSH, q_BTR = jnp.split(all_BTR, sizes, axis=-1)

    q_BNTH = to_heads(q_BTR, w_q)
    q_nope_BNTH, q_rope_BNTH = jnp.split(q_BNTH, [cfg.nope_dim], axis=-1)
    k_nope_BNSH = to_heads(latent_BSR, w['w_k_up'])
    v_BNSH = to_heads(latent_BSR, w['w_v_up'])
    k_rope_BNSH = jnp.broadcast_to(
        rope(k_rope_BSH, table)[:, None], (*k_nope_BNSH.shape[:-1], cfg.rope_dim)
    )
    q_BNTH = jnp.concatenate((q_nope_BNTH, rope(q_rope_BNTH, table)), axis=-1)
    k_BNSH = jnp.concatenate((k_nope_BNSH, k_rope_BNSH), axis=-1)
    out_BNTH = causal_attention(
        q_BNTH[:, :, None], k_BNSH, v_BNSH, attention_scale(cfg), cfg.attention_block
    )[:, :, 0]
    return reduce_scatter(from_heads(out_BNTH, w['w_o']), TP, 1)


def gqa_params(cfg: ModelConfig) -> Tree:
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    heads = TP if K > 1 else None
    norms = {'q_norm': gain(H), 'k_norm': gain(H)} if cfg.qk_norm else {}
    return norms | {
        'w_q': weight((D, N, H), P(FSDP, TP, None), D**-0.5),
        'w_k': weight((D, K, H), P(FSDP, heads, None), D**-0.5),
        'w_v': weight((D, K, H), P(FSDP, heads, None), D**-0.5),
        'w_o': weight((N, H, D), P(TP, None, FSDP), (2 * cfg.n_layers * N * H) ** -0.5),
    }


def gqa(params: Tree, x_BTD: Array, table: tuple[Array, Array], cfg: ModelConfig) -> Array:
    """Grouped-query attention (Ainslie et al. 2023); n_kv_heads = n_heads is multi-head, 1 is
    multi-query, whose single key and value are made on the local positions and then gathered.
    x_BTD: [B, T/tp, D] -> the same.
    """
    w = unshard(params, gqa_params(cfg), x_BTD.dtype)
    all_BTD = all_gather(x_BTD, TP, 1)  # B T/tp D -> B T D
    q_BNTH = to_heads(all_BTD, w['w_q'])
    if cfg.n_kv_heads > 1:
        k_BKSH = to_heads(all_BTD, w['w_k'])
        v_BKSH = to_heads(all_BTD, w['w_v'])
    else:
        k_BKSH = all_gather(to_heads(x_BTD, w['w_k']), TP, 2)
        v_BKSH = all_gather(to_heads(x_BTD, w['w_v']), TP, 2)
    if cfg.qk_norm:
        q_BNTH = rms_norm(q_BNTH, w['q_norm'], cfg.norm_eps)
        k_BKSH = rms_norm(k_BKSH, w['k_norm'], cfg.norm_eps)
    q_BNTH, k_BKSH = rope(q_BNTH, table), rope(k_BKSH, table)
    B, N, T, H = q_BNTH.shape
    q_BKGTH = q_BNTH.reshape(B, k_BKSH.shape[1], -1, T, H)
    out_BKGTH = causal_attention(q_BKGTH, k_BKSH, v_BKSH, attention_scale(cfg), cfg.attention_block)
    out_BNTH = out_BKGTH.reshape(B, N, T, H)
    return reduce_scatter(from_heads(out_BNTH, w['w_o']), TP, 1)


ATTENTION: dict[str, tuple[Callable, Callable]] = {
    'mla': (mla_params, mla),
    'gqa': (gqa_params, gqa),
}


# ---------------------------------------------------------------------------------------------
# Feed-forward, layers, blocks
# ---------------------------------------------------------------------------------------------


@jax.custom_vjp
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) · up. Saves its inputs only; autodiff would save three more arrays like them."""
    return jax.nn.silu(gate) * up


def _gated_backward(saved: tuple[Array, Array], d_out: Array):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


def swiglu_params(cfg: ModelConfig) -> Tree:
    D, F = cfg.d_model, cfg.d_ff
    return {
        'w_gate': weight((D, F), P(FSDP, TP), D**-0.5),
        'w_up': weight((D, F), P(FSDP, TP), D**-0.5),
        'w_down': weight((F, D), P(TP, FSDP), (2 * cfg.n_layers * F) ** -0.5),
    }


def swiglu(params: Tree, x_BTD: Array, cfg: ModelConfig) -> Array:
    """(silu(x W_gate) · x W_up) W_down (Shazeer 2020). x_BTD: [B, T/tp, D] -> the same."""
    w = unshard(params, swiglu_params(cfg), x_BTD.dtype)
    x_BTD = all_gather(x_BTD, TP, 1)  # B T/tp D -> B T D
    gate_BTF = linear(x_BTD, w['w_gate'])
    up_BTF = linear(x_BTD, w['w_up'])
    out_BTD = linear(gated(gate_BTF, up_BTF), w['w_down'])
    return reduce_scatter(out_BTD, TP, 1)


# A layer's kind, as model.block names it, is its feed-forward part.
FEED_FORWARD: dict[str, tuple[Callable, Callable]] = {'dense': (swiglu_params, swiglu)}


def layer_params(cfg: ModelConfig, kind: str) -> Tree:
    return {
        'attention_norm': gain(cfg.d_model),
        'attention': ATTENTION[cfg.attention][0](cfg),
        'ffn_norm': gain(cfg.d_model),
        'ffn': FEED_FORWARD[kind][0](cfg),
    }


def layer(
    params: Tree, x_BTD: Array, table: tuple[Array, Array], key: Array, cfg: ModelConfig, kind: str
) -> Array:
    """One pre-norm layer. x_BTD: [B, T/tp, D] -> the same."""
    attention, ffn = ATTENTION[cfg.attention][1], FEED_FORWARD[kind][1]
    h_BTD = rms_norm(x_BTD, params['attention_norm'], cfg.norm_eps)
    h_BTD = attention(params['attention'], h_BTD, table, cfg)
    x_BTD = x_BTD + dropout(h_BTD, cfg.dropout, jax.random.fold_in(key, 0))
    h_BTD = rms_norm(x_BTD, params['ffn_norm'], cfg.norm_eps)
    h_BTD = ffn(params['ffn'], h_BTD, cfg)
    return x_BTD + dropout(h_BTD, cfg.dropout, jax.random.fold_in(key, 1))


def block_names(cfg: ModelConfig) -> list[str]:
    """Names of the layers of a block, in order: '0_dense', '1_dense', ..."""
    return [f'{i}_{kind}' for i, kind in enumerate(cfg.block)]


def _all_but_gathered_weights(prim, *_, **params) -> bool:
    return not (prim.name == 'all_gather' and FSDP in params['axis_name'])


# What the backward pass finds saved. No policy saves a gathered weight: with FSDP all of them
# together are the whole model, so each is gathered again instead.
REMAT = {
    'none': _all_but_gathered_weights,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


def run_blocks(
    blocks: Tree,
    x_BTD: Array,
    table: tuple[Array, Array],
    key: Array,
    cfg: ModelConfig,
    first: Array | int = 0,
) -> Array:
    """All blocks in a scan over their stacked parameters, of which `first` is the index of the
    first one in the model. x_BTD: [B, T/tp, D] -> the same."""

    def block(x_BTD: Array, scanned: tuple[Tree, Array]):
        params, index = scanned
        for i, name in enumerate(block_names(cfg)):
            layer_key = jax.random.fold_in(key, index * len(cfg.block) + i)
            x_BTD = layer(params[name], x_BTD, table, layer_key, cfg, cfg.block[i])
        return x_BTD, None

    block = jax.checkpoint(block, policy=REMAT[cfg.remat], prevent_cse=False)
    n_blocks = jax.tree.leaves(blocks)[0].shape[0]
    return lax.scan(block, x_BTD, (blocks, first + jnp.arange(n_blocks)))[0]


# ---------------------------------------------------------------------------------------------
# Vocabulary: embedding and loss
# ---------------------------------------------------------------------------------------------


def vocab_matrix(cfg: ModelConfig, std: float) -> Tree:
    return {'w_VD': Param((cfg.vocab_size, cfg.d_model), P(TP, FSDP), normal(std))}


def embed(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Embedding rows of ids_BT (all positions) -> x_BTD for the local positions [B, T/tp, D].

    Each tp device looks up the rows that it holds and adds zeros for the others. The lookup runs
    in float32, since its backward adds up all gradients of a token's row.
    """
    w_VD = unshard(params, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype))['w_VD']
    row_BT = ids_BT - lax.axis_index(TP) * w_VD.shape[0]
    here_BT = (row_BT >= 0) & (row_BT < w_VD.shape[0])
    x_BTD = w_VD.astype(jnp.float32)[jnp.where(here_BT, row_BT, 0)]
    x_BTD = jnp.where(here_BT[..., None], x_BTD, 0).astype(w_VD.dtype)
    return reduce_scatter(x_BTD, TP, 1)  # B T D -> B T/tp D


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    x_TD: Array, w_VD: Array, labels_T: Array, z_loss: float, chunk: int
) -> tuple[Array, Array]:
    """This device's share of Σ (-log p(label) + z_loss · logsumexp²), and of the first term alone.

    x_TD holds the tokens of this tp device, w_VD the rows of its part of the vocabulary; labels
    of -1 are left out. Logits are [chunk · tp, V/tp] at a time: B·T·V of them never exist. Where
    gradients are wanted, the forward pass computes them chunk by chunk, since d logits follow
    from the logits at once: three matmuls in all, where rematerialization takes four. Only the
    first result is differentiable. z-loss: PaLM, section 5.
    """
    return _cross_entropy(x_TD, w_VD, labels_T, z_loss, chunk, with_grads=False)[0]


def _cross_entropy(x_TD, w_VD, labels_T, z_loss: float, chunk: int, with_grads: bool):
    n_chunks = -(-x_TD.shape[0] // chunk)
    while x_TD.shape[0] % n_chunks:
        n_chunks += 1
    first_row = lax.axis_index(TP) * w_VD.shape[0]
    rows_V = first_row + jnp.arange(w_VD.shape[0])

    def step(carry: tuple, inputs: tuple[Array, Array]):
        total, nll_total, dw_VD = carry
        x_TD, labels_T = all_gather(inputs[0], TP, 0), all_gather(inputs[1], TP, 0)
        logits_TV = jnp.einsum('td,vd->tv', x_TD, w_VD, preferred_element_type=jnp.float32)
        is_label_TV = labels_T[:, None] == rows_V
        top_T = pmax(jnp.max(logits_TV, axis=-1), TP)
        exp_TV = jnp.exp(logits_TV - top_T[:, None])
        label_logit_T = jnp.sum(jnp.where(is_label_TV, logits_TV, 0), axis=-1)
        sum_T, label_logit_T = psum(jnp.stack((jnp.sum(exp_TV, axis=-1), label_logit_T)), TP)
        logsumexp_T = top_T + jnp.log(sum_T)
        valid_T = labels_T >= 0
        nll_T = jnp.where(valid_T, logsumexp_T - label_logit_T, 0)
        z_T = jnp.where(valid_T, z_loss * jnp.square(logsumexp_T), 0)
        nll = jnp.sum(nll_T)
        total, nll_total = total + nll + jnp.sum(z_T), nll_total + nll
        if not with_grads:
            return (total, nll_total, dw_VD), None
        scale_T = jnp.where(valid_T, (1 + 2 * z_loss * logsumexp_T) / sum_T, 0)
        d_logits_TV = (exp_TV * scale_T[:, None] - is_label_TV).astype(x_TD.dtype)
        dx_TD = reduce_scatter(jnp.einsum('tv,vd->td', d_logits_TV, w_VD), TP, 0)
        dw_VD += jnp.einsum('tv,td->vd', d_logits_TV, x_TD, preferred_element_type=jnp.float32)
        return (total, nll_total, dw_VD), dx_TD

    split = functools.partial(jnp.reshape, shape=(n_chunks, -1))
    chunks = (x_TD.reshape(n_chunks, -1, x_TD.shape[-1]), split(labels_T))
    zero = jnp.zeros_like(x_TD, dtype=jnp.float32, shape=())
    dw_VD = jnp.zeros_like(w_VD, dtype=jnp.float32) if with_grads else ()
    (total, nll, dw_VD), dx_TD = lax.scan(step, (zero, zero, dw_VD), chunks)
    tp = lax.axis_size(TP)  # all tp devices found the same sums: each takes an equal share
    if with_grads:
        dx_TD = dx_TD.reshape(x_TD.shape)
    return (total / tp, nll / tp), (dx_TD, dw_VD)


def _cross_entropy_forward(x_TD, w_VD, labels_T, z_loss: float, chunk: int):
    shares, (dx_TD, dw_VD) = _cross_entropy(x_TD, w_VD, labels_T, z_loss, chunk, with_grads=True)
    return shares, (dx_TD, dw_VD.astype(w_VD.dtype))


def _cross_entropy_backward(z_loss: float, chunk: int, grads: tuple, cotangents: tuple):
    dx_TD, dw_VD = grads
    scale = psum(cotangents[0], TP) / lax.axis_size(TP)
    return (dx_TD * scale).astype(dx_TD.dtype), (dw_VD * scale).astype(dw_VD.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def block_params(cfg: ModelConfig) -> Tree:
    return {
        name: layer_params(cfg, kind)
        for name, kind in zip(block_names(cfg), cfg.block, strict=True)
    }


def model_params(cfg: ModelConfig, chunks: int = 1) -> Tree:
    """The declaration of every parameter of the model; `chunks` as in `stacked`."""
    head = {} if cfg.tie_embeddings else {'head': vocab_matrix(cfg, cfg.d_model**-0.5)}
    return head | {
        'embed': vocab_matrix(cfg, 0.02),
        'blocks': stacked(block_params(cfg), cfg.n_blocks, chunks),
        'final_norm': gain(cfg.d_model),
    }


def embed_tokens(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> Array:
    """ids_BT: int32 [B, T], all positions -> the input of the first block, [B, T/tp, D]."""
    x_BTD = embed(params['embed'], ids_BT, cfg)
    return dropout(x_BTD, cfg.dropout, jax.random.fold_in(key, cfg.n_layers))


def hidden_states(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> Array:
    """ids_BT: int32 [B, T], all positions -> the final normed x_BTD: [B, T/tp, D]."""
    x_BTD = embed_tokens(params, ids_BT, cfg, key)
    table = rope_table(cfg, jnp.arange(ids_BT.shape[1]))
    x_BTD = run_blocks(params['blocks'], x_BTD, table, key, cfg)
    return rms_norm(x_BTD, params['final_norm'], cfg.norm_eps)


def head_weight(params: Tree, cfg: ModelConfig) -> Array:
    """The output matrix w_VD of this tp device, gathered: [V/tp, D] in the compute type."""
    head = params['embed' if cfg.tie_embeddings else 'head']
    return unshard(head, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype))['w_VD']


def loss(params: Tree, tokens_BT: Array, cfg: ModelConfig, key: Array) -> tuple[Array, Array]:
    """This device's share of the summed loss over valid targets, and of its cross-entropy (nats).

    tokens_BT: int32 [B, T + 1]; position t predicts t + 1, and a target of -1 is left out. `key`
    is for dropout: the same on all devices, different each step and microbatch.
    """
    ids_BT, labels_BT = jnp.maximum(tokens_BT[:, :-1], 0), tokens_BT[:, 1:]
    x_BTD = hidden_states(params, ids_BT, cfg, key)
    labels_BT = local_slice(labels_BT, TP, 1)  # B T -> B T/tp
    x_TD = x_BTD.reshape(-1, cfg.d_model)
    w_VD = head_weight(params, cfg)
    return cross_entropy(x_TD, w_VD, labels_BT.reshape(-1), cfg.z_loss, cfg.loss_chunk)


def head_loss(params: Tree, x_TD: Array, labels_T: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """What `loss` makes of the last block's output x_TD [tokens, D], any tokens of this device."""
    x_TD = rms_norm(x_TD, params['final_norm'], cfg.norm_eps)
    return cross_entropy(x_TD, head_weight(params, cfg), labels_T, cfg.z_loss, cfg.loss_chunk)


def logits(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Logits of all positions, float32 [B, T, V/tp]: for tests and small models."""
    x_BTD = all_gather(hidden_states(params, ids_BT, cfg, jax.random.key(0)), TP, 1)
    w_VD = head_weight(params, cfg)
    return jnp.einsum('btd,vd->btv', x_BTD, w_VD, preferred_element_type=jnp.float32)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs of forward and backward for a token: 6 a weight, plus attention.

    The embedding lookup does no matmul, a tied head does. Causal attention counts half of T²:
    3 · 2 · N · (H_qk + H_v) · T/2 a layer. Recomputation is not counted (PaLM, appendix B).
    """
    params = model_params(cfg)
    gains = cfg.d_model * (2 * cfg.n_layers + 1)
    embedding = 0 if cfg.tie_embeddings else count(params['embed'])
    if cfg.attention == 'mla':
        head_dims = cfg.nope_dim + cfg.rope_dim + cfg.v_dim
        gains += cfg.n_layers * (cfg.q_rank + cfg.kv_rank)
    else:
        head_dims = 2 * cfg.head_dim
        gains += cfg.n_layers * (2 * cfg.head_dim if cfg.qk_norm else 0)
    attention = 3 * cfg.n_layers * cfg.n_heads * head_dims * seq_len
    return 6.0 * (count(params) - embedding - gains) + attention
