"""The gated delta rule by chunks: linear attention whose state unlearns what a key said before.

A head keeps a state S, [key size, value size]. A token decays it, and replaces a part β of what its
key reads out of it by its value (Yang et al. 2024, "Gated Delta Networks", arXiv:2412.06464):

    S ← exp(g) S;    S ← S + β k (v - Sᵀ k)ᵀ;    output Sᵀ q

g is a number of each head, or one of each channel of its keys (Kimi Linear 2025, arXiv:2510.26692,
"Kimi Delta Attention"). Where a document begins the state starts at zero.

By chunks of C tokens, in float32 but for the operands of matmuls: a token's correction depends on
those of the chunk before it by a unit lower triangular system, whose inverse (WY representation, UT
transform) makes all else matmuls.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from parallel import Array

CHUNK = 64  # tokens, at most; what all of them see of each other is C² numbers a head
BLOCK = 16  # tokens whose decays of single channels exist for each pair


def chunk_size(T: int) -> int:
    """Returns the tokens of a chunk: the largest divisor of T up to CHUNK."""
    return max(d for d in range(1, min(CHUNK, T) + 1) if T % d == 0)


def flops(C: int, key: int, value: int, channels: bool, outputs: bool = True) -> float:
    """Returns the FLOPs of a token and a head in matmuls, forward, with chunks of C tokens: reading
    and writing the state; products with the keys of the chunk, and with what they wrote; the
    inverse. `channels` have decays of their own. Without outputs, of a state with `key` columns
    more."""
    near = channels * 2 * BLOCK * key * (1 + outputs)
    if not outputs:
        return near + 4 * key * (key + value) + C * (6 * key + 2 * value) + 2 / 3 * C**2
    return near + 6 * key * value + C * (6 * key + 4 * value) + 2 / 3 * C**2


def matmul(subscripts: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """Multiplies operands in the compute type: float32."""
    precision = 'highest' if dtype == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


exact = functools.partial(matmul, dtype=jnp.float32)


# ---------------------------------------------------------------------------------------------
# The triangular system
# ---------------------------------------------------------------------------------------------


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@jax.custom_vjp
def inverse(a_CC: Array) -> Array:
    """Returns the inverse of I + a for strictly lower triangular a, [..., C, C], float32.

    By halves, whose inverses are made together. A sum of powers of a would be as many matmuls, but
    of numbers that grow as binomials where keys repeat.
    """
    return _by_halves(a_CC)


def _by_halves(a_CC: Array) -> Array:
    C = a_CC.shape[-1]
    if C == 1:
        return jnp.ones_like(a_CC)
    if C % 2:
        more = [(0, 0)] * (a_CC.ndim - 2) + [(0, 1)] * 2
        return _by_halves(jnp.pad(a_CC, more))[..., :C, :C]
    half = C // 2
    corners = jnp.stack((a_CC[..., :half, :half], a_CC[..., half:, half:]))
    first, second = _by_halves(corners)
    below = exact('...ij,...jk->...ik', second, a_CC[..., half:, :half])
    below = -exact('...ij,...jk->...ik', below, first)
    top = jnp.concatenate((first, jnp.zeros_like(first)), axis=-1)
    return jnp.concatenate((top, jnp.concatenate((below, second), axis=-1)), axis=-2)


def _inverse_forward(a_CC: Array):
    inverse_CC = inverse(a_CC)
    return inverse_CC, inverse_CC


def _inverse_backward(inverse_CC: Array, d_CC: Array):
    d_CC = exact('...ji,...jk->...ik', inverse_CC, d_CC)
    return (jnp.tril(-exact('...ij,...kj->...ik', d_CC, inverse_CC), -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)


# ---------------------------------------------------------------------------------------------
# Products within a chunk
# ---------------------------------------------------------------------------------------------


def decay(seen: Array, exponent: Array) -> Array:
    """Returns exp(exponent) where seen, else 0, and no infinity whatever the others are."""
    return jnp.exp(jnp.where(seen, exponent, -jnp.inf))


def decayed_products(
    a: Array, b: Array, sums: Array, document: Array, seen: Array, dtype: jnp.dtype
) -> Array:
    """Computes Σ_h a_ih b_jh exp(sums_ih - sums_jh) for the pairs of tokens that are seen, else 0:
    [..., C, H] -> [..., C, C].

    `sums` are g added up from the first token of a document in the chunk, [..., C, 1 or H];
    `document` [..., C] numbers documents within the chunk.
    """
    if sums.shape[-1] == 1:
        products = matmul('...ih,...jh->...ij', a, b, dtype)
        return products * decay(seen, sums - jnp.swapaxes(sums, -1, -2))
    C = a.shape[-2]
    size = max(d for d in range(1, min(BLOCK, C) + 1) if C % d == 0)

    def rows(x: Array, axis: int) -> Array:
        """Cuts a dimension of C into blocks, which come first."""
        axis %= x.ndim
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def row(block: tuple) -> Array:
        return products_of_rows(*block, b, sums, document, dtype)

    cut = (jnp.arange(C // size), rows(a, -2), rows(sums, -2), rows(document, -1), rows(seen, -2))
    found = lax.map(row, cut)
    return jnp.moveaxis(found, 0, -3).reshape(*a.shape[:-1], C)


def products_of_rows(
    i: Array, a: Array, sums: Array, document: Array, seen: Array, b: Array, sums_b: Array,
    document_b: Array, dtype: jnp.dtype,
) -> Array:  # fmt: skip
    """Computes the rows of `decayed_products` of block i, with a decay of each channel: [..., size,
    C].

    Exponents of earlier blocks are split at the border before the block, so that neither part is
    above 0: exp(-sums_j) alone would overflow. Those within the block are taken pair by pair.
    """
    size, C = a.shape[-2], b.shape[-2]
    start = i * size
    last = jnp.maximum(start - 1, 0)
    border = lax.dynamic_slice_in_dim(sums_b, last, 1, -2)
    of_border = lax.dynamic_slice_in_dim(document_b, last, 1, -1)
    before = ((document_b == of_border) & (jnp.arange(C) < start))[..., None]
    later = a * decay((document == of_border)[..., None], sums - border)
    far = matmul('...ih,...jh->...ij', later, b * decay(before, border - sums_b), dtype)
    near_b = lax.dynamic_slice_in_dim(b, start, size, -2)
    near_seen = lax.dynamic_slice_in_dim(seen, start, size, -1)
    between = decay(near_seen[..., None], sums[..., :, None, :] - sums[..., None, :, :])
    # As a matmul: XLA:CPU of jax 0.10 ends the process in the gradient of the plain sum.
    near = exact('...ih,...ijh->...ij', a, near_b[..., None, :, :] * between)
    return lax.dynamic_update_slice_in_dim(far, near, start, -1)


# ---------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------


def delta_rule(
    q: Array | None,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    since_BT: Array,
    state: Array,
    dtype: jnp.dtype,
) -> tuple[Array, Array | None]:
    """Runs the gated delta rule over T tokens: the state after them, and their outputs, none
    without queries.

    Queries and keys [B, N, T, key size], values [B, N, T, value size], g [B, N, T, 1 or key size]
    of at most 0, β [B, N, T], all float32; state [B, N, key size, value size]; `dtype` is that of
    the matmuls' operands. since_BT, int32 [B, T], counts tokens since the start of the document: at
    0 the state starts anew. A state may be wider than values: the further columns, for which all
    values are 0, say what becomes of a state, since it changes linearly.
    """
    T, C, outputs = k.shape[2], chunk_size(k.shape[2]), q is not None
    q, k, v, g, beta = jax.tree.map(
        lambda x: x.reshape(*x.shape[:2], T // C, C, *x.shape[3:]), (q, k, v, g, beta)
    )
    document = jnp.cumsum((since_BT == 0).reshape(-1, 1, T // C, C), axis=-1)
    seen = (document[..., :, None] == document[..., None, :]) & jnp.tri(C, dtype=bool)
    sums = exact('bcij,bncjh->bncih', seen[:, 0], g)  # of numbers of one document alone
    total = sums[..., -1:, :]
    from_before = decay((document == 0)[..., None], sums)
    to_end = decay((document == document[..., -1:])[..., None], total - sums)
    through = decay((document[..., -1:] == 0)[..., None], total)[..., 0, :]

    asking = jnp.stack((k, q) if outputs else (k,))
    asked = decayed_products(asking, k, sums, document, seen, dtype)
    beta = beta[..., None]
    inverse_CC = inverse(jnp.tril(beta * asked[0], -1))
    v = jnp.pad(v, [(0, 0)] * 4 + [(0, state.shape[-1] - v.shape[-1])])
    values = matmul('bncij,bncjv->bnciv', inverse_CC, beta * v, dtype)
    reads = matmul('bncij,bncjh->bncih', inverse_CC, beta * k * from_before, dtype)
    queries = (q * from_before, asked[1]) if outputs else None

    def step(state: Array, chunk: tuple) -> tuple[Array, Array | None]:
        values, reads, keys, through, queries = chunk
        new = values - matmul('bnch,bnhv->bncv', reads, state, dtype)
        out = None
        if queries:
            out = matmul('bnch,bnhv->bncv', queries[0], state, dtype)
            out += matmul('bncj,bnjv->bncv', queries[1], new, dtype)
        state = state * through[..., None] + matmul('bnch,bncv->bnhv', keys, new, dtype)
        return state, out

    chunks = (values, reads, k * to_end, through, queries)
    state, out = lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), chunks))
    if outputs:
        out = jnp.moveaxis(out, 0, 2).reshape(*out.shape[1:3], T, out.shape[-1])
    return state, out


def delta_step(
    q: Array, k: Array, v: Array, g: Array, beta: Array, since_B: Array, state: Array
) -> tuple[Array, Array]:
    """Runs the rule for one token of each row, in float32: the state after it, and its output.

    As `delta_rule`, without the dimension of tokens.
    """
    before = jnp.where((since_B == 0)[:, None, None, None], 0, state) * jnp.exp(g)[..., None]
    new = beta[..., None] * (v - exact('bnh,bnhv->bnv', k, before))
    state = before + k[..., None] * new[..., None, :]
    return state, exact('bnh,bnhv->bnv', q, state)
