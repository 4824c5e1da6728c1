"""Attention layers: multi-head latent attention and grouped-query attention, in training and in
decoding. The causal softmax itself is in attention_kernels.py; linear attention in
delta_attention.py.

To add a kind, write its functions and add a line to ATTENTION.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import QKV, ModelConfig, divisors, indivisible
from layers.attention_kernels import ATTENTION_KERNELS, LATENT_KERNELS, cached_attention
from layers.context_parallel import attention_over_cp
from layers.delta_attention import GDN, KDA
from layers.dense import gain, linear, rms_norm, weight, weights
from layers.kinds import (
    Attention,
    Sizes,
    from_heads,
    output_weight,
    rows_first,
    rows_last,
    to_heads,
)
from layers.rope import Positions, rope
from layers.rope_scaling import (
    attention_scale,
    rope_attention_factor,
    rope_frequencies,
    rope_rules,
)
from parallel import (
    CP,
    FSDP,
    TP,
    Array,
    Deferred,
    Initializer,
    P,
    Param,
    Tree,
    all_gather,
    normal,
    ones,
    psum,
    reduce_scatter,
    unshard,
    zeros,
    zigzag,
)

# ---------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------


def rope_table(cfg: ModelConfig, positions_T: Array) -> Positions:
    """Returns the rotations of positions [..., T] in a layer: [..., T, rotary / 2]."""
    rotary = attention_sizes(cfg).rotary
    freqs = rope_frequencies(cfg, rotary) if rotary else np.zeros(0)
    angles = positions_T[..., None].astype(jnp.float32) * freqs.astype(np.float32)
    factor = rope_attention_factor(cfg)
    return Positions(factor * jnp.cos(angles), factor * jnp.sin(angles))


def positions(ids_BT: Array, cfg: ModelConfig) -> Positions:
    """Numbers positions 0, 1, 2, ... along all of T; the rotations are of this device's, T/cp.

    With cfg.document_end, they start anew after each token of that id, and documents are numbered:
    attention stays within them.
    """
    T = ids_BT.shape[1]
    if cfg.document_end < 0:
        return rope_table(cfg, zigzag(jnp.arange(T), CP, 0))
    ends_BT = (ids_BT == cfg.document_end).astype(jnp.int32)
    documents_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT  # the end belongs to its document
    after_end_BT = jnp.pad(ends_BT, ((0, 0), (1, 0)))[:, :-1]
    starts_BT = lax.cummax(after_end_BT * jnp.arange(T), axis=1)
    table = rope_table(cfg, zigzag(jnp.arange(T) - starts_BT, CP, 1)[:, None])
    return table._replace(documents=documents_BT)


# ---------------------------------------------------------------------------------------------
# What stands behind the scores
# ---------------------------------------------------------------------------------------------


def output_params(cfg: ModelConfig, size: int) -> Tree:
    """Declares what any kind of attention has behind its scores, with values of this size: the
    sinks, the gate of heads' outputs, and the way back to the residual stream (`to_residual`)."""
    D, N = cfg.d_model, cfg.n_heads
    params = {'w_o': output_weight(cfg, size)}
    if cfg.attention_sinks:
        params['sinks'] = Param((N,), P(TP), zeros, matrix=False)
    if cfg.attention_gate:
        params['w_gate'] = weight((D, N, size), P(FSDP, TP, None), D**-0.5, QKV)
    return params


def sinks_of(w: Tree, heads: int) -> Array | None:
    """Returns the sinks of heads as attention takes them, [K, G] with K = `heads`; None if the
    layer has none."""
    return w['sinks'].reshape(heads, -1) if 'sinks' in w else None


