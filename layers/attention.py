"""Attention: rotary positions, blockwise causal softmax, and the two layers built on them. The
platforms' kernels for the softmax are in layers/attention_kernels.py.

Dimension letters as in layers/dense.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from config import ModelConfig
from layers.attention_kernels import _MASKED, attention, attention_scale
from layers.dense import gain, linear, rms_norm, weight
from parallel import (
    FSDP,
    TP,
    Array,
    Deferred,
    P,
    Param,
    Tree,
    all_gather,
    normal,
    reduce_scatter,
    unshard,
)


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


class Positions(NamedTuple):
    """What attention knows of where tokens stand."""

    cos: Array  # of the rotation angles, float32 [T, rotary_dim / 2], or [B, 1, T, ...]
    sin: Array
    documents: Array | None = None  # [B, T] the number of each token's document; None: all are one


def rope_table(cfg: ModelConfig, positions_T: Array) -> Positions:
    """Of positions [..., T]: angles [..., T, rotary_dim / 2]."""
    angles = positions_T[..., None].astype(jnp.float32) * rope_frequencies(cfg).astype(np.float32)
    return Positions(jnp.cos(angles), jnp.sin(angles))


def positions(ids_BT: Array, cfg: ModelConfig) -> Positions:
    """0, 1, 2, ... along all of T; with cfg.document_end, anew after each token of that id, and
    numbered documents that attention stays within."""
    T = ids_BT.shape[1]
    if cfg.document_end < 0:
        return rope_table(cfg, jnp.arange(T))
    ends_BT = (ids_BT == cfg.document_end).astype(jnp.int32)
    documents_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT  # the end belongs to what it ends
    after_end_BT = jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]
    starts_BT = lax.cummax(after_end_BT * jnp.arange(T), axis=1)
    table = rope_table(cfg, (jnp.arange(T) - starts_BT)[:, None])
    return table._replace(documents=documents_BT)


def rope(x: Array, table: Positions) -> Array:
    """Rotates the pairs (i, i + R/2) of the last R of [..., T, H] by their position's angles, R
    being twice the table's width (Su et al. 2021). What stands before them stays as it is."""
    return _rotate(x, table.cos, table.sin)


@jax.custom_vjp
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    return lax.platform_dependent(x, cos, sin, tpu=_rotate_whole, default=_rotate_parts)


