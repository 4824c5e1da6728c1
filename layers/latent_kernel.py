"""A Pallas kernel for TPU of latent attention: from latents to the outputs of heads.

Queries, keys and values of a head exist in the chip's vector memory alone: made of the latents,
rotated, met and dropped, forward and backward. Between memory and matrix unit travel the latents,
which are a fraction of them (for 12 heads of 128 a tenth), the outputs, and a log-sum-exp a query.

The scores are computed transposed, keys by queries: sums over keys then run along the rows of a
register, and every number of a query lies in one lane, as the log-sum-exp of all its heads does.

A step of the grid holds a whole sequence, for as many heads as fill the lanes of the output. So
sequences are short (`latent_rules`), and each pair of a block of queries and a block of keys that
the causal mask leaves is a piece of the program of its own.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT
from layers.blockwise import MASKED
from layers.mask import own_mask_errors
from parallel import Array

LANES = 128
MAX_BLOCKS = 4  # of a sequence: ten pairs of blocks, forward and backward
VMEM_BYTES = 32 * 2**20  # what a step may take of a chip's vector memory
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # what a product sums over: a b, a bᵀ, aᵀ b


class Latents(NamedTuple):
    """The arrays that the kernel differentiates: what heads are made of, and the weights of that.

    queries [B, T, Rq] and keys [B, T, R], the latents; shared [B, T, H], the part of each key that
    is the same for all heads, behind zeros for the rest; w_q [N, Rq, H], w_k [N, R, H], with zeros
    for that part, and w_v [N, R, V].
    """

    queries: Array
    keys: Array
    shared: Array
    w_q: Array
    w_k: Array
    w_v: Array


Rotation = tuple[Array, Array] | None  # cosines and sines of a head, float32 [T, H]


def rotation(cos_Th: Array, sin_Th: Array, head: int) -> Rotation:
    """Widens a table of angles, [T, half], to whole heads: number i of the last 2 · half is turned
    with number i + half, and those before them are not. None without a rotary part.

    The sine of the first number of a pair has the sign of its turn.
    """
    half = cos_Th.shape[-1]
    if not half:
        return None
    front = ((0, 0), (head - 2 * half, 0))
    cos_TH = jnp.pad(jnp.concatenate((cos_Th, cos_Th), axis=-1), front, constant_values=1)
    return cos_TH, jnp.pad(jnp.concatenate((-sin_Th, sin_Th), axis=-1), front)


# Its derivative is written by hand, below: change both. tests/test_latent_kernel.py compares both
# with the formula.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def latent_attention(
    x: Latents, turn: Rotation, half: int, scale: float, block: int,
    interpret: bool = False,
) -> Array:  # fmt: skip
    """Computes causal softmax attention of heads made of latents: [B, T, N · value size].

    `turn` is what `rotation` returns. Products of the type of the latents are added up in
    float32. Output and log-sum-exp, which backward needs, are named ATTENTION_OUTPUT.
    """
    return _run_forward(x, turn, half, scale, block, interpret)[0]


def _forward(x: Latents, turn: Rotation, half: int, scale: float, block: int, interpret: bool):
    out_BTO, lse = _run_forward(x, turn, half, scale, block, interpret)
    out_BTO, lse = checkpoint_name((out_BTO, lse), ATTENTION_OUTPUT)
    return out_BTO, (x, turn, out_BTO, lse)


def _backward(half: int, scale: float, block: int, interpret: bool, saved: tuple, d_BTO: Array):
    x, turn, out_BTO, lse = saved
    dx = _run_backward(x, turn, out_BTO, lse, d_BTO, half, scale, block, interpret)
    return dx, None


latent_attention.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------


def heads_of_step(n: int, size: int) -> int:
    """Returns how many heads a step of the grid takes: the fewest whose values fill whole lanes; or
    all of them."""
    return next((g for g in range(1, n) if n % g == 0 and g * size % LANES == 0), n)


def _specs(x: Latents, turn: Rotation, group: int) -> tuple[list, list[Array]]:
    """Returns the blocks of the arguments that both kernels begin with, and the arguments."""
    from jax.experimental import pallas as pl

    def sequence(a: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *a.shape[1:]), lambda b, _: (b, 0, 0))

    def heads(a: Array) -> pl.BlockSpec:
        return pl.BlockSpec((group, *a.shape[1:]), lambda _, n: (n, 0, 0))

    table = [pl.BlockSpec(a.shape, lambda *_: (0, 0)) for a in turn or ()]
    return [*map(sequence, x[:3]), *map(heads, x[3:]), *table], [*x, *(turn or ())]


def _result(x: Latents, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Declares a result, which differs between devices as the arguments do."""
    differs = jax.typeof(x.queries).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=differs)