def to_residual(w: Tree, out_BnTH: Array, x_BTD: Array | None) -> Array:
    """Brings the outputs of heads back to the residual stream: [B, N/tp, T, H] -> [B, T/tp, D].

    With a gate, each number is scaled by the sigmoid of a projection of the layer's input first
    (Qiu et al. 2025, "Gated Attention for Large Language Models"); only a gate reads x_BTD.
    """
    if 'w_gate' in w:
        gate_BnTH = checkpoint_name(to_heads(x_BTD, w['w_gate']), QKV)
        open_BnTH = jax.nn.sigmoid(gate_BnTH.astype(jnp.float32))
        out_BnTH = (out_BnTH * open_BnTH).astype(out_BnTH.dtype)
    out_BtD = reduce_scatter(from_heads(out_BnTH, w['w_o']), TP, 1)
    return (out_BtD + w['b_o']).astype(out_BtD.dtype) if 'b_o' in w else out_BtD


# ---------------------------------------------------------------------------------------------
# Multi-head latent attention
# ---------------------------------------------------------------------------------------------


def mla_params(cfg: ModelConfig) -> Tree:
    """Declares the parameters of `mla`."""
    D, N, R, Rq = cfg.d_model, cfg.n_heads, cfg.kv_rank, cfg.q_rank
    Hn, Hr, Hv = cfg.nope_dim, cfg.rope_dim, cfg.v_dim
    if Rq:
        query = {
            'w_q_down': weight((D, Rq), P(FSDP, None), D**-0.5),
            'q_norm': gain(Rq),
            'w_q_up': weight((Rq, N, Hn + Hr), P(FSDP, TP, None), Rq**-0.5, QKV),
        }
    else:
        query = {'w_q': weight((D, N, Hn + Hr), P(FSDP, TP, None), D**-0.5, QKV)}
    key_work = (1 + Hr / R) * (1 + Hr / Hn)  # `_key_weight` is wider than w_k_up
    w_k_up = Param(
        (R, N, Hn), P(FSDP, TP, None), normal(R**-0.5),
        kept_by=QKV, work=key_work, inputs=1, outputs=2,
    )  # fmt: skip
    # As w_k_up in the compute type on every mesh: a ring over cp cannot take it in 8 bits.
    w_v_up = weight((R, N, Hv), P(FSDP, TP, None), R**-0.5, QKV)
    w_v_up = dataclasses.replace(w_v_up, wide=True)
    if cfg.cp > 1 and cfg.cp_style == 'ring':
        # The ring uses it n times, which is more than a `Deferred` can say.
        w_v_up = dataclasses.replace(w_v_up, linear=False)
    if cfg.attention_kernel in LATENT_KERNELS:  # these make heads themselves, in backward again
        own = functools.partial(dataclasses.replace, linear=False, kept_by='')
        made = 'w_q_up' if Rq else 'w_q'
        query[made], w_v_up = own(query[made]), own(w_v_up)
        w_k_up = own(w_k_up, work=1 + Hr / Hn)  # as wide as whole keys
    return query | {
        'w_kv_down': weight((D, R + Hr), P(FSDP, None), D**-0.5),
        'kv_norm': gain(R),
        'w_k_up': w_k_up,
        'w_v_up': w_v_up,
        **output_params(cfg, Hv),
    }


def mla_sizes(cfg: ModelConfig) -> Sizes:
    """Returns the numbers per position of `mla`: a latent, and the rotary key of all heads."""
    R, Hr, key = cfg.kv_rank, cfg.rope_dim, cfg.nope_dim + cfg.rope_dim
    query = cfg.q_rank or cfg.d_model
    for_gate = cfg.d_model if cfg.attention_gate and cfg.q_rank else 0
    return Sizes(
        key=key,
        value=cfg.v_dim,
        rotary=Hr,
        kv_heads=cfg.n_heads,
        cache=R + Hr,
        gathered=R + Hr + query + for_gate,
        latents=R + Hr + cfg.q_rank,
        inputs=(R + Hr + query + for_gate, R + query),
        travels=R + Hr,
        travels_cut=False,
        expansion=cfg.n_heads * ((R + Hr) * key + R * cfg.v_dim),
    )