def _rotate_parts(x: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    first, a, b = jnp.split(x, (x.shape[-1] - 2 * half, x.shape[-1] - half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    a, b = a * cos - b * sin, b * cos + a * sin
    return jnp.concatenate((first, a.astype(x.dtype), b.astype(x.dtype)), axis=-1)


def _rotate_whole(x: Array, cos: Array, sin: Array) -> Array:
    """Exchanges the pairs by a matmul with a signed permutation, which is exact. Parts of a head
    would each take up the 128 lanes of a TPU's registers and memory tiles: slicing and joining
    them cost several times the rotation."""
    H, half = x.shape[-1], cos.shape[-1]
    a = np.arange(H - 2 * half, H - half)
    exchange_HH = np.zeros((H, H))
    exchange_HH[a + half, a], exchange_HH[a, a + half] = -1, 1
    exchanged = jnp.einsum(
        '...h,hi->...i',
        x,
        exchange_HH.astype(x.dtype),
        precision='highest' if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    front = [(0, 0)] * (cos.ndim - 1) + [(H - 2 * half, 0)]
    cos = jnp.pad(jnp.concatenate((cos, cos), axis=-1), front, constant_values=1)
    sin = jnp.pad(jnp.concatenate((sin, sin), axis=-1), front)
    return (x.astype(jnp.float32) * cos + exchanged * sin).astype(x.dtype)


def _rotate_forward(x: Array, cos: Array, sin: Array):
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_backward(saved: tuple[Array, Array], d: Array):
    cos, sin = saved
    return _rotate(d, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def to_heads(x_BTI: Array, w_INH: Array | Deferred) -> Array:
    """A projection to heads: [B, T, I], [I, N, H] -> [B, N, T, H]."""
    x_BTO = linear(x_BTI, w_INH)
    return x_BTO.reshape(*x_BTI.shape[:2], *w_INH.shape[1:]).swapaxes(1, 2)


def from_heads(x_BNTH: Array, w_NHD: Array | Deferred) -> Array:
    """The output projection: [B, N, T, H], [N, H, D] -> [B, T, D]."""
    B, N, T, H = x_BNTH.shape
    return linear(x_BNTH.swapaxes(1, 2).reshape(B, T, N * H), w_NHD)


def cached_attention(
    q_BKGH: Array,
    cache: tuple[Array, Array],
    own: tuple[Array, Array],
    visible_BS: Array,
    scale: float,
) -> Array:
    """One query a row against its visible cached positions and its own position.

    `cache` is (k_BKSH, v_BKSH), whose other entries may be anything finite; `own` is (k_BKH, v_BKH)
    of the query's position. All S positions are computed, so the time does not depend on how many
    are visible. Scores and softmax are float32. -> [B, K, G, value head size].
    """
    (k_BKSH, v_BKSH), (own_k_BKH, own_v_BKH) = cache, own
    f32 = {'preferred_element_type': jnp.float32}
    scores_BKGS = jnp.einsum('bkgh,bksh->bkgs', q_BKGH, k_BKSH, **f32) * scale
    scores_BKGS = jnp.where(visible_BS[:, None, None], scores_BKGS, _MASKED)
    own_BKG1 = (jnp.einsum('bkgh,bkh->bkg', q_BKGH, own_k_BKH, **f32) * scale)[..., None]
    top_BKG1 = jnp.maximum(jnp.max(scores_BKGS, axis=-1, keepdims=True), own_BKG1)
    p_BKGS, own_p_BKG1 = jnp.exp(scores_BKGS - top_BKG1), jnp.exp(own_BKG1 - top_BKG1)
    out_BKGH = jnp.einsum('bkgs,bksh->bkgh', p_BKGS.astype(v_BKSH.dtype), v_BKSH, **f32)
    out_BKGH += own_p_BKG1 * own_v_BKH[:, :, None]
    total_BKG1 = jnp.sum(p_BKGS, axis=-1, keepdims=True) + own_p_BKG1
    return (out_BKGH / total_BKG1).astype(q_BKGH.dtype)


def _rows_first(x_1NTH: Array, rows: int) -> Array:
    """Decoding's layout to the cache's: rows stand where positions do, and the last of them only
    fill up the tp devices. [1, N, T, H] -> [B, N, H]."""
    return x_1NTH[0, :, :rows].swapaxes(0, 1)


def _rows_last(x_BNH: Array, rows: int) -> Array:
    """The way back: [B, N, H] -> [1, N, T, H] with T = rows, where the last row is repeated."""
    filled = jnp.pad(x_BNH, ((0, rows - x_BNH.shape[0]), (0, 0), (0, 0)), mode='edge')
    return filled.swapaxes(0, 1)[None]


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
        'w_k_up': Param((R, N, Hn), P(FSDP, TP, None), normal(R**-0.5)),
        'w_v_up': weight((R, N, Hv), P(FSDP, TP, None), R**-0.5),
        'w_o': weight((N, Hv, D), P(TP, None, FSDP), (2 * cfg.n_layers * N * Hv) ** -0.5),
    }


def mla(params: Tree, x_BTD: Array, table: Positions, cfg: ModelConfig) -> tuple[Array, Tree]:
    """Multi-head latent attention (DeepSeek-V2, section 2.1; q_rank = 0 leaves the query whole).

    Keys and values rise from one latent of R numbers a token; position enters through H_rope
    further ones, a single key shared by all heads. x_BTD: [B, T/tp, D] -> the same, and what
    decoding keeps of each position, [B, 1, T, R + H_rope].
    """
    w = unshard(params, mla_params(cfg), x_BTD.dtype)
    q_BNTH, latent_BSR, k_rope_BSH = _mla_inputs(w, x_BTD, table, cfg)
    kept_BSR = jnp.concatenate((latent_BSR, k_rope_BSH), axis=-1)
    k_BNSH = to_heads(kept_BSR, _key_weight(w['w_k_up'], cfg))
    v_BNSH = to_heads(latent_BSR, w['w_v_up'])
    out_BNTH = attention(q_BNTH[:, :, None], k_BNSH, v_BNSH, table.documents, cfg)[:, :, 0]
    return reduce_scatter(from_heads(out_BNTH, w['w_o']), TP, 1), {'latent': kept_BSR[:, None]}


def _key_weight(w_RNH: Array, cfg: ModelConfig) -> Array:
    """From a latent and a rotary key to whole keys: [R, N, H_nope] -> [R + H_rope, N, H].

    The rotary key is handed to all heads by ones in the matrix: the matmul takes up to twice the
    FLOPs, which are few, and writes keys once, where joining parts of heads would be several
    passes over arrays that fill a part of each tile on TPU.
    """
    N, same = w_RNH.shape[1], jnp.eye(cfg.rope_dim, dtype=w_RNH.dtype)
    top = jnp.pad(w_RNH, ((0, 0), (0, 0), (0, cfg.rope_dim)))
    same_HNH = jnp.broadcast_to(same[:, None], (cfg.rope_dim, N, cfg.rope_dim))
    return jnp.concatenate((top, jnp.pad(same_HNH, ((0, 0), (0, 0), (cfg.nope_dim, 0)))))


def _mla_inputs(
    w: Tree, x_BTD: Array, table: Positions, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """The query, [B, N, T, H], the latent and the rotary key, [B, T, R] and [B, T, H_rope], all
    rotated. Latents are made on the local positions and only then gathered over tp:
    R + H_rope (+ q_rank) numbers a token travel instead of D."""
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
    k_rope_BSH = rope(k_rope_BSH[:, None], table)[:, 0]
    return rope(to_heads(q_BTR, w_q), table), latent_BSR, k_rope_BSH


def mla_decode(
    params: Tree,
    x_BD: Array,
    table: Positions,
    cache: Tree,
    visible_BS: Array,
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """`mla` of one more position of each row, in the layout of `Attention.decode`.

    Absorbed (DeepSeek-V2, appendix C): the query passes through the keys' up-projection and meets
    latents, the weighted sum of latents passes through the values'. So this is multi-query
    attention with heads of R + H_rope, and no key or value of the cache is ever expanded.
    """
    w = unshard(params, mla_params(cfg), x_BD.dtype)
    q_BNTH, latent_BSR, k_rope_BSH = _mla_inputs(w, x_BD, table, cfg)
    q_nope_BNTH, q_rope_BNTH = jnp.split(q_BNTH, [cfg.nope_dim], axis=-1)
    rows, filled = visible_BS.shape[0], latent_BSR.shape[1]
    q_BNR = jnp.einsum('bnh,rnh->bnr', _rows_first(q_nope_BNTH, rows), w['w_k_up'])
    q_BNR = jnp.concatenate((q_BNR, _rows_first(q_rope_BNTH, rows)), axis=-1)
    own_B1R = jnp.concatenate((latent_BSR, k_rope_BSH), axis=-1)[0, :rows, None]
    latent = cache['latent']
    out_BNR = cached_attention(
        q_BNR[:, None], (latent, latent), (own_B1R, own_B1R), visible_BS, attention_scale(cfg)
    )[:, 0, :, : cfg.kv_rank]
    out_BNH = jnp.einsum('bnr,rnh->bnh', out_BNR, w['w_v_up'])
    out_BTD = from_heads(_rows_last(out_BNH, filled), w['w_o'])
    return reduce_scatter(out_BTD, TP, 1), {'latent': own_B1R}


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


def gqa(params: Tree, x_BTD: Array, table: Positions, cfg: ModelConfig) -> tuple[Array, Tree]:
    """Grouped-query attention (Ainslie et al. 2023); n_kv_heads = n_heads is multi-head, 1 is
    multi-query, whose single key and value are made on the local positions and then gathered.
    x_BTD: [B, T/tp, D] -> the same, and what decoding keeps, keys and values [B, K, T, H].
    """
    w = unshard(params, gqa_params(cfg), x_BTD.dtype)
    q_BNTH, k_BKSH, v_BKSH = _gqa_inputs(w, x_BTD, table, cfg)
    B, N, T, H = q_BNTH.shape
    q_BKGTH = q_BNTH.reshape(B, k_BKSH.shape[1], -1, T, H)
    out_BKGTH = attention(q_BKGTH, k_BKSH, v_BKSH, table.documents, cfg)
    out_BTD = from_heads(out_BKGTH.reshape(B, N, T, H), w['w_o'])
    return reduce_scatter(out_BTD, TP, 1), {'k': k_BKSH, 'v': v_BKSH}


def _gqa_inputs(
    w: Tree, x_BTD: Array, table: Positions, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """Queries, keys and values of all positions: [B, N, T, H], and [B, K, T, H] twice."""
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
    return rope(q_BNTH, table), rope(k_BKSH, table), v_BKSH


def gqa_decode(
    params: Tree,
    x_BD: Array,
    table: Positions,
    cache: Tree,
    visible_BS: Array,
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """`gqa` of one more position of each row, in the layout of `Attention.decode`."""
    w = unshard(params, gqa_params(cfg), x_BD.dtype)
    q_BNTH, k_BKTH, v_BKTH = _gqa_inputs(w, x_BD, table, cfg)
    rows, filled = visible_BS.shape[0], q_BNTH.shape[2]
    q_BNH, k_BKH, v_BKH = (_rows_first(y, rows) for y in (q_BNTH, k_BKTH, v_BKTH))
    q_BKGH = q_BNH.reshape(rows, k_BKH.shape[1], -1, cfg.head_dim)
    out_BKGH = cached_attention(
        q_BKGH, (cache['k'], cache['v']), (k_BKH, v_BKH), visible_BS, attention_scale(cfg)
    )
    out_BTD = from_heads(_rows_last(out_BKGH.reshape(q_BNH.shape), filled), w['w_o'])
    return reduce_scatter(out_BTD, TP, 1), {'k': k_BKH, 'v': v_BKH}


class Attention(NamedTuple):
    """A kind of attention: its parameters' declaration, and the two functions that use them.

    Both return what is added to the residual stream, and what later positions need of these ones:
    leaves [B, K, T, H], sharded over tp in K, or copies of one head.

    `decode` takes one new position of each of B rows. In the residual stream, rows then stand where
    positions stand in training, so that linear layers, feed-forward parts and collectives are the
    same: x_BD is [1, T/tp, D], where T is B rounded up to a multiple of tp by repeating the last
    row, and the table has a position for each of the T. Its cache has leaves [B, K, S, H], of which
    a row sees what is set in its visible_BS; what it returns of the new position is [B, K, H].
    """

    params: Callable[[ModelConfig], Tree]
    forward: Callable[..., tuple[Array, Tree]]
    decode: Callable[..., tuple[Array, Tree]]


ATTENTION: dict[str, Attention] = {
    'mla': Attention(mla_params, mla, mla_decode),
    'gqa': Attention(gqa_params, gqa, gqa_decode),
}