def _options(interpret: bool) -> dict:
    if interpret:
        return {'interpret': True}
    from jax.experimental.pallas import tpu

    return {
        'compiler_params': tpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES
        )
    }


def _run_forward(
    x: Latents, turn: Rotation, half: int, scale: float, block: int, interpret: bool
) -> tuple[Array, Array]:
    """Returns the output, [B, T, N · V], and float32 log-sum-exps, [B, steps, heads of one, T]."""
    from jax.experimental import pallas as pl

    B, T, _ = x.queries.shape
    n, _, V = x.w_v.shape
    group = heads_of_step(n, V)
    in_specs, arguments = _specs(x, turn, group)
    return pl.pallas_call(
        functools.partial(_forward_kernel, half=half, scale=scale, block=block),
        grid=(B, n // group),
        in_specs=in_specs,
        out_specs=[
            pl.BlockSpec((1, T, group * V), lambda b, n: (b, 0, n)),
            pl.BlockSpec((1, 1, group, T), lambda b, n: (b, n, 0, 0)),
        ],
        out_shape=[
            _result(x, (B, T, n * V), x.queries.dtype),
            _result(x, (B, n // group, group, T), jnp.float32),
        ],
        name='latent_attention_forward',
        **_options(interpret),
    )(*arguments)


def _run_backward(
    x: Latents, turn: Rotation, out_BTO: Array, lse: Array, d_BTO: Array, half: int,
    scale: float, block: int, interpret: bool,
) -> Latents:  # fmt: skip
    """Returns the gradients of all of x. The kernel adds up those of latents over heads; those of
    weights, of which each sequence has its own, are added up here."""
    from jax.experimental import pallas as pl

    B, T, _ = x.queries.shape
    n, _, V = x.w_v.shape
    group = heads_of_step(n, V)
    in_specs, arguments = _specs(x, turn, group)
    of_heads = pl.BlockSpec((1, T, group * V), lambda b, n: (b, 0, n))
    in_specs += [of_heads, pl.BlockSpec((1, 1, group, T), lambda b, n: (b, n, 0, 0)), of_heads]
    weights = [pl.BlockSpec((1, group, *w.shape[1:]), lambda b, n: (b, n, 0, 0)) for w in x[3:]]
    *d_latents, d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_backward_kernel, half=half, scale=scale, block=block),
        grid=(B, n // group),
        in_specs=in_specs,
        out_specs=[*in_specs[:3], *weights],
        out_shape=[
            *(_result(x, a.shape, jnp.float32) for a in x[:3]),
            *(_result(x, (B, *w.shape), jnp.float32) for w in x[3:]),
        ],
        name='latent_attention_backward',
        **_options(interpret),
    )(*arguments, out_BTO, lse, d_BTO)
    found = (*d_latents, *(jnp.sum(d, axis=0) for d in (d_q, d_k, d_v)))
    return Latents(*(d.astype(a.dtype) for d, a in zip(found, x, strict=True)))


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


def _product(a: Array, b: Array, over: tuple) -> Array:
    """Multiplies matrices, summing over these dimensions of both, in float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (over, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _exchanged(x_TH: Array, half: int) -> Array:
    """Exchanges both numbers of each pair; those before the pairs come out as anything."""
    from jax.experimental.pallas import tpu

    H = x_TH.shape[1]
    later, earlier = tpu.roll(x_TH, half, 1), tpu.roll(x_TH, H - half, 1)
    lane = lax.broadcasted_iota(jnp.int32, x_TH.shape, 1)
    return jnp.where(lane >= H - half, later, earlier)


def _turned(x_TH: Array, turn: tuple, half: int) -> Array:
    """Rotates a head, float32 [T, H]."""
    return x_TH * turn[0][...] + _exchanged(x_TH, half) * turn[1][...] if turn else x_TH


def _turned_back(d_TH: Array, turn: tuple, half: int) -> Array:
    """Returns the transpose of `_turned`, which turns the other way: exchanged, sines change their
    sign."""
    return d_TH * turn[0][...] - _exchanged(d_TH, half) * turn[1][...] if turn else d_TH


def _make_head(refs: tuple, turn: tuple, i: int, half: int, scale: float) -> list[Array]:
    """Makes scaled query, key and value of head i of the step: [T, H], [T, H], [T, V]."""
    q_R, kv_R, key, w_q, w_k, w_v = refs
    q_TH = _turned(_product(q_R[0], w_q[i], NN), turn, half) * scale
    k_TH = _product(kv_R[0], w_k[i], NN) + key[0].astype(jnp.float32)
    return [y.astype(q_R.dtype) for y in (q_TH, k_TH, _product(kv_R[0], w_v[i], NN))]


def _split(refs: tuple, results: int) -> tuple[tuple, tuple, tuple]:
    """Splits a kernel's references: those of Latents, of the rotation, which may be none, and the
    last ones."""
    return refs[:6], refs[6:-results], refs[-results:]


def _seen(block: int) -> Array:
    """Returns which keys (rows) of a block on the diagonal a query (column) sees."""
    key, query = (lax.broadcasted_iota(jnp.int32, (block, block), d) for d in (0, 1))
    return key <= query


def _forward_kernel(*refs, half: int, scale: float, block: int) -> None:
    """Computes the output and log-sum-exp of a step's heads, block of queries by block."""
    latents, turn, (out, lse) = _split(refs, 2)
    group, T = lse.shape[2:]
    rows = [slice(a, a + block) for a in range(0, T, block)]
    heads = [_make_head(latents, turn, i, half, scale) for i in range(group)]
    for at, here in enumerate(rows):
        parts = []
        for i, (q_TH, k_TH, v_TH) in enumerate(heads):
            top, total, sum_VT = MASKED, 0.0, 0.0
            for there in rows[: at + 1]:
                s_ST = _product(k_TH[there], q_TH[here], NT)
                if there == here:
                    s_ST = jnp.where(_seen(block), s_ST, MASKED)
                new = jnp.maximum(top, jnp.max(s_ST, axis=0, keepdims=True))
                p_ST, shrink = jnp.exp(s_ST - new), jnp.exp(top - new)
                total = total * shrink + jnp.sum(p_ST, axis=0, keepdims=True)
                new_VT = _product(v_TH[there], p_ST.astype(v_TH.dtype), TN)
                top, sum_VT = new, sum_VT * shrink + new_VT
            parts.append(sum_VT / total)
            lse[0, 0, i : i + 1, here] = top + jnp.log(total)
        out[0, here] = jnp.concatenate(parts, axis=0).T.astype(out.dtype)


def _backward_kernel(*refs, half: int, scale: float, block: int) -> None:
    """Computes the gradients of a step's heads, and adds those of latents to those of the heads
    before."""
    from jax.experimental import pallas as pl

    latents, rest, results = _split(refs, 6)
    turn, (out, lse, d_out) = rest[:-3], rest[-3:]
    group, T = lse.shape[2:]
    V, dtype = out.shape[2] // group, out.dtype
    rows = [slice(a, a + block) for a in range(0, T, block)]
    d_latents, d_weights = results[:3], results[3:]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for d in d_latents:
            d[...] = jnp.zeros_like(d)

    d_OT = d_out[0].astype(jnp.float32).T
    both_OT = out[0].astype(jnp.float32).T * d_OT
    q_R, kv_R, _, w_q, w_k, w_v = latents
    for i in range(group):
        own = slice(i * V, (i + 1) * V)
        head = _make_head(latents, turn, i, half, scale)
        sum_1T = jnp.sum(both_OT[own], axis=0, keepdims=True)
        dq, dk, dv = _head_gradients(
            head, d_OT[own].astype(dtype), sum_1T, lse[0, 0, i : i + 1], rows
        )
        dq = (_turned_back(dq, turn, half) * scale).astype(dtype)
        d_latents[0][0] += _product(dq, w_q[i], NT)
        d_latents[2][0] += dk
        dk, dv = dk.astype(dtype), dv.astype(dtype)
        d_latents[1][0] += _product(dk, w_k[i], NT) + _product(dv, w_v[i], NT)
        for d, x, dy in zip(d_weights, (q_R, kv_R, kv_R), (dq, dk, dv), strict=True):
            d[0, i] = _product(x[0], dy, TN)


def _head_gradients(
    head: list[Array], d_VT: Array, sum_1T: Array, lse_1T: Array, rows: list[slice]
) -> tuple[Array, Array, Array]:
    """Returns the float32 gradients of a head's scaled query, key and value (FlashAttention-2,
    Dao 2023, algorithm 2, for scores that are transposed)."""
    q_TH, k_TH, v_TH = head
    dq, dk, dv = [0.0] * len(rows), [], []
    for at, there in enumerate(rows):
        dk_SH = dv_SV = 0.0
        for b, here in enumerate(rows[at:], at):
            p_ST = jnp.exp(_product(k_TH[there], q_TH[here], NT) - lse_1T[:, here])
            if there == here:
                p_ST = jnp.where(_seen(here.stop - here.start), p_ST, 0)
            dp_ST = _product(v_TH[there], d_VT[:, here], NN)
            ds_ST = (p_ST * (dp_ST - sum_1T[:, here])).astype(q_TH.dtype)
            dv_SV += _product(p_ST.astype(q_TH.dtype), d_VT[:, here], NT)
            dk_SH += _product(ds_ST, q_TH[here], NN)
            dq[b] += _product(ds_ST, k_TH[there], TN)
        dk.append(dk_SH)
        dv.append(dv_SV)
    return tuple(jnp.concatenate(parts, axis=0) for parts in (dq, dk, dv))


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


def latent_rules(config: ConfigDict, head: int) -> Iterator[str]:
    """Yields errors for layers, sequences and masks that the kernel does not take."""
    m, T = config.model, config.seq_len
    if m.attention != 'mla':
        yield (
            f"model.attention_kernel='latent' makes heads of latents, and a layer has the "
            f"attention {m.attention!r}; use 'splash', or 'mla' in every layer"
        )
    block = min(m.attention_block, T)
    if block % LANES or T % block or T // block > MAX_BLOCKS:
        yield (
            f"model.attention_kernel='latent' takes at most {MAX_BLOCKS} blocks of a multiple of "
            f'{LANES} a sequence, and model.attention_block={m.attention_block} with seq_len={T} '
            f"makes {T / block:g} of {block}; use another block, or 'splash'"
        )
    documents = config.data.isolate_documents or m.document_end >= 0
    if documents or m.window or m.attention_sinks or config.mesh.cp > 1:
        yield (
            "model.attention_kernel='latent' knows the causal mask of whole sequences alone, and "
            'a layer has documents (data.isolate_documents, model.document_end), a window, sinks, '
            "or a part of a sequence (mesh.cp); use 'splash'"
        )
    yield from own_mask_errors('latent', config)
    if m.attention == 'mla':
        yield from _memory_errors(config, head, block)


def _memory_errors(config: ConfigDict, head: int, block: int) -> Iterator[str]:
    m, T, size = config.model, config.seq_len, 2 if config.compute_dtype == 'bfloat16' else 4
    latents = (m.q_rank or m.d_model) + m.kv_rank + head
    step = heads_of_step(max(m.n_heads // config.mesh.tp, 1), m.v_dim)
    # Twice each block that comes and goes; and a head's arrays with those of a pair of blocks.
    moved = T * (latents * (size + 4) + 8 * head + 2 * step * m.v_dim * size)
    moved += step * latents * head * (size + 4)
    held = T * 4 * (4 * head + 2 * step * m.v_dim) + 4 * 4 * block**2
    if 2 * moved + held > VMEM_BYTES:
        yield (
            f"model.attention_kernel='latent' holds a sequence in {VMEM_BYTES / 2**20:.0f} MiB of "
            f'vector memory, and seq_len={T} with these ranks takes '
            f"{(2 * moved + held) / 2**20:.0f}; use 'splash'"
        )