def mla_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that do not go together, or that the mesh does not divide."""
    m = config.model
    ranks = ['model.kv_rank', *(['model.q_rank'] if m.q_rank else [])]
    yield from indivisible(config, FSDP, ranks)
    if m.attention_bias != 'none':
        yield (
            f'model.attention_bias={m.attention_bias!r} is of queries, keys and values of heads, '
            f"and 'mla' makes them of latents; use 'none', or 'gqa' in every layer"
        )
    if m.rope_dim % 2:
        yield odd_rotation('rope_dim', m.rope_dim)
    yield from rope_rules(config)


def odd_rotation(field: str, size: int) -> str:
    """Says that rotation takes pairs."""
    return f'model.{field}={size} is odd, but rotation takes pairs; use {size + 1}'


def mla(params: Tree, x_BtD: Array, table: Positions, cfg: ModelConfig) -> tuple[Array, Tree]:
    """Runs multi-head latent attention (DeepSeek-V2, section 2.1; q_rank 0 has no query latent).

    Keys and values rise from one latent of R numbers per token; position enters through H_rope
    further ones, a single key shared by all heads. x_BtD: [B, T/tp, D] -> the same, and the part of
    each position that decoding keeps, [B, 1, T, R + H_rope]. H_rope is 0 in a layer without rotary
    part.
    """
    w = weights(params, mla_params(cfg), x_BtD.dtype, cfg)
    q_BTR, latent_BSR, k_rope_BSH, x_BTD = _mla_inputs(w, x_BtD, table, cfg)
    kept_BSR = jnp.concatenate((latent_BSR, k_rope_BSH), axis=-1)
    kernel = ATTENTION_KERNELS[cfg.attention_kernel]
    if kernel.latent:
        out_BnTH = kernel.compute(q_BTR, latent_BSR, k_rope_BSH, w | {'w_q': _w_q(w)}, table, cfg)
        return to_residual(w, out_BnTH, x_BTD), {'latent': kept_BSR[:, None]}
    q_BnTH = rope(to_heads(q_BTR, _w_q(w)), table)
    up, sinks_n1 = (_key_weight(w['w_k_up'], cfg), w['w_v_up']), sinks_of(w, q_BnTH.shape[1])
    out_BnTH = attention_over_cp(
        q_BnTH[:, :, None], kept_BSR, up, _expand_latent, table.documents, cfg, sinks_n1
    )[:, :, 0]
    return to_residual(w, out_BnTH, x_BTD), {'latent': kept_BSR[:, None]}


def _expand_latent(up: Tree, kept_BSR: Array) -> tuple[Array, Array]:
    """Makes keys and values, [B, N/tp, S, H], of latents and rotary keys, [B, S, R + H_rope]."""
    w_k_up, w_v_up = up
    latent_BSR = kept_BSR[..., : w_v_up.shape[0]]
    return to_heads(kept_BSR, w_k_up), to_heads(latent_BSR, w_v_up)


def _key_weight(w_RnH: Array, cfg: ModelConfig) -> Array:
    """Extends w_k_up, [R, N/tp, H_nope], to make whole keys of a latent and a rotary key:
    [R + H_rope, N/tp, H].

    The rotary key is handed to all heads by ones in the matrix: the matmul takes up to twice the
    FLOPs, which are few, and writes keys once, where joining parts of heads would be several
    passes over arrays that fill a part of each tile on TPU.
    """
    n, same = w_RnH.shape[1], jnp.eye(cfg.rope_dim, dtype=w_RnH.dtype)
    top = jnp.pad(w_RnH, ((0, 0), (0, 0), (0, cfg.rope_dim)))
    same_HnH = jnp.broadcast_to(same[:, None], (cfg.rope_dim, n, cfg.rope_dim))
    return jnp.concatenate((top, jnp.pad(same_HnH, ((0, 0), (0, 0), (cfg.nope_dim, 0)))))


def _mla_inputs(
    w: Tree, x_BtD: Array, table: Positions, cfg: ModelConfig
) -> tuple[Array, Array, Array, Array | None]:
    """Makes what queries are made of, [B, T, q_rank or D], the latent, [B, T, R], the rotary key,
    [B, T, H_rope], and for a gate x_BTD.

    Latents are made on the local positions and only then gathered over tp: R + H_rope (+ q_rank)
    numbers per token travel instead of D; with a gate, D beside them.
    """
    kv_BtR = linear(x_BtD, w['w_kv_down'])
    latent_BtR, k_rope_BtH = jnp.split(kv_BtR, [cfg.kv_rank], axis=-1)
    eps = cfg.latent_norm_eps or cfg.norm_eps
    latent_BtR = rms_norm(latent_BtR, w['kv_norm'], eps)
    if cfg.q_rank:
        q_BtR = linear(x_BtD, w['w_q_down'])
        q_BtR = rms_norm(q_BtR, w['q_norm'], eps)
    else:
        q_BtR = x_BtD
    parts = [latent_BtR, k_rope_BtH, q_BtR]
    if cfg.attention_gate and cfg.q_rank:
        parts.append(x_BtD)
    ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
    all_BTR = all_gather(jnp.concatenate(parts, -1), TP, 1)
    latent_BSR, k_rope_BSH, q_BTR, *rest = jnp.split(all_BTR, ends, axis=-1)
    x_BTD = (rest or [q_BTR])[0] if cfg.attention_gate else None  # q_rank 0: the query's input
    k_rope_BSH = rope(k_rope_BSH[:, None], table)[:, 0]
    return q_BTR, latent_BSR, k_rope_BSH, x_BTD


def _w_q(w: Tree) -> Array | Deferred:
    """Returns the weight that makes queries, of a latent if there is one."""
    return w['w_q_up'] if 'w_q_up' in w else w['w_q']


def mla_decode(
    params: Tree,
    x_1tD: Array,
    table: Positions,
    cache: Tree,
    visible_BS: Array,
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """Computes `mla` of one more position of each row, in the layout of `Attention.decode`.

    Absorbed (DeepSeek-V2, appendix C): the query passes through the keys' up-projection and meets
    latents, the weighted sum of latents passes through the values'. So this is multi-query
    attention with heads of R + H_rope, and no key or value of the cache is ever expanded.
    """
    w = unshard(params, mla_params(cfg), x_1tD.dtype)
    q_1TR, latent_1TR, k_rope_1TH, x_1TD = _mla_inputs(w, x_1tD, table, cfg)
    q_1nTH = rope(to_heads(q_1TR, _w_q(w)), table)
    q_nope_1nTH, q_rope_1nTH = jnp.split(q_1nTH, [cfg.nope_dim], axis=-1)
    rows, filled = visible_BS.shape[0], latent_1TR.shape[1]
    q_BnR = jnp.einsum('bnh,rnh->bnr', rows_first(q_nope_1nTH, rows), w['w_k_up'])
    q_BnR = jnp.concatenate((q_BnR, rows_first(q_rope_1nTH, rows)), axis=-1)
    own_B1R = jnp.concatenate((latent_1TR, k_rope_1TH), axis=-1)[0, :rows, None]
    latent, scale = cache['latent'], attention_scale(cfg, mla_sizes(cfg).key)
    out_BnR = cached_attention(
        q_BnR[:, None], (latent, latent), (own_B1R, own_B1R), visible_BS, scale, sinks_of(w, 1)
    )[:, 0, :, : cfg.kv_rank]
    out_BnH = jnp.einsum('bnr,rnh->bnh', out_BnR, w['w_v_up'])
    return to_residual(w, rows_last(out_BnH, filled), x_1TD), {'latent': own_B1R}


# ---------------------------------------------------------------------------------------------
# Grouped-query attention
# ---------------------------------------------------------------------------------------------


def gqa_params(cfg: ModelConfig) -> Tree:
    """Declares the parameters of `gqa`."""
    D, N, K, H = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    heads = TP if K > 1 else None
    more = {}
    if cfg.qk_norm:
        together = cfg.qk_norm_over == 'heads'
        more['q_norm'] = of_heads((N, H), TP, ones) if together else gain(H)
        more['k_norm'] = of_heads((K, H), heads, ones) if together and K > 1 else gain(H)
    if cfg.attention_bias != 'none':
        more['b_q'] = of_heads((N, H), TP, zeros)
        more |= {name: of_heads((K, H), heads, zeros) for name in ('b_k', 'b_v')}
    if cfg.attention_bias == 'qkvo':
        more['b_o'] = Param((D,), P(None), zeros, matrix=False)
    return more | {
        'w_q': weight((D, N, H), P(FSDP, TP, None), D**-0.5, QKV),
        'w_k': weight((D, K, H), P(FSDP, heads, None), D**-0.5, QKV),
        'w_v': weight((D, K, H), P(FSDP, heads, None), D**-0.5, QKV),
        **output_params(cfg, H),
    }


def of_heads(shape: tuple[int, int], axis: str | None, init: Initializer) -> Param:
    """Declares a gain or a bias for each number of each head, [N, H], which `axis` cuts in N."""
    return Param(shape, P(axis, None), init, matrix=False)


def gqa_sizes(cfg: ModelConfig) -> Sizes:
    """Returns the numbers per position of `gqa`: keys and values of K heads."""
    H, K, D = cfg.head_dim, cfg.n_kv_heads, cfg.d_model
    return Sizes(
        key=H,
        value=H,
        rotary=0 if cfg.nope else cfg.rotary_dim or H,
        kv_heads=K,
        cache=2 * K * H,
        gathered=D + (2 * H if K == 1 else 0),
        latents=0,
        inputs=(D,),
        travels=2 * K * H,
        travels_cut=K > 1,
        expansion=0,
    )


def gqa_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that do not go together, or that the mesh does not divide."""
    m = config.model
    if m.n_kv_heads > 1:
        yield from indivisible(config, TP, ['model.n_kv_heads'])
    if m.n_heads % m.n_kv_heads:
        yield (
            f'model.n_heads={m.n_heads} is not divisible by model.n_kv_heads={m.n_kv_heads}; '
            f'use {divisors(m.n_heads)} key/value heads'
        )
    if m.rotary_dim > m.head_dim:
        yield (
            f'model.rotary_dim={m.rotary_dim} is above model.head_dim={m.head_dim}; use '
            f'{m.head_dim} or less, or 0 for all of a head'
        )
    elif m.rotary_dim % 2:
        yield odd_rotation('rotary_dim', m.rotary_dim)
    elif m.head_dim % 2 and not m.rotary_dim:
        yield odd_rotation('head_dim', m.head_dim)
    if m.qk_norm_over == 'heads' and not m.qk_norm:
        yield (
            "model.qk_norm_over='heads' says how queries and keys are normed, and "
            "model.qk_norm=False; use True, or qk_norm_over='head'"
        )
    yield from rope_rules(config)


def gqa(params: Tree, x_BtD: Array, table: Positions, cfg: ModelConfig) -> tuple[Array, Tree]:
    """Runs grouped-query attention (Ainslie et al. 2023).

    n_kv_heads = n_heads is multi-head, 1 is multi-query, whose single key and value are made on the
    local positions and then gathered. x_BtD: [B, T/tp, D] -> the same, and the keys and values that
    decoding keeps, [B, K/tp, T, H] each.
    """
    w = weights(params, gqa_params(cfg), x_BtD.dtype, cfg)
    q_BnTH, k_BkSH, v_BkSH, x_BTD = _gqa_inputs(w, x_BtD, table, cfg)
    (B, n, T, H), k = q_BnTH.shape, k_BkSH.shape[1]
    q_BkGTH = q_BnTH.reshape(B, k, -1, T, H)
    out_BkGTH = attention_over_cp(
        q_BkGTH, (k_BkSH, v_BkSH), (), _as_they_are, table.documents, cfg, sinks_of(w, k)
    )
    return to_residual(w, out_BkGTH.reshape(B, n, T, H), x_BTD), {'k': k_BkSH, 'v': v_BkSH}


def _as_they_are(_: Tree, keys_and_values: tuple[Array, Array]) -> tuple[Array, Array]:
    return keys_and_values


def _gqa_inputs(
    w: Tree, x_BtD: Array, table: Positions, cfg: ModelConfig
) -> tuple[Array, Array, Array, Array]:
    """Makes queries, [B, N/tp, T, H], keys and values, [B, K/tp, T, H], of all positions; also
    returns x_BTD."""
    x_BTD = all_gather(x_BtD, TP, 1)
    q_BnTH = to_heads(x_BTD, w['w_q'])
    if cfg.n_kv_heads > 1:
        k_BkSH = to_heads(x_BTD, w['w_k'])
        v_BkSH = to_heads(x_BTD, w['w_v'])
    else:
        k_BkSH = all_gather(to_heads(x_BtD, w['w_k']), TP, 2)
        v_BkSH = all_gather(to_heads(x_BtD, w['w_v']), TP, 2)
    if cfg.attention_bias != 'none':
        q_BnTH, k_BkSH, v_BkSH = (
            (x + w[name][:, None]).astype(x.dtype)
            for name, x in (('b_q', q_BnTH), ('b_k', k_BkSH), ('b_v', v_BkSH))
        )
    if cfg.qk_norm:
        q_BnTH = heads_norm(q_BnTH, w['q_norm'], cfg.norm_eps)
        k_BkSH = heads_norm(k_BkSH, w['k_norm'], cfg.norm_eps)
    return rope(q_BnTH, table), rope(k_BkSH, table), v_BkSH, x_BTD


def heads_norm(x_BnTH: Array, gain: Array, eps: float) -> Array:
    """Norms heads, [B, N/tp, T, H]: each by itself with a gain of [H]; with one of [N/tp, H], all
    heads of a position together, over all tp devices."""
    if gain.ndim == 1:
        return rms_norm(x_BnTH, gain, eps)
    x32 = x_BnTH.astype(jnp.float32)
    numbers = gain.size * lax.axis_size(TP)
    squares_B1T1 = psum(jnp.sum(jnp.square(x32), axis=(1, 3), keepdims=True), TP)
    normed_BnTH = x32 * lax.rsqrt(squares_B1T1 / numbers + eps)
    return (normed_BnTH * gain[:, None]).astype(x_BnTH.dtype)


def gqa_decode(
    params: Tree,
    x_1tD: Array,
    table: Positions,
    cache: Tree,
    visible_BS: Array,
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """Computes `gqa` of one more position of each row, in the layout of `Attention.decode`."""
    w = unshard(params, gqa_params(cfg), x_1tD.dtype)
    q_1nTH, k_1kTH, v_1kTH, x_1TD = _gqa_inputs(w, x_1tD, table, cfg)
    rows, filled = visible_BS.shape[0], q_1nTH.shape[2]
    q_BnH, k_BkH, v_BkH = (rows_first(y, rows) for y in (q_1nTH, k_1kTH, v_1kTH))
    q_BkGH = q_BnH.reshape(rows, k_BkH.shape[1], -1, cfg.head_dim)
    scale = attention_scale(cfg, cfg.head_dim)
    sinks_kG = sinks_of(w, k_BkH.shape[1])
    out_BkGH = cached_attention(
        q_BkGH, (cache['k'], cache['v']), (k_BkH, v_BkH), visible_BS, scale, sinks_kG
    )
    out_1nTH = rows_last(out_BkGH.reshape(q_BnH.shape), filled)
    return to_residual(w, out_1nTH, x_1TD), {'k': k_BkH, 'v': v_BkH}


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

ATTENTION: dict[str, Attention] = {
    'mla': Attention(mla_params, mla, mla_decode, mla_sizes, mla_rules),
    'gqa': Attention(gqa_params, gqa, gqa_decode, gqa_sizes, gqa_rules),
    'gdn': GDN,
    'kda': KDA,
}


@functools.cache
def attention_sizes(cfg: ModelConfig) -> Sizes:
    """Returns the numbers per position of the attention of a layer (`config.of_layer`)."""
    return ATTENTION[cfg.attention].sizes(cfg)


def linear_kinds(cfg: ModelConfig) -> set[str]:
    """Returns the kinds of attention that keep a state in place of keys."""
    each = {name: dataclasses.replace(cfg, attention=name) for name in ATTENTION}
    return {name for name, own in each.items() if attention_sizes(own).state}
